"""gated_multimodal_attention: one fused attention over all modalities with learned priors and gates.

Data flow: checks here -> `layout.visibility` for times -> the registered operator (Triton or eager), or the reference.
"""

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedmm.eager import attention_plain
from fusedmm.eager.attention_inputs import Inputs
from fusedmm.eager.products import cast, compute_dtype
from fusedmm.impl import resolve_impl
from fusedmm.layout import ModalityLayout
from fusedmm.ops.attention_op import attention
from fusedmm.ops.autocast import autocast
from fusedmm.ops.signatures import Passed, Signature, signature
from fusedmm.reference import attention as reference
from fusedmm.shapes import (
    FLOATS,
    ShapeError,
    as_number,
    check_broadcast,
    check_device,
    check_dtype,
    check_shapes,
    check_type,
)
from fusedmm.visibility import Visibility, find_visible

OP = "gated_multimodal_attention"
SOFTMAXES = ("joint", "per_modality")
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
_PASSED: Passed[str] = Passed()


class AttentionOutput(NamedTuple):
    """What one attention pass gives; mass and lse are empty, [0], with ``need_mass=False``.

    Attributes:
        output: [total_q, Hq, D], the query's dtype.
        mass: [total_q, Hq, M] float32, the share of attention that each modality got; differentiable.
        lse: [total_q, Hq, M] float32, natural log of the sum of exp of each modality's scores, -inf for nothing; not
            differentiable.
    """

    output: Tensor
    mass: Tensor
    lse: Tensor


def gated_multimodal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ModalityLayout,
    *,
    log_prior: Tensor | None = None,
    gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    active: Tensor | None = None,
    query_time: Tensor | None = None,
    key_time: Tensor | None = None,
    lookback: int | Sequence[int] | Tensor | None = None,
    softmax: str = "joint",
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
    need_mass: bool = True,
) -> AttentionOutput:
    """Attend over the keys of all modalities at once, weighing each modality by a prior and a gate.

    For a query and head, over the visible keys j of modality m(j)::

        z      = scale * (k @ q) + log_prior[m]
        lse    = stack([z[m == i].logsumexp(0) for i in range(M)])
        P      = exp(z - lse.logsumexp(0))           # softmax="joint"
        P      = exp(z - lse[m])                     # softmax="per_modality"
        mass   = stack([P[m == i].sum() for i in range(M)])
        output = sigmoid(output_gate) * ((gate[m] * P) @ v)

    What sees nothing gives output 0, mass 0 and lse -inf, never NaN. Half-precision inputs are multiplied as they are
    and accumulated in float32. Under autocast query, key, value and output_gate are cast to the autocast dtype,
    log_prior and gate to float32. Deterministic: two runs agree bit for bit. Differentiable once: the backward of a
    gradient is refused.

    NaN stays in its sample, and what is not active is never read. But what times hide from some queries and not from
    others is multiplied by 0, and 0 * NaN is NaN: a key or value of NaN or inf may reach queries, and gradients, that
    do not see it. Triton's kernels multiply by 0 also keys that no query sees between those that are seen, and, in
    gradients of keys, queries that see nothing. Leave such tokens out, or fill them.

    Triton's backward makes P again from a float32 lse, whose rounding shows in float32 gradients of sharp softmaxes;
    half precision rounds its inputs by far more. Where scores have a standard deviation of 100, the value's errs by
    2e-5 of its norm (plain PyTorch's by 2e-6), those of query and key as plain PyTorch's, under per_modality 10 times
    as much; at 1000 these, then nearly 0, keep two digits or none. impl="eager" is as exact as plain PyTorch, or as its
    fused attention where ``need_mass`` is False: that makes P again, and of a single key it is no exact 1.

    Args:
        query: [total_q, Hq, D] float16, bfloat16 or float32 (float64 too for "eager" and "reference"), D 16 to 256.
        key: [total_k, Hkv, D], the query's dtype; Hq is a multiple of Hkv.
        value: [total_k, Hkv, D].
        layout: where samples and modalities lie; with `ModalityLayout.at_times` it also holds times.
        log_prior: broadcasts from the right to [total_q, Hq, M] float32, added to every score of a modality: natural
            log of the trust beforehand; -inf hides it.
        gate: broadcasts to [total_q, Hq, M] float32, any sign, multiplies what a modality contributes after the
            softmax.
        output_gate: broadcasts to [total_q, Hq, D], logits: the output is multiplied by their sigmoid.
        active: [B, M] or [B, Hq, M] bool; False: as if the segment were empty, its keys are never read.
        query_time: [total_q] int64; key j is visible to query i only if ``0 <= query_time[i] - key_time[j]``, and ``<
            lookback``.
        key_time: [total_k] int64. On a GPU times given here cost a sort and a gather of keys and values a call;
            `ModalityLayout.at_times` avoids both for sorted keys.
        lookback: int or [M] int64, half-open window in the unit of the times; None: unbounded.
        softmax: "joint" over the union of the modalities, or "per_modality", one for each (log_prior is refused there:
            it would cancel).
        scale: multiplies the scores; None: D ** -0.5.
        dropout_p: probability of dropping a P after mass is taken, survivors are divided by ``1 - dropout_p``. Depends
            on (seed, query, head, key) only; unsorted keys with times are counted in the order of time.
        impl: "auto" (Triton on CUDA, eager elsewhere), "triton", "eager" or "reference". No silent fallback.
        need_mass: False where only the output is read: mass and lse are empty then, [0]. The kernels have them for
            free; the eager path, if nothing else about modalities is given, takes PyTorch's fused attention.

    Returns:
        AttentionOutput(output, mass, lse).

    Raises:
        ShapeError: shapes that disagree, among themselves or with the layout.
        TypeError: wrong dtypes, float times among them; a layout that is no ModalityLayout.
        ValueError: bad values, such as a log_prior beside softmax="per_modality".
        NotImplementedError: no Triton kernel for this call, with all reasons.

    Cost: ``4 * Hq * D`` FLOPs a visible (query, key) pair forward; backward 2.5 times that (eager; 3.2 times for long
    segments under per_modality) or 3.5 times (Triton, which computes the scores twice; 4.5 under per_modality). Saved
    for the backward: inputs, output, and mass and lse [total_q, Hq, M]; never a [query, key] matrix, but of a problem
    so small that, on a CPU, all it computes with is within 1 MiB.

    Source: online softmax of Milakov and Gimelshein 2018; tiling of Dao et al. 2022, "FlashAttention"; output gate of
    Qiu et al. 2025, "Gated attention for LLMs".
    """
    given = query, key, value, log_prior, gate, output_gate, active
    call = _signature(given, layout, softmax, dropout_p, impl)
    chosen = _PASSED.get(call)
    has_passed = chosen is not None
    if chosen is None:
        checked, chosen = _check(*given, layout, softmax, dropout_p, impl)
        query, key, value, log_prior, gate, output_gate, active = checked
        if all(map(is_, checked, given)) and (chosen != "triton" or query.is_cuda):
            _PASSED.remember(call, chosen)
    dropout_p = float(dropout_p)
    visibility = resolve_visibility(OP, layout, query_time, key_time, lookback)
    scale = scale_of(OP, scale, query)
    asks_nothing = not need_mass and softmax == "joint" and all(t is None for t in (*given[3:], visibility))
    if asks_nothing and chosen == "eager" and not dropout_p and call is not None:
        bounds = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.num_modalities
        output = attention_plain.attend(query, key, value, *bounds, scale)
        if output is not None:
            return _alone(output)
    seed = torch.randint(2**62, (1,), device=query.device) if dropout_p else None
    if chosen == "reference":
        with torch.autocast(query.device.type, enabled=False):
            result = reference.gated_multimodal_attention(
                query,
                key,
                value,
                layout.with_visibility(visibility),
                log_prior=log_prior,
                gate=gate,
                output_gate=output_gate,
                active=active,
                softmax=softmax,
                scale=scale,
                seed=seed,
                dropout_p=dropout_p,
            )
        output = result[0].to(query.dtype)
        return AttentionOutput(output, result[1], result[2].detach()) if need_mass else _alone(output)
    key, value = in_time_order(key, value, visibility)
    x = Inputs(
        query=query,
        key=key,
        value=value,
        log_prior=log_prior,
        gate=gate,
        output_gate=output_gate,
        active=active,
        seed=seed,
        dropout_p=dropout_p,
        scale=scale,
        softmax=softmax,
        impl=chosen,
        **layout_arguments(layout, visibility),
    )
    results = attention(x, is_unwatched=has_passed and query_time is None)
    return AttentionOutput(*results) if need_mass else _alone(results[0])


def _alone(output: Tensor) -> AttentionOutput:
    """Of who asks for no mass."""
    nothing = cast(output.new_empty(0), compute_dtype(output))
    return AttentionOutput(output, nothing, nothing)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_prior: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    active: Tensor | None,
    layout: ModalityLayout,
    softmax: str,
    dropout_p: float,
    impl: str,
) -> tuple[tuple[Any, ...], str]:
    """The tensors in the dtypes and shapes of the operators, and the implementation that runs."""
    check_softmax(OP, softmax, log_prior)
    dropout_p = as_number(OP, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{OP}: dropout_p must be in [0, 1), got {dropout_p}.")
    query, key, value = autocast(OP, query=query, key=key, value=value)
    check_packed(OP, query, key, value, layout)
    rows = (layout.total_q, query.shape[1], layout.num_modalities)
    log_prior = _per_modality_rows("log_prior", log_prior, rows, query)
    gate = _per_modality_rows("gate", gate, rows, query)
    output_gate = None if output_gate is None else _gate_logits(autocast(OP, output_gate=output_gate)[0], query)
    active = check_active(OP, active, layout, query.shape[1])
    check_device(
        OP,
        {
            "query": query,
            "layout": layout.cu_seqlens_q,
            "log_prior": log_prior,
            "gate": gate,
            "output_gate": output_gate,
            "active": active,
        },
    )
    chosen = resolve_impl(OP, impl, query.device, unsupported=triton_gaps(query))
    return (query, key, value, log_prior, gate, output_gate, active), chosen


def _signature(tensors: Sequence[Tensor | None], layout: ModalityLayout, *numbers: Any) -> Signature | None:
    """All that the checks look at, and numbers that are one each."""
    if type(layout) is not ModalityLayout:
        return None
    sizes = layout.total_q, layout.total_k, layout.num_modalities
    return signature((*tensors, layout.cu_seqlens_q), (*sizes, *numbers))


def check_packed(op: str, query: Tensor, key: Tensor, value: Tensor, layout: ModalityLayout) -> None:
    """Shapes, dtypes and devices of packed query, key and value, and that they come with a layout."""
    check_type(op, "layout", layout, ModalityLayout, "Build one with ModalityLayout.from_lengths or from_masks.")
    check_shapes(
        op,
        {
            "query": (query, ("query", "head", "dim")),
            "key": (key, ("key", "kv_head", "dim")),
            "value": (value, ("key", "kv_head", "dim")),
        },
        {"query": layout.total_q, "key": layout.total_k},
    )
    check_dtype(op, "query", query, FLOATS, ". Use query.to(torch.bfloat16).")
    for argument, tensor in (("key", key), ("value", value)):
        check_dtype(
            op, argument, tensor, (query.dtype,), f". All three share one dtype; use {argument}.to({query.dtype})."
        )
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ShapeError(f"{op}: query heads must be a multiple of key heads, at least 1, got {heads} and {kv_heads}.")
    if dim < MIN_HEAD_DIM or dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"{op}: head dim must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {dim}. Split or pad the heads."
        )
    check_device(op, {"query": query, "key": key, "value": value, "layout": layout.cu_seqlens_q})


def check_active(op: str, active: Tensor | None, layout: ModalityLayout, heads: int) -> Tensor | None:
    """Expand ``active`` to [B, Hq, M], a view."""
    if active is None:
        return None
    check_dtype(op, "active", active, (torch.bool,), ". False switches a segment off; use active.bool().")
    if active.ndim not in (2, 3):
        raise ShapeError(
            f"{op}: active must be [batch, modality] or [batch, head, modality], got shape {list(active.shape)}."
        )
    dims = ("batch", "modality") if active.ndim == 2 else ("batch", "head", "modality")
    check_shapes(
        op, {"active": (active, dims)}, {"batch": layout.batch_size, "head": heads, "modality": layout.num_modalities}
    )
    return active if active.ndim == 3 else active[:, None].expand(-1, heads, -1)


def triton_gaps(query: Tensor) -> list[str]:
    """Why no Triton kernel takes this query; empty where one does."""
    return (
        []
        if query.dtype in HALF_OR_SINGLE
        else [f"dtype {str(query.dtype).removeprefix('torch.')} (float16, bfloat16 and float32 have kernels)"]
    )


def scale_of(op: str, scale: float | None, query: Tensor) -> float:
    """What multiplies the scores; ``ValueError`` for NaN, a factor that MKL's products leave out."""
    if scale is None:
        return float(query.shape[2] ** -0.5)
    number = as_number(op, "scale", scale)
    if number != number:
        raise ValueError(f"{op}: scale must be a number, got nan.")
    return number


def resolve_visibility(
    op: str,
    layout: ModalityLayout,
    query_time: Tensor | None,
    key_time: Tensor | None,
    lookback: int | Sequence[int] | Tensor | None,
) -> Visibility | None:
    """Times of this call, or those of the layout."""
    if (query_time is None) != (key_time is None):
        raise ValueError(
            f"{op}: query_time and key_time must be given together, got only "
            f"{'key_time' if query_time is None else 'query_time'}."
        )
    if query_time is None or key_time is None:
        if lookback is not None:
            raise ValueError(
                f"{op}: lookback needs query_time and key_time, got lookback alone. Give it to layout.at_times, "
                "or pass the times."
            )
        return layout.visibility
    return find_visible(op, layout, query_time, key_time, lookback, wait=False)


def in_time_order(key: Tensor, value: Tensor, visibility: Visibility | None) -> tuple[Tensor, Tensor]:
    """Keys and values sorted by time within their segments, where they are not so already."""
    if visibility is None or visibility.key_order is None:
        return key, value
    return key.index_select(0, visibility.key_order), value.index_select(0, visibility.key_order)


def layout_arguments(layout: ModalityLayout, visibility: Visibility | None) -> dict[str, Any]:
    """What the registered operators take of a layout."""
    return {
        "cu_seqlens_q": layout.cu_seqlens_q,
        "cu_seqlens_k": layout.cu_seqlens_k,
        "query_tiles": layout.query_tiles,
        "key_tiles": layout.key_tiles,
        "num_modalities": layout.num_modalities,
        "visible": None if visibility is None else visibility.ranges,
    }


def check_softmax(op: str, softmax: str, log_prior: Tensor | None) -> None:
    """Complain with ``ValueError`` about an unknown softmax, or a prior where it would cancel."""
    if softmax not in SOFTMAXES:
        raise ValueError(f'{op}: softmax must be "joint" or "per_modality", got {softmax!r}.')
    if softmax == "per_modality" and log_prior is not None:
        raise ValueError(
            f'{op}: log_prior must be None with softmax="per_modality", where it cancels, got a tensor. Use gate, '
            'or softmax="joint".'
        )


def _gate_logits(output_gate: Tensor, query: Tensor) -> Tensor:
    """The output gate in the query's shape and dtype."""
    check_dtype(OP, "output_gate", output_gate, (query.dtype, torch.float32), f". Use output_gate.to({query.dtype}).")
    dims = ("query", "head", "dim")
    return check_broadcast(OP, "output_gate", output_gate, tuple(query.shape), dims).to(query.dtype)


def _per_modality_rows(
    argument: str, tensor: Tensor | None, shape: tuple[int, int, int], query: Tensor
) -> Tensor | None:
    if tensor is None:
        return None
    check_dtype(OP, argument, tensor, FLOATS, f". Use {argument}.to(torch.float32).")
    return check_broadcast(OP, argument, tensor, shape, ("query", "head", "modality")).to(compute_dtype(query))
