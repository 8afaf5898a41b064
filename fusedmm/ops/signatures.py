"""Remembers which calls passed their checks: of a small problem these would cost as much as ten operators."""

from collections.abc import Hashable, Sequence
from types import NoneType
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedmm.ops.autocast import is_autocast_on
from fusedmm.ops.dispatch import is_anyone_watching

T = TypeVar("T")
Signature = tuple[Hashable, ...]
# Of what a signature that is remembered is made. Others have no hash, or compare as they like.
PARTS = frozenset((NoneType, bool, int, float, str, type, torch.Size, torch.dtype, torch.device))
MOST = 256  # signatures that are remembered, before all are forgotten


class Passed(Generic[T]):
    """What the checks of one function found, by all that they look at."""

    def __init__(self) -> None:
        self._found: dict[Signature, T] = {}

    def get(self, signature: Signature | None) -> T | None:
        """What was found before; None where nothing was, or where there is no signature."""
        try:
            return None if signature is None else self._found.get(signature)
        except TypeError:  # something in it has no hash: the checks complain
            return None

    def remember(self, signature: Signature | None, found: T) -> None:
        """What was found now; without a signature of plain numbers and strings, nothing."""
        if signature is None or not PARTS.issuperset(map(type, signature)):
            return
        if len(self._found) >= MOST:
            self._found.clear()
        self._found[signature] = found


def signature(tensors: Sequence[object], others: Sequence[Hashable]) -> Signature | None:
    """Shapes, dtypes and devices of tensors, or None for each that is not given, and the rest as it is, with its types:
    5 equals 5.0. None where one is no plain tensor, autocast is on or someone is watching: there checks do more than
    look, and sizes may be no numbers.
    """
    if is_anyone_watching():
        return None
    found: list[Hashable] = [*others, *map(type, others)]
    device = None
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif type(tensor) is Tensor or type(tensor) is Parameter:
            device = tensor.device
            found += (tensor.shape, tensor.dtype, device)
        else:
            return None
    return None if device is None or is_autocast_on() else tuple(found)
