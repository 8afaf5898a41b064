"""Values, pointers, shared memory, barriers and TMA descriptors of the Gluon simulator (gluon_simulator.py)."""

import builtins
import operator
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUMPY = {
    "fp64": np.float64,
    "fp32": np.float32,
    "fp16": np.float32,
    "bf16": np.float32,
    "int32": np.int64,
    "int64": np.int64,
    "int1": bool,
}
FLOATS = ("bf16", "fp16", "fp32", "fp64")


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a dtype in NumPy: bfloat16 and float16 as rounded float32, integers as int64 within their range."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        nearest = ((bits + ((bits >> 16) & 1) + 0x7FFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        return np.where(np.isnan(values), np.float32(np.nan), nearest)
    if dtype == "fp16":
        return np.asarray(values, np.float32).astype(np.float16).astype(np.float32)
    result = np.asarray(values).astype(NUMPY[dtype])
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


def plain(operand: Any) -> Any:
    return operand.data if isinstance(operand, Value) else operand


def common_dtype(left: Any, right: Any) -> str:
    dtypes = [x.dtype for x in (left, right) if isinstance(x, Value)]
    if any(isinstance(x, float) for x in (left, right)) and not any(d in FLOATS for d in dtypes):
        return "fp32"
    order = ("int1", "int32", "int64", "bf16", "fp16", "fp32", "fp64")
    integers = [x for x in (left, right) if isinstance(x, int) and not isinstance(x, bool)]
    dtype = builtins.max(dtypes, key=order.index)
    return "int32" if integers and dtype == "int1" else dtype


def _binary(function: Callable[[Any, Any], Any], *, compares: bool = False, swapped: bool = False) -> Any:
    def method(self: Value, other: Any) -> Any:
        if isinstance(other, (Pointer, InFlight)):
            return NotImplemented
        left, right = (other, self) if swapped else (self, other)
        dtype = common_dtype(left, right)
        with np.errstate(all="ignore"):
            result = function(np.asarray(plain(left)), np.asarray(plain(right)))
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
        self.memory, self.dtype, self.offset = memory, dtype, np.asarray(plain(offset))

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.dtype, self.offset + np.asarray(plain(offset)))

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
    """An mbarrier: arrivals and bytes of the current phase, and what a completed phase makes known to who waits."""

    def __init__(self) -> None:
        self.count: int | None = None

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0
        self.fenced = False  # whether copies see the above
        self.gathered: set[int] = set()
        self.released: set[int] = set()

    def update(self, known: set[int], *, arrivals: int = 0, add_bytes: int = 0) -> None:
        """Arrive, or count bytes; ``known`` are the events that happened before."""
        if self.count is None:
            raise RuntimeError("barrier used before init")
        self.pending -= arrivals
        self.bytes += add_bytes
        self.gathered |= known
        if self.pending < 0:
            raise RuntimeError("more arrivals in a phase than the barrier counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.released, self.gathered = self.gathered, set()

    @property
    def at_rest(self) -> bool:
        """Whether no phase has begun that did not end."""
        return self.pending == self.count and self.bytes == 0


class Slot:
    """Accesses to one buffer of a ring: the copy that filled it last, and the reads since."""

    def __init__(self) -> None:
        self.filled: set[int] = set()
        self.reads: set[int] = set()

    def fill(self, event: int, known: set[int]) -> None:
        """A copy into it; everything before must have happened for whoever issues it."""
        if not self.filled | self.reads <= known:
            raise RaceError("a copy into a buffer that may still be read or written")
        self.filled, self.reads = {event}, set()

    def read(self, event: int, known: set[int]) -> None:
        """A read of it; the copy must have been waited for."""
        if not self.filled or not self.filled <= known:
            raise RaceError("a read of a buffer whose copy was not waited for")
        self.reads.add(event)


class RaceError(RuntimeError):
    """Two accesses to a buffer that no chain of barriers orders."""


class Shared:
    """A view of shared memory: of all buffers, or of one `Slot` once it is indexed; views of barriers carry them along.

    Args:
        reads: called with the slot when registers are loaded from it.
    """

    def __init__(
        self, data: np.ndarray, dtype: str, reads: Callable[[Slot], None] | None = None, slot: Slot | None = None
    ) -> None:
        self.data, self.dtype, self.reads, self.slot = data, dtype, reads, slot
        self.slots = [Slot() for _ in data] if slot is None else []

    shape = property(lambda self: list(self.data.shape))

    def index(self, position: Any) -> "Shared":
        return self._view(self.data[int(position)], self.slots[int(position)])

    def permute(self, order: Sequence[int]) -> "Shared":
        return self._view(self.data.transpose(order), self.slot)

    def reshape(self, shape: Sequence[int]) -> "Shared":
        view = self.data.reshape(shape)
        assert np.shares_memory(view, self.data)
        return self._view(view, self.slot)

    def slice(self, start: int, length: int) -> "Shared":
        return self._view(self.data[start : start + length], self.slot)

    def load(self, layout: None = None) -> Value:
        self.reads(self.slot)
        return Value(self.data.copy(), self.dtype)

    def _view(self, data: np.ndarray, slot: Slot) -> "Shared":
        return Shared(data, self.dtype, self.reads, slot)

    @property
    def barrier(self) -> Barrier:
        return self.data.reshape(-1)[0]


class InFlight:
    """The accumulator of a product that was issued and not waited for."""

    def __init__(self, left: Any, right: Shared, acc: Any, use_acc: bool, event: int) -> None:
        self.left, self.right, self.acc, self.use_acc, self.event = left, right, acc, use_acc, event
        self.value: Value | None = None

    def finish(self) -> None:
        """Read the operands and multiply; later calls do nothing."""
        if self.value is None:
            if isinstance(self.acc, InFlight):
                self.acc.finish()
            acc = self.acc.value if isinstance(self.acc, InFlight) else self.acc
            product = self.left.data.astype(np.float32) @ self.right.data.astype(np.float32)
            self.value = Value(product + acc.data if self.use_acc else product, "fp32")
