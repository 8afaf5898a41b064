"""The attention under the transforms of `torch.func`: the operators of `fusedmm.ops.attention_op` as autograd functions
that `grad`, `vjp`, `jacrev` and `vmap` can take apart.

A transform wants everything that is saved to be an input or an output, so what a small problem would keep for its
backward is computed again. `vmap` calls the operators once for each example.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedmm.eager.attention_inputs import TENSORS, Inputs
from fusedmm.ops.first_order import NO_SECOND_DERIVATIVES


def sequential_vmap(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of `torch.vmap` for an operator with several results: a call for each example."""

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
        ctx.is_partials = Inputs(*inputs).softmax == "partials"
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        ctx.mark_non_differentiable(output[1] if ctx.is_partials else output[2])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_mass: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        inputs, results = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
        upstream = (grad_output, None, grad_lse) if ctx.is_partials else (grad_output, grad_mass, None)
        needs = ctx.needs_input_grad
        found = _Backward.apply(*upstream, *results, needs[3], needs[4], *inputs, *ctx.settings)  # type: ignore[no-untyped-call]
        gradients = [g if needed else None for g, needed in zip(found, needs, strict=False)]
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
        raise RuntimeError(NO_SECOND_DERIVATIVES)
