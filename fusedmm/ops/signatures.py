"""Remembers which calls passed their checks: of a small problem these would cost as much as ten operators."""

from collections.abc import Hashable, Sequence
from types import NoneType
from typing import Generic, TypeVar

from torch import Tensor

from fusedmm.ops.autocast import is_autocast_on
from fusedmm.ops.dispatch import is_watched

T = TypeVar("T")
NUMBERS = frozenset((NoneType, bool, int, float, str))
MOST = 256  # signatures that are remembered, before all are forgotten


class Passed(Generic[T]):
    """What the checks of one function found, by all that they look at."""

    def __init__(self) -> None:
        self._found: dict[Hashable, T] = {}

    def get(self, signature: Hashable | None) -> T | None:
        """What was found before; None where nothing was, or where there is no signature."""
        return None if signature is None else self._found.get(signature)

    def remember(self, signature: Hashable | None, found: T) -> None:
        """What was found now; without a signature, nothing."""
        if signature is None:
            return
        if len(self._found) >= MOST:
            self._found.clear()
        self._found[signature] = found


def signature(tensors: Sequence[object], others: Sequence[Hashable]) -> Hashable | None:
    """Shapes, dtypes and devices of tensors, or None for each that is not given, and the rest as it is, with its types:
    5 equals 5.0. None where one is no plain tensor, or one of the rest no plain number or string, autocast is on or
    someone is watching: there checks do more than look, and sizes may be no numbers.
    """
    if is_watched(tensors) or not NUMBERS.issuperset(types := tuple(map(type, others))):
        return None
    found: list[Hashable] = [*others, types]
    device = None
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif isinstance(tensor, Tensor):
            device = tensor.device
            found += (tensor.shape, tensor.dtype, device)
        else:
            return None
    return None if device is None or is_autocast_on() else tuple(found)
