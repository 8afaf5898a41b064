"""Backward functions that cannot be differentiated again, and say so whatever is given to them."""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Refuse second derivatives of a backward without autograd's knowledge.

    `torch.autograd.function.once_differentiable` refuses them only where the gradient from upstream requires one: that
    of a plain sum does not, and a penalty on what comes back would be a constant without a word.
    """

    @wraps(backward)
    def run(*arguments: Any) -> Gradients:
        if not torch.is_grad_enabled():  # no create_graph
            return backward(*arguments)
        with torch.no_grad():
            gradients = backward(*arguments)
        refuse: Callable[..., Any] = torch._C._functions.DelayedError(
            b"second derivatives of fusedmm's operators are not there: their backward is first_order", len(gradients)
        )
        return cast(Gradients, refuse(*(None if g is None else g.detach().requires_grad_() for g in gradients)))

    return run
