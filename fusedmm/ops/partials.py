"""Everything about modalities from one pass: the output of each on its own, from which any joint output follows without
another attention.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedmm.eager.attention_inputs import Inputs
from fusedmm.impl import resolve_impl
from fusedmm.layout import ModalityLayout
from fusedmm.ops.attention import (
    AttentionOutput,
    check_active,
    check_packed,
    check_softmax,
    in_time_order,
    layout_arguments,
    resolve_visibility,
    scale_of,
    triton_gaps,
)
from fusedmm.ops.attention_op import attention
from fusedmm.ops.autocast import autocast
from fusedmm.reference import attention as reference
from fusedmm.shapes import check_broadcast, check_shapes, check_type


class ModalityPartials(NamedTuple):
    """One softmax a modality.

    Attributes:
        output: [total_q, Hq, M, D], the query's dtype, 0 where nothing of a modality is visible; differentiable.
        lse: [total_q, Hq, M] float32, natural log of the sum of exp of its scores, -inf for nothing; differentiable.
    """

    output: Tensor
    lse: Tensor


def modality_partials(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ModalityLayout,
    *,
    active: Tensor | None = None,
    query_time: Tensor | None = None,
    key_time: Tensor | None = None,
    lookback: int | Sequence[int] | Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> ModalityPartials:
    """Attend to each modality on its own, all in one pass.

    For a query, a head and modality m::

        z      = scale * (k[m] @ q)
        lse    = z.logsumexp(0)
        output = exp(z - lse) @ v[m]

    Args:
        query, key, value, layout, active, query_time, key_time, lookback, scale, impl: as in
            `fusedmm.gated_multimodal_attention`.

    Returns:
        ModalityPartials(output [total_q, Hq, M, D], lse [total_q, Hq, M]).

    Raises:
        ShapeError, TypeError, ValueError, NotImplementedError: as in `fusedmm.gated_multimodal_attention`.

    Cost: the FLOPs of one attention; the output is M times larger.
    """
    op = "modality_partials"
    query, key, value = autocast(op, query=query, key=key, value=value)
    check_packed(op, query, key, value, layout)
    active = check_active(op, active, layout, query.shape[1])
    chosen = resolve_impl(op, impl, query.device, unsupported=triton_gaps(query))
    visibility = resolve_visibility(op, layout, query_time, key_time, lookback)
    scale = scale_of(op, scale, query)
    if chosen == "reference":
        with torch.autocast(query.device.type, enabled=False):
            output, lse = reference.modality_partials(
                query, key, value, layout.with_visibility(visibility), active=active, scale=scale
            )
        return ModalityPartials(output.to(query.dtype), lse)
    key, value = in_time_order(key, value, visibility)
    x = Inputs(
        query=query,
        key=key,
        value=value,
        log_prior=None,
        gate=None,
        output_gate=None,
        active=active,
        seed=None,
        dropout_p=0.0,
        scale=scale,
        softmax="partials",
        impl=chosen,
        **layout_arguments(layout, visibility),
    )
    output, _, lse = attention(x)
    return ModalityPartials(output, lse)


def merge_modalities(
    partials: ModalityPartials, log_prior: Tensor | None = None, gate: Tensor | None = None, softmax: str = "joint"
) -> AttentionOutput:
    """Put partials together: the same as `fusedmm.gated_multimodal_attention`, without another pass over keys.

    ::

        mass   = softmax(lse + log_prior, -1)        # joint; 1 where a modality is visible under per_modality
        output = ((gate * mass)[..., None] * partials.output).sum(-2)

    Args:
        partials: of `modality_partials`.
        log_prior: broadcasts from the right to [total_q, Hq, M]; refused under per_modality, where it cancels.
        gate: broadcasts to [total_q, Hq, M].
        softmax: "joint" or "per_modality".

    Returns:
        AttentionOutput(output, mass, lse), lse with the prior added and without gradient.

    Raises:
        TypeError: where partials are no ModalityPartials.
        ShapeError: where they, log_prior or gate disagree.
        ValueError: for an unknown softmax, or a log_prior under per_modality.

    Cost: reads the partials once; ``2 * total_q * Hq * M * D`` FLOPs.
    """
    op = "merge_modalities"
    lse = _scores(op, partials, log_prior, softmax)
    mass = _shares(lse, softmax)
    weights = (
        mass
        if gate is None
        else mass * check_broadcast(op, "gate", gate, tuple(lse.shape), ("query", "head", "modality")).to(lse.dtype)
    )
    output = _weighted(weights[..., None, :], partials.output).squeeze(-2)
    return AttentionOutput(output.to(partials.output.dtype), mass, lse.detach())


def leave_one_out(
    partials: ModalityPartials, log_prior: Tensor | None = None, gate: Tensor | None = None, softmax: str = "joint"
) -> Tensor:
    """The output that each query would have had without modality m, for all m at once; differentiable.

    Under the joint softmax equal to ``(o - mass[m] * o_m) / (1 - mass[m])``, but from the other modalities' lse, so
    that ``mass[m] == 1`` gives 0 and nothing cancels. Under per_modality the sum of the others.

    Args:
        partials: of `modality_partials`.
        log_prior: broadcasts from the right to [total_q, Hq, M]; refused under per_modality, where it cancels.
        gate: broadcasts to [total_q, Hq, M], of the modalities that stay.
        softmax: "joint" or "per_modality".

    Returns:
        [total_q, Hq, M, D], the partials' dtype.

    Raises:
        TypeError: where partials are no ModalityPartials.
        ShapeError: where they, log_prior or gate disagree.
        ValueError: for an unknown softmax, or a log_prior under per_modality.

    Cost: ``2 * total_q * Hq * M**2 * D`` FLOPs, no key is read again.
    """
    lse = _scores("leave_one_out", partials, log_prior, softmax)
    modalities = lse.shape[-1]
    itself = torch.eye(modalities, dtype=torch.bool, device=lse.device)
    others = _shares(lse[..., None, :].expand(*lse.shape, modalities).masked_fill(itself, -torch.inf), softmax)
    if gate is not None:
        rows = check_broadcast("leave_one_out", "gate", gate, tuple(partials.lse.shape), ("query", "head", "modality"))
        others = others * rows.to(lse.dtype)[..., None, :]
    return _weighted(others, partials.output).to(partials.output.dtype)


def _weighted(weights: Tensor, outputs: Tensor) -> Tensor:
    """``weights @ outputs`` [..., X, D] in the weights' dtype, under autocast too: shares are not rounded."""
    with torch.autocast(weights.device.type, enabled=False):
        return weights @ outputs.to(weights.dtype)


def _scores(op: str, partials: ModalityPartials, log_prior: Tensor | None, softmax: str) -> Tensor:
    """[total_q, Hq, M]: what the modalities compete with, their lse and priors."""
    check_type(op, "partials", partials, ModalityPartials, "Pass what modality_partials gives.")
    check_softmax(op, softmax, log_prior)
    check_shapes(
        op,
        {
            "partials.lse": (partials.lse, ("query", "head", "modality")),
            "partials.output": (partials.output, ("query", "head", "modality", "dim")),
        },
    )
    if log_prior is None:
        return partials.lse
    prior = check_broadcast(op, "log_prior", log_prior, tuple(partials.lse.shape), ("query", "head", "modality"))
    return partials.lse + prior.to(partials.lse.dtype)


def _shares(lse: Tensor, softmax: str) -> Tensor:
    """Mass over the last dimension: under joint a softmax that gives zeros, and zero gradients, where everything is
    -inf; under per_modality 1 where there is something.
    """
    nothing = torch.isneginf(lse)
    if softmax == "per_modality":
        return (~nothing).to(lse.dtype)
    return torch.softmax(lse.masked_fill(nothing.all(-1, keepdim=True), 0.0), -1).masked_fill(nothing, 0.0)
