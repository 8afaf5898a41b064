"""First pass of the attention backward: what is one number a query, head and modality, and the output gate.

The later passes need, for p = exp2(scale2 q.k + offset) and R = grad_output.v,

    dz = p (slope R + shift)        dv = sum_i gate p grad_output

    slope = gate, and with delta = grad_output.output,
    joint:         offset = (log_prior - logsumexp_m lse_m) log2 e
                   shift_m = grad_mass_m - delta - sum_m grad_mass_m mass_m
    partials:      offset = (log_prior - lse_m) log2 e
                   shift_m = grad_lse_m - delta_m
    per_modality:  offset = (log_prior - lse_m) log2 e
                   shift_m = -slope sum_{j in m} p_j R_j, from the query pass (DELTA_ONLY); mass has no gradient

so one pair of kernels serves all three. ``delta`` holds for the gated output too, for sigmoid(g) grad . o = grad .
sigmoid(g) o. With an output gate

    grad_output_gate = grad_output output (1 - sigmoid(output_gate))    grad_gated = grad_output sigmoid(output_gate)

A softmax over a single key is constant: where a query sees just one, slope is 0 and shift is 0 (grad_lse_m for
partials), so that the rounding of ``output`` does not show where dz is 0. Where nothing of a modality is visible all
terms are those of padding, whatever gradient arrived there.

The terms are written as ``row_terms`` [4, Hq, M, rows] in the order offset, shift, slope, gate, padded for each
sample to tiles of 128 rows (query i of sample b is row ``(cu_seqlens_q[b] // 128 + b) * 128 + i``). Padding has
offset -inf and the others 0, so the later passes load them without masks and padded queries have p = dz = 0.

A program owns BLOCK_Q queries of one head. It streams 2 tensors of the output's size, 5 with an output gate, and 20
to 36 bytes a query, head and modality. Sums in float32; no atomics, bitwise reproducible.
"""

import triton
import triton.language as tl
from torch import Tensor

from fusedmm.kernels.attention.arguments import AttentionProblem, modality_stride, strides_of, unit_last_stride
from fusedmm.kernels.attention.config import _attention_backward_rows_config
from fusedmm.kernels.indexing import TILE, load_rows, load_visible, load_work, store_rows
from fusedmm.kernels.softmax import LN_2, LOG2_E, finite_shift


@triton.jit
def padded_row(cu_seqlens_q_ptr, sample, first_query):
    """Where a query stands in the padded rows; a multiple of 16 if it starts a block of queries."""
    sample_start = tl.load(cu_seqlens_q_ptr + sample)
    return tl.multiple_of((sample_start // TILE + sample).to(tl.int64) * TILE + (first_query - sample_start), 16)


@triton.jit
def _count_keys(range_ptr, visible_ptr, rows, seen, modality, num_modalities):
    """[BLOCK_Q] how many keys of a segment each query sees; 0 where it is not ``seen``."""
    if visible_ptr is None:
        return tl.where(seen, tl.load(range_ptr + 1) - tl.load(range_ptr), 0)
    else:
        low, high = load_visible(visible_ptr, rows, seen, modality, num_modalities)
        return high - low


@triton.jit
def _attention_backward_rows_kernel(
    output_ptr,
    grad_output_ptr,
    grad_statistic_ptr,
    output_gate_ptr,
    grad_gated_ptr,
    grad_output_gate_ptr,
    log_prior_ptr,
    gate_ptr,
    lse_ptr,
    row_terms_ptr,
    query_tiles_ptr,
    cu_seqlens_q_ptr,
    key_ranges_ptr,
    visible_ptr,
    grad_output_stride_q,
    grad_output_stride_h,
    grad_output_stride_m,
    grad_statistic_stride_q,
    grad_statistic_stride_h,
    grad_statistic_stride_m,
    output_gate_stride_q,
    output_gate_stride_h,
    log_prior_stride_q,
    log_prior_stride_h,
    log_prior_stride_m,
    gate_stride_q,
    gate_stride_h,
    gate_stride_m,
    key_ranges_stride_b,
    key_ranges_stride_h,
    key_ranges_stride_m,
    num_heads,
    num_modalities,
    padded_rows,
    HEAD_DIM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, first_query, head = load_work(query_tiles_ptr, num_heads, BLOCK_Q)
    query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    tile_start = first_query - tl.program_id(0) // num_heads % (TILE // BLOCK_Q) * BLOCK_Q
    if tile_start >= query_stop:
        return
    rows = tl.arange(0, BLOCK_Q)
    offs_q = first_query + rows
    mask_q = offs_q < query_stop
    offs_q64 = offs_q.to(tl.int64)
    offs_row = offs_q64 * num_heads + head
    plane = num_modalities * tl.cast(padded_rows, tl.int64) * num_heads
    row_terms_ptrs = (
        row_terms_ptr
        + head * num_modalities * padded_rows
        + padded_row(cu_seqlens_q_ptr, sample, first_query)
        + tl.arange(0, BLOCK_Q)
    )
    if visible_ptr is not None:
        visible_ptr += first_query.to(tl.int64) * num_modalities * 2
    grad_output_ptr += head * grad_output_stride_h
    key_ranges_ptr += sample.to(tl.int64) * key_ranges_stride_b + head * key_ranges_stride_h
    if grad_statistic_ptr is not None:
        grad_statistic_ptrs = grad_statistic_ptr + offs_q64 * grad_statistic_stride_q + head * grad_statistic_stride_h

    delta = tl.zeros([BLOCK_Q], tl.float32)
    lse = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    if SOFTMAX != "partials":
        # [BLOCK_Q, BLOCK_D]
        output = load_rows(
            output_ptr + head * HEAD_DIM,
            num_heads * HEAD_DIM,
            first_query,
            query_stop,
            BLOCK_Q,
            HEAD_DIM,
            BLOCK_D,
            True,
        ).to(tl.float32)
        grad_output = load_rows(
            grad_output_ptr, grad_output_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
        ).to(tl.float32)
        if output_gate_ptr is not None:
            output_gate_ptr += head * output_gate_stride_h
            output_gate = load_rows(
                output_gate_ptr, output_gate_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
            )
            opened = tl.sigmoid(output_gate.to(tl.float32))
            row_stride = num_heads * HEAD_DIM
            store_rows(
                grad_gated_ptr + head * HEAD_DIM,
                row_stride,
                first_query,
                query_stop,
                grad_output * opened,
                BLOCK_Q,
                HEAD_DIM,
                BLOCK_D,
            )
            grad_output_gate = grad_output * output * (1.0 - opened)
            store_rows(
                grad_output_gate_ptr + head * HEAD_DIM,
                row_stride,
                first_query,
                query_stop,
                grad_output_gate,
                BLOCK_Q,
                HEAD_DIM,
                BLOCK_D,
            )
        delta = tl.sum(grad_output * output, 1)
    keys = tl.zeros([BLOCK_Q], tl.int32)
    if SOFTMAX == "joint":
        running_sum = tl.zeros([BLOCK_Q], tl.float32)
        grad_mass_sum = tl.zeros([BLOCK_Q], tl.float32)
        for index in range(num_modalities):
            modality = tl.cast(index, tl.int64)
            lse_m = tl.load(lse_ptr + offs_row * num_modalities + modality, mask=mask_q, other=-float("inf"))
            seen = lse_m > -float("inf")
            new_max = tl.maximum(lse, lse_m)
            rescale = tl.exp2((lse - finite_shift(new_max)) * LOG2_E)
            mass = tl.exp2((lse_m - finite_shift(new_max)) * LOG2_E)
            running_sum = running_sum * rescale + mass
            lse = new_max
            if grad_statistic_ptr is not None:
                grad_mass_ptrs = grad_statistic_ptrs + modality * grad_statistic_stride_m
                grad_mass_sum = grad_mass_sum * rescale + mass * tl.load(grad_mass_ptrs, mask=seen, other=0.0)
            range_ptr = key_ranges_ptr + modality * key_ranges_stride_m
            keys += _count_keys(range_ptr, visible_ptr, rows, seen, modality, num_modalities)
        running_sum = tl.where(running_sum > 0.0, running_sum, 1.0)
        normaliser = lse.to(tl.float64) + tl.log2(running_sum) * LN_2
        delta += grad_mass_sum / running_sum
    for index in range(num_modalities):
        modality = tl.cast(index, tl.int64)
        lse_m = tl.load(lse_ptr + offs_row * num_modalities + modality, mask=mask_q, other=-float("inf"))
        seen = lse_m > -float("inf")
        if SOFTMAX != "joint":
            normaliser = lse_m.to(tl.float64)
            range_ptr = key_ranges_ptr + modality * key_ranges_stride_m
            keys = _count_keys(range_ptr, visible_ptr, rows, seen, modality, num_modalities)
        # In float64: what is rounded here is a factor on every probability of the row.
        offset = -normaliser
        if log_prior_ptr is not None:
            prior_ptrs = log_prior_ptr + offs_q64 * log_prior_stride_q + head * log_prior_stride_h
            offset += tl.load(prior_ptrs + modality * log_prior_stride_m, mask=seen, other=0.0)
        offset = (offset * LOG2_E).to(tl.float32)
        if SOFTMAX == "partials":
            row_stride = num_heads * num_modalities * HEAD_DIM
            output_m_ptr = output_ptr + (head * num_modalities + modality) * HEAD_DIM
            output = load_rows(output_m_ptr, row_stride, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
            grad_m_ptr = grad_output_ptr + modality * grad_output_stride_m
            grad_output = load_rows(
                grad_m_ptr, grad_output_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
            )
            delta = tl.where(keys > 1, tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1), 0.0)
        shift = -delta
        if grad_statistic_ptr is not None:
            shift += tl.load(grad_statistic_ptrs + modality * grad_statistic_stride_m, mask=seen, other=0.0)
        gate = tl.full([BLOCK_Q], 1.0, tl.float32)
        if gate_ptr is not None:
            gate_ptrs = gate_ptr + offs_q64 * gate_stride_q + head * gate_stride_h + modality * gate_stride_m
            gate = tl.load(gate_ptrs, mask=seen, other=0.0)
        terms_ptrs = row_terms_ptrs + modality * padded_rows
        tl.store(terms_ptrs, tl.where(seen, offset, -float("inf")))
        varies = seen & (keys > 1)
        tl.store(terms_ptrs + plane, tl.where(seen if SOFTMAX == "partials" else varies, shift, 0.0))
        tl.store(terms_ptrs + 2 * plane, tl.where(varies, gate, 0.0))
        tl.store(terms_ptrs + 3 * plane, tl.where(seen, gate, 0.0))


def attention_backward_rows(
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    key_ranges: Tensor,
    problem: AttentionProblem,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the first pass of the backward, which the portable kernels share with Hopper's.

    Args:
        grad_output: this and what follows as in `attention_backward`; its last stride is 1.
        grad_mass: see grad_output.
        grad_lse: see grad_output.
        output: see grad_output.
        mass: see grad_output.
        lse: see grad_output.
        key_ranges: [B, Hq, M, 2] int32, those of the problem.
        problem: see grad_output.

    Returns:
        row_terms [4, Hq, M, padded rows] float32, the gradient of the output before its gate, and that of the gate's
        logits (None without a gate).
    """
    _, num_heads, num_modalities = mass.shape
    head_dim = output.shape[-1]
    padded_rows = problem.query_tiles.shape[0] * TILE.value
    row_terms = mass.new_empty((4, num_heads, num_modalities, padded_rows))
    output_gate, grad_gated, grad_output_gate = None, grad_output, None
    if problem.output_gate is not None:
        output_gate = unit_last_stride(problem.output_gate)
        grad_gated = output.new_empty(output.shape)
        grad_output_gate = output_gate.new_empty(output.shape)
    grad_statistic = {"joint": grad_mass, "partials": grad_lse, "per_modality": None}[problem.softmax]
    config = _attention_backward_rows_config(head_dim)
    _attention_backward_rows_kernel[(padded_rows // config.blocks["BLOCK_Q"] * num_heads,)](
        output_ptr=output,
        grad_output_ptr=grad_output,
        grad_statistic_ptr=grad_statistic,
        output_gate_ptr=output_gate,
        grad_gated_ptr=None if output_gate is None else grad_gated,
        grad_output_gate_ptr=grad_output_gate,
        log_prior_ptr=problem.log_prior,
        gate_ptr=problem.gate,
        lse_ptr=lse,
        row_terms_ptr=row_terms,
        query_tiles_ptr=problem.query_tiles,
        cu_seqlens_q_ptr=problem.cu_seqlens_q,
        key_ranges_ptr=key_ranges,
        visible_ptr=problem.visible,
        **strides_of(grad_output, "grad_output", "qh"),
        grad_output_stride_m=modality_stride(grad_output),
        **strides_of(grad_statistic, "grad_statistic", "qhm"),
        **strides_of(output_gate, "output_gate", "qh"),
        **strides_of(problem.log_prior, "log_prior", "qhm"),
        **strides_of(problem.gate, "gate", "qhm"),
        **strides_of(key_ranges, "key_ranges", "bhm"),
        num_heads=num_heads,
        num_modalities=num_modalities,
        padded_rows=padded_rows,
        HEAD_DIM=head_dim,
        SOFTMAX=problem.softmax,
        **config.launch_options(),
    )
    return row_terms, grad_gated, grad_output_gate
