"""Backward functions that cannot be differentiated again, and say so whatever is given to them."""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
NO_SECOND_DERIVATIVES = "second derivatives of fusedmm's operators are not there: their backward is first_order"


class _Unpacked:
    """A ctx whose saved tensors are asked for once: activation checkpointing gives them no second time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors: tuple[Tensor | None, ...] = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Refuse second derivatives of a backward that autograd cannot see into.

    `torch.autograd.function.once_differentiable` refuses them only where the gradient from upstream requires one: that
    of a plain sum does not, and a penalty on what comes back would silently be a constant. And it ties the gradients
    to no input: `torch.autograd.grad` towards one would return what other paths give as if that were all.
    """

    @wraps(backward)
    def run(ctx: Any, *upstream: Any) -> Gradients:
        if not torch.is_grad_enabled():  # no create_graph
            return backward(ctx, *upstream)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        given = (*gradients, *(x for x in (*ctx.saved_tensors, *upstream) if x is not None and x.requires_grad))
        refuse: Callable[..., Any] = torch._C._functions.DelayedError(NO_SECOND_DERIVATIVES.encode(), len(given))
        leaves = (None if g is None else g.detach().requires_grad_() for g in gradients)
        return cast(Gradients, refuse(*leaves, *given[len(gradients) :])[: len(gradients)])

    return run
