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
_dynamo = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.maybe_current_level
_is_tracing = torch._C._is_tracing
PLAIN = frozenset((Tensor, Parameter, NoneType, bool, int, float, str))  # types of arguments that watch nothing


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is under way."""
    return _transform() is not None


def is_anyone_watching() -> bool:
    """Whether calls must show in the dispatcher whatever they are given: to the compiler, a mode, a transform or a
    tracer. `torch.export`, where it does not compile, is a mode.
    """
    return _dynamo() or _dispatch_modes() > 0 or _function_modes() > 0 or _transform() is not None or _is_tracing()


def is_watched(arguments: Iterable[Any]) -> bool:
    """Whether calls must show in the dispatcher: to those, or to a subclass of Tensor."""
    return is_anyone_watching() or not PLAIN.issuperset(map(type, arguments))


def apply_unwatched(function: type[Function], *arguments: Any) -> Any:
    """`Function.apply` without its search of the arguments for transforms, which `is_watched` has made."""
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def is_batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether gradients from upstream are many at once, by ``torch.autograd.grad(..., is_grads_batched=True)``: the
    dispatcher hands them to an operator one by one.
    """
    return any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)
