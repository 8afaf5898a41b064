"""The attention kernels by path, whatever the committed table says: how an entry of that table is decided."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from benchmarks.case import Prepared, Unavailable
from benchmarks.cases.attention_peers import Problem, prepare
from fusedmm.ops.attention import layout_arguments
from fusedmm.testing import AttentionExample

if TYPE_CHECKING:
    from fusedmm.kernels.attention.arguments import AttentionProblem

ROWS = ("log_prior", "gate", "output_gate")


def on_path(problem: Problem, *, path: Any) -> Prepared:
    """This project's kernels on one path, "portable" or "hopper", forward and backward."""
    from fusedmm.kernels.attention import select

    example = problem.example
    visibility = example.layout.visibility
    fixed = launch_problem(example)
    inputs = example.tensors["query"], example.tensors["key"]
    try:
        kernels = [select.launchers(direction, *inputs, fixed, path) for direction in ("forward", "backward")]
    except NotImplementedError as error:
        raise Unavailable(str(error)) from error

    def attention(query: Tensor, key: Tensor, value: Tensor, **others: Tensor) -> Sequence[Tensor]:
        if visibility is not None and visibility.key_order is not None:
            key, value = key[visibility.key_order], value[visibility.key_order]
        rows = [others.get(name) for name in ROWS]
        return _Kernels.apply(fixed, kernels, query, key, value, *rows)  # type: ignore[no-any-return, no-untyped-call]

    return prepare(problem, attention)


def launch_problem(example: AttentionExample) -> "AttentionProblem":
    """An example as the launchers take it."""
    from fusedmm.kernels.attention.arguments import AttentionProblem

    optional: dict[str, Any] = {name: example.tensors.get(name) for name in ("active", *ROWS)}
    return AttentionProblem(
        **layout_arguments(example.layout, example.layout.visibility),
        softmax=cast(Any, example.softmax),
        scale=example.tensors["query"].shape[-1] ** -0.5,
        **optional,
    )


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: "AttentionProblem", kernels: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        query, key, value, *rows = tensors
        problem = problem._replace(**dict(zip(ROWS, rows, strict=True)))
        forward, ctx.backward_kernels = kernels
        output, mass, lse = forward.attention_forward(query, key, value, problem)
        ctx.problem = problem
        ctx.save_for_backward(query, key, value, output, mass, lse)
        return output, mass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_mass: Tensor) -> tuple[Any, ...]:
        query, key, value, output, mass, lse = ctx.saved_tensors
        gradients = ctx.backward_kernels.attention_backward(
            grad_output,
            grad_mass if ctx.problem.softmax == "joint" else None,
            None,
            query,
            key,
            value,
            output,
            mass,
            lse,
            ctx.problem,
            needs_log_prior=ctx.problem.log_prior is not None,
            needs_gate=ctx.problem.gate is not None,
        )
        return (None, None, *gradients)
