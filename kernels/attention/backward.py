"""Backward of gated multimodal attention: three passes without atomics, four for the per-modality softmax.

    rows       one number a query, head and modality: offset, shift, slope and gate; the output gate
    (delta)    per_modality only: shift_m = -slope sum_{j in m} p_j R_j, the query pass without its third product
    key_value  dk, dv: a program owns keys, of one segment or, where segments are short, of one sample
    query      dq, dgate, dlog_prior: a program owns queries; its key tiles are of one segment or, again, of one sample

The formulas stand in the modules of the passes. Recomputing scores in both costs 14 Hq D (visible pairs) FLOPs (18
with delta) against the forward's 4, and in exchange nothing is summed by two programs: gradients are bitwise
reproducible. Besides the gradients it allocates 16 Hq M bytes a padded query row and, with an output gate, one tensor
of the output's size; where few queries meet many keys (`config.key_splits`) the query pass also leaves a float32 sum
a split.
"""

import torch
from torch import Tensor

from fusedmm.kernels.attention.arguments import (
    SoftmaxKind,
    find_key_ranges,
    input_precision,
    one_hot_dtype,
    strides_of,
    unit_last_stride,
)
from fusedmm.kernels.attention.backward_key_value import _attention_backward_key_value_kernel
from fusedmm.kernels.attention.backward_key_value_spans import _attention_backward_key_value_spans_kernel
from fusedmm.kernels.attention.backward_query import _attention_backward_query_kernel
from fusedmm.kernels.attention.backward_query_spans import _attention_backward_query_spans_kernel
from fusedmm.kernels.attention.backward_rows import attention_backward_rows, grad_output_strides
from fusedmm.kernels.attention.config import (
    MAX_COLUMNS,
    _attention_backward_key_value_config,
    _attention_backward_query_config,
    _attention_spans_config,
    key_splits,
    spans_segments,
)
from fusedmm.kernels.indexing import TILE
from fusedmm.kernels.launch import device_arch, multiprocessors


def attention_backward(
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    log_prior: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    active: Tensor | None,
    visible: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    softmax: SoftmaxKind,
    scale: float,
    needs_log_prior: bool,
    needs_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward.

    Args:
        grad_output: gradient of the output (behind the output gate), in its shape; any strides.
        grad_mass: [total_q, Hq, M] float32 or None; only for the joint softmax, elsewhere mass is constant.
        grad_lse: [total_q, Hq, M] float32 or None; only for partials.
        query: with key and value as given to the forward.
        key: see query.
        value: see query.
        output: as returned by the forward, contiguous.
        mass: as returned by the forward.
        lse: as returned by the forward.
        cu_seqlens_q: this and what follows as given to the forward.
        cu_seqlens_k: see `attention_forward`.
        query_tiles: see `attention_forward`.
        key_tiles: see `attention_forward`.
        log_prior: see `attention_forward`.
        gate: see `attention_forward`.
        output_gate: see `attention_forward`.
        active: see `attention_forward`.
        visible: see `attention_forward`.
        seed: see `attention_forward`.
        dropout_p: see `attention_forward`.
        softmax: see `attention_forward`.
        scale: see `attention_forward`.
        needs_log_prior: whether to return the gradient of log_prior.
        needs_gate: whether to return the gradient of gate.

    Returns:
        Gradients of query, key, value, log_prior, gate (both [total_q, Hq, M] float32 or None) and output_gate (None
        without one).
    """
    total_q, num_heads, head_dim = query.shape
    num_key_heads = key.shape[1]
    batch = cu_seqlens_q.numel() - 1
    num_modalities = mass.shape[-1]
    query, key, value, grad_output = (unit_last_stride(x) for x in (query, key, value, grad_output))
    padded_rows = query_tiles.shape[0] * TILE.value
    key_ranges = find_key_ranges(cu_seqlens_k, active, batch, num_heads, num_modalities)
    arch = device_arch(query.device)
    row_terms, grad_gated, grad_output_gate = attention_backward_rows(
        grad_output,
        grad_mass,
        grad_lse,
        output,
        mass,
        lse,
        cu_seqlens_q=cu_seqlens_q,
        key_ranges=key_ranges,
        query_tiles=query_tiles,
        log_prior=log_prior,
        gate=gate,
        output_gate=output_gate,
        visible=visible,
        softmax=softmax,
    )
    grad_query = query.new_empty(query.shape)
    grad_key = key.new_empty(key.shape)
    grad_value = value.new_empty(value.shape)
    grad_log_prior = torch.empty_like(mass) if needs_log_prior else None
    grad_gate = torch.empty_like(mass) if needs_gate else None
    shared = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "grad_output_ptr": grad_gated,
        "row_terms_ptr": row_terms,
        "cu_seqlens_q_ptr": cu_seqlens_q,
        "key_ranges_ptr": key_ranges,
        "visible_ptr": visible,
        "seed_ptr": seed,
        "scale": scale,
        "dropout_p": dropout_p,
        **strides_of(query, "query", "qh"),
        **strides_of(key, "key", "kh"),
        **strides_of(value, "value", "kh"),
        **grad_output_strides(grad_gated),
        **strides_of(key_ranges, "key_ranges", "bhm"),
        "group_size": num_heads // num_key_heads,
        "num_modalities": num_modalities,
        "padded_rows": padded_rows,
        "HEAD_DIM": head_dim,
        "PRECISION": input_precision(query.dtype),
    }
    query_config = _attention_backward_query_config(
        head_dim, query.dtype, arch, total_q // max(batch, 1), dropout=seed is not None
    )
    block_q = query_config.blocks["BLOCK_Q"]
    splits = key_splits(total_q, key.shape[0], batch, num_heads, block_q, multiprocessors(query.device))
    total_k = key.shape[0]
    spans = spans_segments(softmax, num_modalities, total_k // max(batch * num_modalities, 1))
    query_spans = spans and splits == 1 and total_k <= MAX_COLUMNS
    if query_spans:
        query_config = _attention_spans_config("query", head_dim, query.dtype, arch, num_modalities)
        block_q = query_config.blocks["BLOCK_Q"]
    for delta_only in (True, False) if softmax == "per_modality" else (False,):
        sums = (row_terms[1],) if delta_only else (grad_query, grad_log_prior, grad_gate)
        parts = sums if splits == 1 else tuple(x if x is None else mass.new_zeros((splits, *x.shape)) for x in sums)
        query_pass = {
            **shared,
            "grad_query_ptr": None if delta_only else parts[0],
            "grad_log_prior_ptr": None if delta_only else parts[1],
            "grad_gate_ptr": None if delta_only else parts[2],
            "mass_ptr": mass,
            "shift_ptr": parts[0] if delta_only else None,
            "query_tiles_ptr": query_tiles,
            "num_heads": num_heads,
            "DELTA_ONLY": delta_only,
            **query_config.launch_options(),
        }
        grid = (padded_rows // block_q * num_heads, splits)
        if query_spans:
            del query_pass["grad_output_stride_m"]
            _attention_backward_query_spans_kernel[grid](**query_pass, ONE_HOT=one_hot_dtype(query))
        else:
            _attention_backward_query_kernel[grid](
                **query_pass,
                split_rows=None if splits == 1 else total_q * num_heads,
                IS_PARTIALS=softmax == "partials",
            )
        if splits > 1:
            for total, part in zip(sums, parts, strict=True):
                if total is not None and part is not None:
                    total.copy_(part.sum(0))
    mean_keys = total_k // max(batch if spans else batch * num_modalities, 1)
    key_value_config = _attention_backward_key_value_config(
        head_dim, query.dtype, arch, mean_keys, spans=spans, visible=visible is not None, dropout=seed is not None
    )
    block_k = key_value_config.blocks["BLOCK_K"]
    key_value = {
        **shared,
        "grad_key_ptr": grad_key,
        "grad_value_ptr": grad_value,
        "cu_seqlens_k_ptr": cu_seqlens_k,
        "num_key_heads": num_key_heads,
        "HAS_GATE": gate is not None,
        **key_value_config.launch_options(),
    }
    if spans:
        del key_value["grad_output_stride_m"]
        key_grid = ((total_k // block_k + batch) * num_key_heads,)
        _attention_backward_key_value_spans_kernel[key_grid](**key_value, batch=batch)
    else:
        key_grid = (key_tiles.shape[0] * (TILE.value // block_k) * num_key_heads,)
        _attention_backward_key_value_kernel[key_grid](**key_value, key_tiles_ptr=key_tiles)
    return grad_query, grad_key, grad_value, grad_log_prior, grad_gate, grad_output_gate
