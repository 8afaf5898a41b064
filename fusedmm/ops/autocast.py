"""What autocast means for the operators: their inputs are cast before them, and nothing inside rounds again."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fusedmm.shapes import check_tensor

NOTHING = nullcontext()


def is_autocast_on() -> bool:
    """Whether it is, on any device but MPS, which PyTorch leaves out: to ask about one costs as much as an operator."""
    return torch._C._is_any_autocast_enabled()


def autocast(op: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on; float64 stays, as in PyTorch's own operators.

    Raises:
        TypeError: for what is no tensor, by its name.
    """
    for argument, tensor in tensors.items():
        check_tensor(op, argument, tensor)
    given = tuple(tensors.values())
    if not is_autocast_on() or not torch.is_autocast_enabled(device := given[0].device.type):
        return given
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in given)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off, where it is on: entering costs as much as ten operators."""
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast_on() else NOTHING
