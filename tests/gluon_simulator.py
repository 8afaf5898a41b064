"""Runs Gluon kernels for Hopper on NumPy: the same Python source, with its barriers, TMA copies and asynchronous
products.

Triton's interpreter knows no Gluon. Here each partition of a warp-specialised kernel is a thread; one runs at a time
and a seeded scheduler switches between them wherever hardware could. What is checked:

* numbers: float32 arithmetic, rounding at ``.to(bfloat16)`` and ``.to(float16)``, int32 overflow;
* the barrier protocol: arrival counts, bytes, phases, deadlock;
* hazards: a TMA copy fills its buffer with NaN when it is issued and lands at a random later moment with its bytes; a
  product reads shared memory at a random moment between its issue and the wait that covers it; an accumulator that was
  not waited for cannot be used.

What is not: layouts, registers, proxy fences, the order of memory operations between threads of one partition, time.
"""

import builtins
import operator
import random
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_NUMPY = {
    "fp32": np.float32,
    "fp16": np.float32,
    "bf16": np.float32,
    "int32": np.int64,
    "int64": np.int64,
    "int1": bool,
}
_FLOATS = ("bf16", "fp16", "fp32")


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a dtype in NumPy: bfloat16 and float16 as rounded float32, integers as int64 within their range."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        nearest = ((bits + ((bits >> 16) & 1) + 0x7FFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        return np.where(np.isnan(values), np.float32(np.nan), nearest)
    if dtype == "fp16":
        return np.asarray(values, np.float32).astype(np.float16).astype(np.float32)
    result = np.asarray(values).astype(_NUMPY[dtype])
    if dtype == "int32" and result.size and not -(2**31) <= result.min() <= result.max() < 2**31:
        raise OverflowError("int32 overflow")
    return result


class Value:
    """A scalar or tensor in registers."""

    def __init__(self, data: Any, dtype: str) -> None:
        self.data = round_to(np.asarray(data), dtype)
        self.dtype = dtype

    shape = property(lambda self: list(self.data.shape))
    type = property(lambda self: types.SimpleNamespace(layout=None))

    def to(self, dtype: str) -> "Value":
        return Value(self.data, dtype)

    def __getitem__(self, index: Any) -> "Value":
        return Value(self.data[index], self.dtype)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)


def _plain(operand: Any) -> Any:
    return operand.data if isinstance(operand, Value) else operand


def _common(left: Any, right: Any) -> str:
    dtypes = [x.dtype for x in (left, right) if isinstance(x, Value)]
    if any(isinstance(x, float) for x in (left, right)) and not any(d in _FLOATS for d in dtypes):
        return "fp32"
    order = ("int1", "int32", "int64", "bf16", "fp16", "fp32")
    integers = [x for x in (left, right) if isinstance(x, int) and not isinstance(x, bool)]
    dtype = builtins.max(dtypes, key=order.index)
    return "int32" if integers and dtype == "int1" else dtype


def _binary(function: Callable[[Any, Any], Any], *, compares: bool = False, swapped: bool = False) -> Any:
    def method(self: Value, other: Any) -> Any:
        if isinstance(other, (Pointer, InFlight)):
            return NotImplemented
        left, right = (other, self) if swapped else (self, other)
        dtype = _common(left, right)
        with np.errstate(all="ignore"):
            result = function(np.asarray(_plain(left)), np.asarray(_plain(right)))
        return Value(result, "int1" if compares else dtype)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor"):
    _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    setattr(Value, f"__{_name}__", _binary(_function))
    setattr(Value, f"__r{_name}__", _binary(_function, swapped=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _binary(getattr(operator, _name), compares=True))
Value.__neg__ = lambda self: Value(-self.data, self.dtype)  # type: ignore[attr-defined]


class Pointer:
    """A pointer, or a tensor of pointers, into a flat array."""

    def __init__(self, memory: np.ndarray, dtype: str, offset: Any = 0) -> None:
        self.memory, self.dtype, self.offset = memory, dtype, np.asarray(_plain(offset))

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.dtype, self.offset + np.asarray(_plain(offset)))

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.memory, self.dtype, self.offset[index])


@dataclass
class Descriptor:
    """A TMA descriptor over a flat array: any rank, 64-bit wrap-around of addresses, zeros outside the shape."""

    memory: np.ndarray
    dtype: str
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: list[int]
    element_bytes: int = 2
    layout: None = None

    def read(self, start: Sequence[int]) -> np.ndarray:
        """The box at some coordinates."""
        box = np.zeros(self.block_shape, np.float32)
        inside = np.ones(self.block_shape, bool)
        offset = np.zeros(self.block_shape, np.int64)
        for axis, (origin, size, stride) in enumerate(zip(start, self.shape, self.strides, strict=True)):
            steps = np.arange(self.block_shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(self.shape))])
            inside = inside & (origin + steps >= 0) & (origin + steps < size)
            offset = offset + steps * (stride if self.block_shape[axis] > 1 else 0)
        # modulo 2^64 bytes, as the hardware adds
        first = sum(origin * stride for origin, stride in zip(start, self.strides, strict=True))
        box[inside] = self.memory[first % (2**64 // self.element_bytes) + offset[inside]]
        return box


class Barrier:
    """An mbarrier: arrivals and bytes of the current phase."""

    def __init__(self) -> None:
        self.count: int | None = None

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def update(self, arrivals: int = 0, add_bytes: int = 0) -> None:
        if self.count is None:
            raise RuntimeError("barrier used before init")
        self.pending -= arrivals
        self.bytes += add_bytes
        if self.pending < 0:
            raise RuntimeError("more arrivals in a phase than the barrier counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


class Shared:
    """A view of shared memory; views of barriers carry them along."""

    def __init__(self, data: np.ndarray, dtype: str) -> None:
        self.data, self.dtype = data, dtype

    shape = property(lambda self: list(self.data.shape))

    def index(self, position: Any) -> "Shared":
        return Shared(self.data[int(position)], self.dtype)

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.data.transpose(order), self.dtype)

    def reshape(self, shape: Sequence[int]) -> "Shared":
        view = self.data.reshape(shape)
        assert np.shares_memory(view, self.data)
        return Shared(view, self.dtype)

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.data[start : start + length], self.dtype)

    def load(self, layout: None = None) -> Value:
        return Value(self.data.copy(), self.dtype)

    @property
    def barrier(self) -> Barrier:
        return self.data.reshape(-1)[0]


class InFlight:
    """The accumulator of a product that was issued and not waited for."""

    def __init__(self, left: Any, right: Shared, acc: Any, use_acc: bool) -> None:
        self.left, self.right, self.acc, self.use_acc = left, right, acc, use_acc
        self.value: Value | None = None

    def finish(self) -> None:
        """Read the operands and multiply; later calls do nothing."""
        if self.value is None:
            if isinstance(self.acc, InFlight):
                self.acc.finish()
            acc = self.acc.value if isinstance(self.acc, InFlight) else self.acc
            product = self.left.data.astype(np.float32) @ self.right.data.astype(np.float32)
            self.value = Value(product + acc.data if self.use_acc else product, "fp32")


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
            function(**wrapped)

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
        scope["range"] = lambda *bounds: (Value(i, "int32") for i in range(*(int(_plain(b)) for b in bounds)))
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

    # ---- what replaces Gluon

    def load_tile(self, descriptor: Descriptor, start: Sequence[Any], barrier: Shared, buffer: Shared) -> None:
        """TMA: poison the buffer now, fill it and count the bytes later."""
        coordinates = [int(_plain(x)) for x in start]
        buffer.data[...] = np.nan

        def land() -> None:
            buffer.data[...] = descriptor.read(coordinates)
            barrier.barrier.update(add_bytes=-int(np.prod(descriptor.block_shape)) * descriptor.element_bytes)

        self.copies.append(land)
        self._switch()

    def product(self, left: Any, right: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        """wgmma."""
        issued = InFlight(left, right, acc, use_acc)
        assert is_async
        self.partition.products.append(issued)
        if self.random.random() < 0.3:
            issued.finish()
        return issued

    def wait(self, num_outstanding: int = 0, *, deps: Sequence[Any]) -> Any:
        """Wait for all but the latest products."""
        self._switch()
        flying = self.partition.products
        while len(flying) > num_outstanding:
            flying.pop(0).finish()
        if any(dep in flying for dep in deps):
            raise RuntimeError("an accumulator was used while its product was in flight")
        values = [dep.value if isinstance(dep, InFlight) else dep for dep in deps]
        return values[0] if len(values) == 1 else tuple(values)

    def nothing(self, *_: Any, **__: Any) -> None:
        """A fence or barrier of threads that the simulator runs as one."""
        self._switch()

    def _barriers(self) -> types.SimpleNamespace:
        def arrive(barrier: Shared, *, count: int = 1, pred: Any = True) -> None:
            if pred:
                barrier.barrier.update(arrivals=count)
            self._switch()

        def wait(barrier: Shared, phase: Any) -> None:
            self._switch(lambda: barrier.barrier.phase != int(_plain(phase)))

        return types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, *, count: barrier.barrier.init(count),
            expect=lambda barrier, size: barrier.barrier.update(arrivals=1, add_bytes=size),
            arrive=arrive,
            wait=wait,
        )

    def _language(self) -> types.SimpleNamespace:
        def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
            offset = pointer.offset
            keep = np.broadcast_to(np.asarray(True if mask is None else _plain(mask)), offset.shape)
            result = np.full(offset.shape, other, _NUMPY[pointer.dtype])
            if keep.any() and not 0 <= offset[keep].min() <= offset[keep].max() < pointer.memory.size:
                raise IndexError("load outside the tensor")
            result[keep] = pointer.memory[offset[keep]]
            return Value(result, pointer.dtype)

        def store(pointer: Pointer, value: Value, mask: Any = None) -> None:
            keep = np.broadcast_to(np.asarray(True if mask is None else _plain(mask)), pointer.offset.shape)
            if keep.any() and not 0 <= pointer.offset[keep].min() <= pointer.offset[keep].max() < pointer.memory.size:
                raise IndexError("store outside the tensor")
            rounded = np.broadcast_to(round_to(value.data, pointer.dtype), pointer.offset.shape)
            pointer.memory[pointer.offset[keep]] = rounded[keep]

        def allocate(dtype: str, shape: Sequence[int], layout: None) -> Shared:
            if dtype == "int64":
                barriers = np.empty(shape, object)
                for index in np.ndindex(*barriers.shape):
                    barriers[index] = Barrier()
                return Shared(barriers, dtype)
            return Shared(np.full(shape, np.nan, np.float32), dtype)

        def reduce(function: Callable[..., Any]) -> Callable[[Value, int], Value]:
            return lambda value, axis: Value(function(value.data, axis=axis), value.dtype)

        def elementwise(function: Callable[..., Any]) -> Callable[..., Value]:
            def apply(*operands: Any) -> Value:
                with np.errstate(all="ignore"):
                    dtype = _common(*operands) if len(operands) == 2 else operands[0].dtype
                    return Value(function(*(_plain(x) for x in operands)), dtype)

            return apply

        def where(condition: Value, yes: Any, no: Any) -> Value:
            return Value(np.where(condition.data, _plain(yes), _plain(no)), _common(yes, no))

        def inline_assembly(assembly: str, *_: Any, **__: Any) -> Value:
            assert "%ctaid.x" in assembly
            return Value(self.program, "int32")

        def no_layout(*_: Any, **__: Any) -> None:
            return None

        return types.SimpleNamespace(
            bfloat16="bf16",
            float16="fp16",
            float32="fp32",
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
