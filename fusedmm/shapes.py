"""Checks of what a user passes: one helper each for shapes, dtypes, devices, types and numbers, one form of error.

Every message reads ``op: argument rule, got value. What to do.`` Nothing here reads a tensor's values, so no check
waits for a GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class ShapeError(ValueError):
    """Two arguments disagree about a dimension, or one has the wrong number of dimensions."""


Dim = str | int
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shapes(
    op: str, shapes: Mapping[str, tuple[Tensor | None, Sequence[Dim]]], known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Bind dimension names to sizes over all arguments, and complain about the first disagreement.

    Args:
        op: name of the public function, the first word of the message.
        shapes: for each argument the tensor (None: not given, skipped) and its dimensions: a name binds or must agree,
            an int must be that size.
        known: sizes of names that are bound beforehand, for example by the layout.

    Returns:
        The size of every name.

    Raises:
        ShapeError: naming the argument, what it has and what was expected.
        TypeError: for what is no tensor, a list among them.
    """
    sizes = dict(known or {})
    owners: dict[str, str] = {}
    for argument, (tensor, dims) in shapes.items():
        if tensor is None:
            continue
        check_tensor(op, argument, tensor)
        shape = tensor.shape
        if len(shape) != len(dims):
            raise ShapeError(
                f"{op}: {argument} must have {len(dims)} dimensions {_named(dims)}, got shape {list(shape)}."
            )
        for dim, size in zip(dims, shape, strict=True):
            if isinstance(dim, int):
                if size != dim:
                    raise ShapeError(f"{op}: {argument} must have shape {_named(dims)}, got {list(shape)}.")
            elif dim not in sizes:
                sizes[dim], owners[dim] = size, argument
            elif sizes[dim] != size:
                raise ShapeError(
                    f"{op}: {argument} has {dim}={size}, but {owners.get(dim, 'the layout')} has {dim}={sizes[dim]}; "
                    f"expected {argument} of shape {_named(dims)}."
                )
    return sizes


def _named(dims: Sequence[Dim]) -> str:
    return "[" + ", ".join(str(dim) for dim in dims) + "]"


def check_tensor(op: str, argument: str, value: object) -> None:
    """Complain with ``TypeError`` about what is no tensor, a list or a NumPy array among them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}. Use torch.as_tensor.")


def as_number(op: str, argument: str, value: Any) -> float:
    """The value as a float; ``TypeError`` where it is no number, a string of digits among them."""
    try:
        number = None if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None:
        raise TypeError(f"{op}: {argument} must be a number, got {type(value).__name__}.")
    return number


def check_type(op: str, argument: str, value: object, wanted: type, advice: str) -> None:
    """Complain with ``TypeError`` where an argument is no ``wanted``; ``advice`` says how one is made."""
    if not isinstance(value, wanted):
        article = "an" if wanted.__name__[0].lower() in "aeiou" else "a"
        raise TypeError(f"{op}: {argument} must be {article} {wanted.__name__}, got {type(value).__name__}. {advice}")


def check_broadcast(op: str, argument: str, tensor: Tensor, shape: Sequence[int], dims: Sequence[str]) -> Tensor:
    """Expand a tensor that broadcasts from the right to ``shape``; a view, no copy.

    Raises:
        ShapeError: where a dimension is neither 1 nor the size that is needed.
        TypeError: for what is no tensor.
    """
    check_tensor(op, argument, tensor)
    if tensor.shape == tuple(shape):
        return tensor
    trailing = tuple(tensor.shape)
    fits = len(trailing) <= len(shape) and all(
        have in (1, need) for have, need in zip(trailing[::-1], tuple(shape)[::-1], strict=False)
    )
    if not fits:
        named = ", ".join(f"{dim}={size}" for dim, size in zip(dims, shape, strict=True))
        raise ShapeError(f"{op}: {argument} must broadcast from the right to [{named}], got shape {list(trailing)}.")
    return tensor.expand(*shape)


def check_dtype(op: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype], advice: str) -> None:
    """Complain with ``TypeError`` where a tensor's dtype is none of ``allowed``; ``advice`` says what to do."""
    check_tensor(op, argument, tensor)
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{op}: {argument} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}{advice}")


def check_device(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Complain with ``ValueError`` where the given tensors do not share one device."""
    first: tuple[str, torch.device] | None = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (argument, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(
                f"{op}: {argument} must be on the device of {first[0]} ({first[1]}), got {tensor.device}. Move it "
                f"with .to({str(first[1])!r})."
            )
