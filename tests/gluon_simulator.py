"""Runs Gluon kernels for Hopper on NumPy: the same Python source, with its barriers, TMA copies and asynchronous
products.

Triton's interpreter knows no Gluon. Here each partition of a warp-specialised kernel is a thread; one runs at a time
and a seeded scheduler switches between them wherever hardware could. What is checked:

* numbers: float32 arithmetic, rounding at ``.to(bfloat16)`` and ``.to(float16)``, int32 overflow;
* the barrier protocol: arrival counts, bytes, phases, deadlock, that no barrier ends in the middle of a phase, and a
  fence between the initialisation of a barrier and the first copy that counts on it;
* races: of any two accesses to a buffer by copies, products and loads one must have happened before the other through
  barriers, whatever the schedule of this run made of them;
* hazards: a TMA copy fills its buffer with NaN when it is issued and lands at a random later moment with its bytes; a
  product reads shared memory at a random moment between its issue and the wait that covers it; an accumulator that was
  not waited for cannot be used.

What is not: layouts, registers, the order of memory operations between threads of one partition, time; nor fences
between writes of threads to a buffer and its reads by copies or products, for threads write to none.
"""

import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.gluon_values import (
    NUMPY,
    Barrier,
    Descriptor,
    InFlight,
    Pointer,
    Shared,
    Slot,
    Value,
    common_dtype,
    plain,
    round_to,
)


class DeadlockError(RuntimeError):
    """Every partition waits and no copy is under way."""


class Simulator:
    """Runs kernels; the seed decides when partitions switch and when asynchronous work lands.

    Args:
        seed: of the schedule.
    """

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.program = 0
        self.partition = threading.local()

    def run(
        self, kernel: Any, programs: int, arguments: dict[str, Any], substitutes: Sequence[tuple[Any, str]]
    ) -> None:
        """Run every program of a kernel, one after the other.

        Args:
            kernel: the ``@gluon.jit`` function.
            programs: size of the grid.
            arguments: by name; flat NumPy arrays come as `Pointer`, tensor descriptors as `Descriptor`.
            substitutes: (object that the kernel's modules refer to, name of the method that replaces it).
        """
        self.replacements = {id(thing): getattr(self, name) for thing, name in substitutes}
        function = self._convert(kernel, {})
        wrapped = {}
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if isinstance(value, int) and not parameter.is_constexpr:
                value = Value(value, "int64" if "64" in str(parameter.annotation) else "int32")
            elif isinstance(value, float):
                value = Value(value, "fp32")
            wrapped[parameter.name] = value
        for self.program in range(programs):
            self.copies = []
            self.barriers: list[Barrier] = []
            self.events = 0
            function(**wrapped)
            if not all(barrier.at_rest for barrier in self.barriers):
                raise RuntimeError("a barrier ended in the middle of a phase")

    def _convert(self, kernel: Any, done: dict[Any, Any]) -> Any:
        """A kernel as a Python function whose globals are the simulator's."""
        if kernel.fn in done:
            return done[kernel.fn]
        scope = dict(kernel.fn.__globals__)
        code = kernel.fn
        new = types.FunctionType(code.__code__, scope, code.__name__, code.__defaults__, code.__closure__)
        done[kernel.fn] = new
        for name, thing in list(scope.items()):
            if id(thing) in self.replacements:
                scope[name] = self.replacements[id(thing)]
            elif hasattr(thing, "fn") and hasattr(thing, "arg_names"):
                scope[name] = self._convert(thing, done)
            elif type(thing).__name__ == "constexpr":
                scope[name] = thing.value
        scope["gl"] = self._language()
        scope["mbarrier"] = self._barriers()
        scope["range"] = lambda *bounds: (Value(i, "int32") for i in range(*(int(plain(b)) for b in bounds)))
        return new

    # ---- partitions: one runs at a time

    def _specialize(self, functions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        self.turns = [threading.Semaphore(0) for _ in functions]
        self.done = threading.Semaphore(0)
        self.alive = set(range(len(functions)))
        self.blocked: dict[int, Callable[[], bool]] = {}
        self.error: BaseException | None = None

        def body(index: int) -> None:
            self.turns[index].acquire()
            self.partition.index, self.partition.products = index, []
            self.partition.known = set()  # events that happened before what this partition does next
            try:
                if self.error is None:
                    functions[index][0](*functions[index][1])
                    if self.partition.products:
                        raise RuntimeError("a partition ended with products in flight")
            except BaseException as error:
                self.error = self.error or error
            self.alive.discard(index)
            self._hand_over()

        threads = [threading.Thread(target=body, args=(index,), daemon=True) for index in range(len(functions))]
        for thread in threads:
            thread.start()
        self._hand_over()
        self.done.acquire()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        if self.copies:
            raise RuntimeError("a TMA copy was never waited for")

    def _hand_over(self) -> None:
        """Wake the next partition; with an error, all of them in turn, so that they end."""
        if not self.alive:
            self.done.release()
            return
        while self.error is None:
            self._land()
            ready = [i for i in sorted(self.alive) if i not in self.blocked or self.blocked[i]()]
            if ready:
                self.turns[self.random.choice(ready)].release()
                return
            if not self.copies:
                self.error = DeadlockError(f"partitions {sorted(self.alive)} wait and no copy is under way")
        self.turns[min(self.alive)].release()

    def _land(self) -> None:
        while self.copies and self.random.random() < 0.5:
            position = 0 if self.random.random() < 0.7 else self.random.randrange(len(self.copies))
            self.copies.pop(position)()

    def _switch(self, condition: Callable[[], bool] | None = None) -> None:
        """Let others run; come back when the condition holds."""
        index = getattr(self.partition, "index", None)
        if index is None:
            return
        if condition is not None:
            self.blocked[index] = condition
        self._hand_over()
        self.turns[index].acquire()
        self.blocked.pop(index, None)
        if self.error is not None:
            raise RuntimeError("stopped: another partition failed")

    def _event(self) -> int:
        self.events += 1
        return self.events

    # ---- what replaces Gluon

    def load_tile(self, descriptor: Descriptor, start: Sequence[Any], barrier: Shared, buffer: Shared) -> None:
        """TMA: poison the buffer now, fill it and count the bytes later."""
        if not barrier.barrier.fenced:
            raise RuntimeError("a copy counts on a barrier whose initialisation no fence made known to it")
        coordinates = [int(plain(x)) for x in start]
        event = self._event()
        buffer.slot.fill(event, self.partition.known)
        known = self.partition.known | {event}
        buffer.data[...] = np.nan

        def land() -> None:
            buffer.data[...] = descriptor.read(coordinates)
            barrier.barrier.update(known, add_bytes=-int(np.prod(descriptor.block_shape)) * descriptor.element_bytes)

        self.copies.append(land)
        self._switch()

    def product(self, left: Any, right: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        """wgmma."""
        issued = InFlight(left, right, acc, use_acc, self._event())
        assert is_async
        for operand in (left, right):
            if isinstance(operand, Shared):
                operand.slot.read(issued.event, self.partition.known)
        self.partition.products.append(issued)
        if self.random.random() < 0.3:
            issued.finish()
        return issued

    def wait(self, num_outstanding: int = 0, *, deps: Sequence[Any]) -> Any:
        """Wait for all but the latest products."""
        self._switch()
        flying = self.partition.products
        while len(flying) > num_outstanding:
            done = flying.pop(0)
            done.finish()
            self.partition.known.add(done.event)
        if any(dep in flying for dep in deps):
            raise RuntimeError("an accumulator was used while its product was in flight")
        values = [dep.value if isinstance(dep, InFlight) else dep for dep in deps]
        return values[0] if len(values) == 1 else tuple(values)

    def loaded(self, slot: Slot) -> None:
        """Registers were loaded from a buffer."""
        event = self._event()
        slot.read(event, self.partition.known)
        self.partition.known.add(event)

    def fence(self) -> None:
        """Make the barriers' initialisation known to copies."""
        for barrier in self.barriers:
            barrier.fenced = barrier.count is not None

    def nothing(self, *_: Any, **__: Any) -> None:
        """A barrier of threads that the simulator runs as one."""
        self._switch()

    def _barriers(self) -> types.SimpleNamespace:
        def arrive(barrier: Shared, *, count: int = 1, pred: Any = True) -> None:
            if pred:
                barrier.barrier.update(self.partition.known, arrivals=count)
            self._switch()

        def wait(barrier: Shared, phase: Any) -> None:
            self._switch(lambda: barrier.barrier.phase != int(plain(phase)))
            self.partition.known |= barrier.barrier.released

        def expect(barrier: Shared, size: int) -> None:
            barrier.barrier.update(self.partition.known, arrivals=1, add_bytes=size)

        return types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, *, count: barrier.barrier.init(count),
            expect=expect,
            arrive=arrive,
            wait=wait,
        )

    def _language(self) -> types.SimpleNamespace:
        def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
            offset = pointer.offset
            keep = np.broadcast_to(np.asarray(True if mask is None else plain(mask)), offset.shape)
            result = np.full(offset.shape, other, NUMPY[pointer.dtype])
            if keep.any() and not 0 <= offset[keep].min() <= offset[keep].max() < pointer.memory.size:
                raise IndexError("load outside the tensor")
            result[keep] = pointer.memory[offset[keep]]
            return Value(result, pointer.dtype)

        def store(pointer: Pointer, value: Value, mask: Any = None) -> None:
            keep = np.broadcast_to(np.asarray(True if mask is None else plain(mask)), pointer.offset.shape)
            if keep.any() and not 0 <= pointer.offset[keep].min() <= pointer.offset[keep].max() < pointer.memory.size:
                raise IndexError("store outside the tensor")
            rounded = np.broadcast_to(round_to(value.data, pointer.dtype), pointer.offset.shape)
            pointer.memory[pointer.offset[keep]] = rounded[keep]

        def allocate(dtype: str, shape: Sequence[int], layout: None) -> Shared:
            if dtype == "int64":
                barriers = np.empty(shape, object)
                for index in np.ndindex(*barriers.shape):
                    barriers[index] = Barrier()
                    self.barriers.append(barriers[index])
                return Shared(barriers, dtype)
            return Shared(np.full(shape, np.nan, np.float32), dtype, self.loaded)

        def reduce(function: Callable[..., Any]) -> Callable[[Value, int], Value]:
            return lambda value, axis: Value(function(value.data, axis=axis), value.dtype)

        def elementwise(function: Callable[..., Any]) -> Callable[..., Value]:
            def apply(*operands: Any) -> Value:
                with np.errstate(all="ignore"):
                    dtype = common_dtype(*operands) if len(operands) == 2 else operands[0].dtype
                    return Value(function(*(plain(x) for x in operands)), dtype)

            return apply

        def where(condition: Value, yes: Any, no: Any) -> Value:
            return Value(np.where(condition.data, plain(yes), plain(no)), common_dtype(yes, no))

        def inline_assembly(assembly: str, *_: Any, **__: Any) -> Value:
            assert "%ctaid.x" in assembly
            return Value(self.program, "int32")

        def no_layout(*_: Any, **__: Any) -> None:
            return None

        return types.SimpleNamespace(
            bfloat16="bf16",
            float16="fp16",
            float32="fp32",
            float64="fp64",
            int32="int32",
            int64="int64",
            constexpr=object,
            static_range=range,
            where=where,
            load=load,
            store=store,
            allocate_shared_memory=allocate,
            max=reduce(np.max),
            sum=reduce(np.sum),
            exp2=elementwise(np.exp2),
            log2=elementwise(np.log2),
            maximum=elementwise(np.maximum),
            **dict.fromkeys(("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"), no_layout),
            arange=lambda start, stop, layout: Value(np.arange(start, stop), "int32"),
            full=lambda shape, value, dtype, layout: Value(np.full(shape, value), dtype),
            zeros=lambda shape, dtype, layout: Value(np.zeros(shape), dtype),
            convert_layout=lambda value, layout: value,
            inline_asm_elementwise=inline_assembly,
            warp_specialize=self._specialize,
        )
