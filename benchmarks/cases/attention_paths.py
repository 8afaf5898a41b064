"""The attention kernels by path, whatever the committed table says: how an entry of that table is decided."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Prepared, Unavailable
from benchmarks.cases.attention_peers import Problem, prepare

ROWS = ("log_prior", "gate", "output_gate")


def on_path(problem: Problem, *, path: Any) -> Prepared:
    """This project's kernels on one path, "portable" or "hopper", forward and backward."""
    from fusedmm.kernels.attention import select

    example = problem.example
    layout, query = example.layout, example.tensors["query"]
    visibility = layout.visibility
    fixed: dict[str, Any] = {
        **{name: getattr(layout, name) for name in ("cu_seqlens_q", "cu_seqlens_k", "query_tiles", "key_tiles")},
        "active": example.tensors.get("active"),
        "visible": None if visibility is None else visibility.ranges,
        "seed": None,
        "dropout_p": 0.0,
        "softmax": example.softmax,
        "scale": query.shape[-1] ** -0.5,
    }
    optional = {name: example.tensors.get(name) for name in ROWS}
    for choose in (select.choose_forward, select.choose_backward):
        try:
            choose(query, example.tensors["key"], {**fixed, **optional}, path)
        except NotImplementedError as error:
            raise Unavailable(str(error)) from error

    def attention(query: Tensor, key: Tensor, value: Tensor, **others: Tensor) -> Sequence[Tensor]:
        if visibility is not None and visibility.key_order is not None:
            key, value = key[visibility.key_order], value[visibility.key_order]
        rows = [others.get(name) for name in ROWS]
        return _Kernels.apply(partial(_arguments, fixed), path, query, key, value, *rows)  # type: ignore[no-any-return, no-untyped-call]

    return prepare(problem, attention)


def _arguments(fixed: dict[str, Any], rows: Sequence[Tensor | None]) -> dict[str, Any]:
    return {**fixed, **dict(zip(ROWS, rows, strict=True))}


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arguments: Any, path: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        from fusedmm.kernels.attention import select

        inputs, rows = tensors[:3], tensors[3:]
        output, mass, lse = select.attention_forward(*inputs, path=path, **arguments(rows))
        ctx.arguments, ctx.path = arguments, path
        ctx.save_for_backward(*tensors, output, mass, lse)
        return output, mass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_mass: Tensor) -> tuple[Any, ...]:
        from fusedmm.kernels.attention import select

        query, key, value, *rows, output, mass, lse = ctx.saved_tensors
        statistic = grad_mass if ctx.arguments(rows)["softmax"] == "joint" else None
        gradients = select.attention_backward(
            grad_output,
            statistic,
            None,
            query,
            key,
            value,
            output,
            mass,
            lse,
            path=ctx.path,
            needs_log_prior=rows[0] is not None,
            needs_gate=rows[1] is not None,
            **ctx.arguments(rows),
        )
        return (None, None, *gradients)
