"""Third pass of the attention backward: gradients of keys and values.

    p_ij  = exp2(scale2 q_i.k_j + offset_i)        R_ij = grad_output_i.v_j        dz_ij = p_ij (slope_i R_ij + shift_i)
    dv_j  = sum_i gate_i p_ij grad_output_i        dk_j = scale sum_i dz_ij q_i

with offset, shift, slope and gate from `backward_rows`; dropout multiplies R and the p of dv by keep / (1 - dropout_p).

A program owns BLOCK_K keys of one segment and one key head; it walks the query heads of the group and the queries of
the sample, so nothing is added by two programs and no atomics are needed. The tiles are transposed, [BLOCK_K,
BLOCK_Q], so that both products accumulate onto rows the program owns. Keys no head is active for are not read; their
gradients are 0. With visible ranges the program first finds the queries that see any of its keys.

Cost: 8 Hq D (visible pairs) FLOPs. p, dz in float32, rounded once to the inputs' dtype for the products; sums in
float32. Bitwise reproducible.
"""

import triton
import triton.language as tl

from fusedmm.kernels.attention.backward_rows import padded_row
from fusedmm.kernels.indexing import hidden_zero, keep_mask, load_rows, load_visible, load_work, store_rows
from fusedmm.kernels.softmax import LOG2_E

SCAN = tl.constexpr(512)  # queries looked at in one step when searching for those that see a key tile


@triton.jit
def _queries_that_see(
    visible_ptr, query_start, query_stop, first_key, key_stop, modality, num_modalities, BLOCK_Q: tl.constexpr
):
    """First and end of the queries that see one of the keys, from query_start on in whole blocks; in any order."""
    first = query_stop
    last = query_start
    for scan in range(query_start, query_stop, SCAN):
        rows = tl.arange(0, SCAN)
        offs_q = scan + rows
        scan_ptr = visible_ptr + tl.cast(scan, tl.int64) * num_modalities * 2
        low, high = load_visible(scan_ptr, rows, offs_q < query_stop, modality, num_modalities)
        sees = tl.maximum(low, first_key) < tl.minimum(high, key_stop)
        first = tl.minimum(first, tl.min(tl.where(sees, offs_q, 2147483647), 0))
        last = tl.maximum(last, tl.max(tl.where(sees, offs_q + 1, 0), 0))
    return query_start + (first - query_start) // BLOCK_Q * BLOCK_Q, last


@triton.jit
def _attention_backward_key_value_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_output_ptr,
    grad_key_ptr,
    grad_value_ptr,
    row_terms_ptr,
    key_tiles_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
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
    grad_output_stride_m,
    key_ranges_stride_b,
    key_ranges_stride_h,
    key_ranges_stride_m,
    num_key_heads,
    group_size,
    num_modalities,
    padded_rows,
    HEAD_DIM: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment, first_key, key_head = load_work(key_tiles_ptr, num_key_heads, BLOCK_K)
    key_stop = tl.load(cu_seqlens_k_ptr + segment + 1)
    if first_key >= key_stop:
        return
    sample = segment // num_modalities
    modality = (segment % num_modalities).to(tl.int64)
    query_start = tl.load(cu_seqlens_q_ptr + sample)
    query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    plane = num_modalities * tl.cast(padded_rows, tl.int64) * num_key_heads * group_size
    row_terms_ptr += padded_row(cu_seqlens_q_ptr, sample, query_start) + modality * padded_rows
    query_ptr += key_head * group_size * query_stride_h
    grad_output_ptr += key_head * group_size * grad_output_stride_h + modality * grad_output_stride_m
    key_ranges_ptr += (
        sample.to(tl.int64) * key_ranges_stride_b
        + key_head * group_size * key_ranges_stride_h
        + modality * key_ranges_stride_m
    )
    scale2 = scale * LOG2_E
    kept = 1.0 / (1.0 - dropout_p)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    read_stop = first_key
    for member in range(group_size):
        if tl.load(key_ranges_ptr + member * key_ranges_stride_h + 1) > tl.load(
            key_ranges_ptr + member * key_ranges_stride_h
        ):
            read_stop = key_stop
    if visible_ptr is not None:
        walk_start, walk_stop = _queries_that_see(
            visible_ptr, query_start, query_stop, first_key, read_stop, modality, num_modalities, BLOCK_Q
        )
    else:
        walk_start = query_start
        walk_stop = query_stop
    offs_k = first_key + tl.arange(0, BLOCK_K)
    # [BLOCK_K, BLOCK_D]
    key = load_rows(
        key_ptr + key_head * key_stride_h, key_stride_k, first_key, read_stop, BLOCK_K, HEAD_DIM, BLOCK_D, True
    )
    value = load_rows(
        value_ptr + key_head * value_stride_h, value_stride_k, first_key, read_stop, BLOCK_K, HEAD_DIM, BLOCK_D, True
    )
    grad_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for member in tl.range(group_size, disable_licm=True):
        head = key_head * group_size + member
        is_active = tl.load(key_ranges_ptr + member * key_ranges_stride_h + 1) > tl.load(
            key_ranges_ptr + member * key_ranges_stride_h
        )
        member_stop = tl.where(is_active, walk_stop, walk_start)
        terms_ptr = row_terms_ptr + head * num_modalities * padded_rows
        for first_query in tl.range(
            walk_start, member_stop, BLOCK_Q, disable_licm=query_ptr.dtype.element_ty != tl.float32
        ):
            terms_ptrs = terms_ptr + (first_query - query_start) + tl.arange(0, BLOCK_Q)
            offset = tl.load(terms_ptrs)
            shift = tl.load(terms_ptrs + plane)
            slope = tl.load(terms_ptrs + 2 * plane)
            # [BLOCK_Q, BLOCK_D]
            query = load_rows(
                query_ptr + member * query_stride_h,
                query_stride_q,
                first_query,
                query_stop,
                BLOCK_Q,
                HEAD_DIM,
                BLOCK_D,
                True,
            )
            # [BLOCK_K, BLOCK_Q]
            scores = tl.dot(key, query.T, input_precision=PRECISION)
            probs = tl.exp2(scores * scale2 + offset[None, :])
            grad_output = load_rows(
                grad_output_ptr + member * grad_output_stride_h,
                grad_output_stride_q,
                first_query,
                query_stop,
                BLOCK_Q,
                HEAD_DIM,
                BLOCK_D,
                True,
            )
            offs_q = first_query + tl.arange(0, BLOCK_Q)
            if visible_ptr is not None:
                low, high = load_visible(
                    visible_ptr + tl.cast(first_query, tl.int64) * num_modalities * 2,
                    tl.arange(0, BLOCK_Q),
                    offs_q < query_stop,
                    modality,
                    num_modalities,
                )
                sees = (offs_k[:, None] >= low[None, :]) & (offs_k[:, None] < high[None, :])
                probs = tl.where(sees, probs, 0.0)
            # R = v.grad_output
            grad_probs = tl.dot(value, grad_output.T, input_precision=PRECISION)
            kept_probs = probs
            if HAS_GATE:
                kept_probs = probs * tl.load(terms_ptrs + 3 * plane)[None, :]
            if seed_ptr is not None:
                keep = keep_mask(seed, dropout_p, offs_q[None, :], head, offs_k[:, None])
                kept_probs = tl.where(keep, kept_probs * kept, 0.0)
                grad_probs = tl.where(keep, grad_probs * kept, 0.0)
            grad_value = tl.dot(kept_probs.to(grad_output.dtype), grad_output, grad_value, input_precision=PRECISION)
            # dz = p (slope R + shift)
            grad_scores = probs * (grad_probs * slope[None, :] + shift[None, :])
            if visible_ptr is not None:
                grad_scores = tl.where(sees, grad_scores, 0.0)  # 0 * NaN, should the value of an invisible key be NaN
            grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    # Once more: carried through the loops they would spill.
    segment, first_key, key_head = load_work(key_tiles_ptr, num_key_heads + hidden_zero(num_key_heads), BLOCK_K)
    key_stop = tl.load(cu_seqlens_k_ptr + segment + 1)
    row_stride = num_key_heads * HEAD_DIM
    store_rows(
        grad_key_ptr + key_head * HEAD_DIM,
        row_stride,
        first_key,
        key_stop,
        grad_key * scale,
        BLOCK_K,
        HEAD_DIM,
        BLOCK_D,
    )
    store_rows(
        grad_value_ptr + key_head * HEAD_DIM, row_stride, first_key, key_stop, grad_value, BLOCK_K, HEAD_DIM, BLOCK_D
    )
