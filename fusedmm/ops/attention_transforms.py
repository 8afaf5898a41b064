"""The attention under the transforms of `torch.func`: what `fusedmm.ops.attention_op` registers, once more as functions
that `grad`, `vjp`, `jacrev` and `vmap` of them can take apart. They want everything that is saved to be an argument, so
what a small problem would keep is computed again; `vmap` calls the operators once an example.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

TENSORS = 13  # leading arguments of fusedmm::attention_forward that are tensors, or None; the first six have gradients


def once_an_example(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of `torch.vmap` for an operator with several results."""

    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = []
        for example in range(info.batch_size):
            given = [x if dim is None else x.select(dim, example) for x, dim in zip(arguments, in_dims, strict=True)]
            results.append(operator(*given))
        stacked = tuple(torch.stack(found) for found in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


class Attention(torch.autograd.Function):
    """``fusedmm::attention_forward``; its arguments, in its order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.fusedmm.attention_forward.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        ctx.settings = inputs[TENSORS:]
        ctx.partials = "partials" in ctx.settings
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        ctx.mark_non_differentiable(output[1] if ctx.partials else output[2])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_mass: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        inputs, results = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
        upstream = (grad_output, None, grad_lse) if ctx.partials else (grad_output, grad_mass, None)
        needs = ctx.needs_input_grad
        found = _Backward.apply(*upstream, *results, needs[3], needs[4], *inputs, *ctx.settings)  # type: ignore[no-untyped-call]
        gradients = [
            g if x is not None and needed else None for g, x, needed in zip(found, inputs, needs, strict=False)
        ]
        return *gradients, *(None for _ in needs[len(gradients) :])


class _Backward(torch.autograd.Function):
    """``fusedmm::attention_backward``, which cannot be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.fusedmm.attention_backward.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("second derivatives of fusedmm's operators are not there: their backward is first_order")
