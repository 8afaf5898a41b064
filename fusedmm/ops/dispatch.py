"""When the registered operators go through PyTorch's dispatcher: its way through two dozen arguments to Python and back
takes as long as a small problem, and is taken only where someone is watching.
"""

from collections.abc import Iterable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

# Bound once: a first call after other work would look each of them up in PyTorch's largest modules.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.maybe_current_level
_trace = torch._C._get_tracing_state
PLAIN = frozenset((Tensor, Parameter, NoneType, bool, int, float, str))  # types of arguments that watch nothing


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is under way."""
    return _transform() is not None


def is_watched(arguments: Iterable[Any]) -> bool:
    """Whether calls must show in the dispatcher: to the compiler, a mode, a transform, a tracer or a subclass of
    Tensor.
    """
    return (
        _is_compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transform() is not None
        or _trace() is not None
        or not PLAIN.issuperset(map(type, arguments))
    )


def apply_unwatched(function: type[Function], *arguments: Any) -> Any:
    """`Function.apply` without its search of the arguments for transforms, which `is_watched` has made."""
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def is_batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether gradients from upstream are many at once, by ``torch.autograd.grad(..., is_grads_batched=True)``: the
    dispatcher hands them to an operator one by one.
    """
    return any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)
