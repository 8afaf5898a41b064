"""Second pass of the attention backward where segments are much shorter than a tile: key tiles span modalities.

The formulas are those of `backward_query`. Offset, shift and slope, there one number a row of a tile, are one a pair
here, by products with the one-hot matrix of `spans`, as is the sum of p R for each modality:

    p = exp2(scale2 q.k + offset one_hot)      dz = p ((slope one_hot) R + shift one_hot)      dgate = (p R) one_hot^T

With DELTA_ONLY the pass before it that the per-modality softmax needs. Partials, whose gradient of the output
differs by modality, stay with `backward_query`, and so do splits, which share out the tiles of segments.

Counted as in `forward_spans`, without visible ranges, tiles of 32 keys here:

    8 modalities of 5 keys:        2 tiles for 8,       800 instructions for 1816
    25 modalities of 5 keys:       4 tiles for 25,      1784 for 5675
    8 modalities of 1 to 64 keys:  8.6 tiles for 11.8,  3440 for 2685

Cost: Hq (6 D + 18 BLOCK_M) (pairs) FLOPs: three parts of offset, two each of slope, shift and p R. Precision as in
`backward_query`; 16-bit inputs have slope, shift and the sums within 2^-16. Bitwise reproducible.
"""

import triton
import triton.language as tl

from fusedmm.kernels.attention.backward_rows import padded_row
from fusedmm.kernels.attention.spans import (
    HIDDEN,
    add_product,
    find_keys,
    gather_rows,
    lay_out_keys,
    sees_columns,
    spread,
)
from fusedmm.kernels.indexing import keep_mask, load_rows, load_work, store_rows
from fusedmm.kernels.softmax import LOG2_E


@triton.jit
def _attention_backward_query_spans_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_output_ptr,
    grad_query_ptr,
    grad_log_prior_ptr,
    grad_gate_ptr,
    mass_ptr,
    row_terms_ptr,
    shift_ptr,
    query_tiles_ptr,
    cu_seqlens_q_ptr,
    key_ranges_ptr,
    visible_ptr,
    seed_ptr,
    scale,
    dropout_p,
    query_stride_q,
    query_stride_h,
    key_stride_k,
    key_stride_h,
    value_stride_k,
    value_stride_h,
    grad_output_stride_q,
    grad_output_stride_h,
    key_ranges_stride_b,
    key_ranges_stride_h,
    key_ranges_stride_m,
    num_heads,
    group_size,
    num_modalities,
    padded_rows,
    HEAD_DIM: tl.constexpr,
    DELTA_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_HOT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    SUMS: tl.constexpr = DELTA_ONLY or (grad_gate_ptr is not None) or (grad_log_prior_ptr is not None)
    sample, first_query, head = load_work(query_tiles_ptr, num_heads, BLOCK_Q)
    query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    if first_query >= query_stop:
        return
    rows = tl.arange(0, BLOCK_Q)
    offs_q = first_query + rows
    mask_q = offs_q < query_stop
    # [BLOCK_Q, BLOCK_D]
    query_ptr += head * query_stride_h
    query = load_rows(query_ptr, query_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
    grad_output_ptr += head * grad_output_stride_h
    grad_output = load_rows(
        grad_output_ptr, grad_output_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
    )
    key_ptr += head // group_size * key_stride_h
    value_ptr += head // group_size * value_stride_h
    key_ranges_ptr += sample.to(tl.int64) * key_ranges_stride_b + head * key_ranges_stride_h
    scale2 = scale * LOG2_E
    kept = 1.0 / (1.0 - dropout_p)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # [BLOCK_Q, BLOCK_M], as all that is one number a query and modality
    offs_m = tl.arange(0, BLOCK_M)[None, :]
    mask_m = offs_m < num_modalities
    mask = mask_q[:, None] & mask_m
    plane = num_modalities * tl.cast(padded_rows, tl.int64) * num_heads
    first_term = head * num_modalities * padded_rows + padded_row(cu_seqlens_q_ptr, sample, first_query)
    offs_term = offs_m.to(tl.int64) * padded_rows + rows[:, None]
    row_terms_ptr += first_term
    offset = tl.load(row_terms_ptr + offs_term, mask=mask_m, other=-float("inf"))
    slope = tl.load(row_terms_ptr + 2 * plane + offs_term, mask=mask_m, other=0.0)
    if not DELTA_ONLY:
        shift = tl.load(row_terms_ptr + plane + offs_term, mask=mask_m, other=0.0)
    low = None
    high = None
    if visible_ptr is not None:
        visible_ptr += first_query.to(tl.int64) * num_modalities * 2
        visible_ptrs = visible_ptr + (rows[:, None] * num_modalities + offs_m) * 2
        low = tl.load(visible_ptrs, mask=mask, other=0)
        high = tl.load(visible_ptrs + 1, mask=mask, other=0)
    column_start, column_stop, key_shift, columns = lay_out_keys(
        key_ranges_ptr, key_ranges_stride_m, tl.max(offset, 0) == -float("inf"), low, high, mask, num_modalities
    )
    if visible_ptr is not None:
        low = (low - key_shift[None, :]).to(tl.float32)
        high = (high - key_shift[None, :]).to(tl.float32)
    offset = tl.maximum(offset, HIDDEN)

    grad_query = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    grad_gate = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    for first_column in tl.range(0, columns, BLOCK_K):
        offs_c = first_column + tl.arange(0, BLOCK_K)
        mask_c = offs_c < columns
        one_hot, offs_k = find_keys(offs_c, column_start, column_stop, key_shift, ONE_HOT)
        # [BLOCK_K, BLOCK_D]
        key = gather_rows(key_ptr, key_stride_k, offs_k, mask_c, HEAD_DIM, BLOCK_D)
        value = gather_rows(value_ptr, value_stride_k, offs_k, mask_c, HEAD_DIM, BLOCK_D)
        # [BLOCK_Q, BLOCK_K]
        sees = mask_c[None, :]
        if visible_ptr is not None:
            sees = sees_columns(low, high, first_column, one_hot)
        bias = tl.where(sees, spread(offset, one_hot, 3), HIDDEN)
        scores = tl.dot(query, key.T, input_precision=PRECISION)
        probs = tl.exp2(scores * scale2 + bias)
        # R = grad_output.v
        grad_probs = tl.dot(grad_output, value.T, input_precision=PRECISION)
        if seed_ptr is not None:
            keep = keep_mask(seed, dropout_p, offs_q[:, None], head, offs_k[None, :])
            grad_probs = tl.where(keep, grad_probs * kept, 0.0)
        if SUMS:
            grad_gate = add_product(grad_gate, probs * grad_probs, one_hot.T, 2)
        if not DELTA_ONLY:
            # dz = p (slope R + shift)
            grad_scores = probs * (grad_probs * spread(slope, one_hot, 2) + spread(shift, one_hot, 2))
            grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)

    tl.debug_barrier()  # loaded anew, for Triton would keep them in registers through the loop
    slope = tl.load(row_terms_ptr + 2 * plane + offs_term, mask=mask_m, other=0.0)
    if DELTA_ONLY:
        tl.store(shift_ptr + first_term + offs_term, -slope * grad_gate, mask=mask_m)
    else:
        first_row = (first_query.to(tl.int64) * num_heads + head) * num_modalities
        offs_qm = first_row + rows[:, None] * (num_heads * num_modalities) + offs_m
        if grad_gate_ptr is not None:
            tl.store(grad_gate_ptr + offs_qm, grad_gate, mask=mask)
        if grad_log_prior_ptr is not None:
            mass = tl.load(mass_ptr + offs_qm, mask=mask, other=0.0)
            shift = tl.load(row_terms_ptr + plane + offs_term, mask=mask_m, other=0.0)
            grad_log_prior = slope * grad_gate + shift * mass
            grad_log_prior -= mass * tl.sum(grad_log_prior, 1)[:, None]
            tl.store(grad_log_prior_ptr + offs_qm, grad_log_prior, mask=mask)
        store_rows(
            grad_query_ptr + head * HEAD_DIM,
            num_heads * HEAD_DIM,
            first_query,
            query_stop,
            grad_query * scale,
            BLOCK_Q,
            HEAD_DIM,
            BLOCK_D,
        )
