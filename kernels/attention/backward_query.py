"""Second pass of the attention backward: gradients of queries, gates and priors.

    p_ij = exp2(scale2 q_i.k_j + offset_i)       R_ij = grad_output_i.v_j        dz_ij = p_ij (slope_i R_ij + shift_i)
    dq_i = scale sum_j dz_ij k_j                 dgate_i,m = sum_{j in m} p_ij R_ij
    dlog_prior_i,m = sum_{j in m} dz_ij = slope dgate + shift mass - mass sum_m (slope dgate + shift mass)

The last sum is 0 but for rounding: a prior common to all modalities changes nothing. What it is instead stems from the
rounding of lse, a factor that every p of the row and dgate share but mass has not; so it is taken back.

with offset, shift and slope from `backward_rows`; dropout multiplies R by keep / (1 - dropout_p).

A program owns BLOCK_Q queries of one sample and one head and walks the segments in the same pieces as the forward.
DELTA_ONLY is the pass that the per-modality softmax needs before this one: it takes only dgate, two of the three
products, and writes shift = -slope dgate into ``row_terms``. As in the forward, the grid's second dimension shares out
the keys where few queries meet many; every result is a sum over keys, so the launcher adds the splits up, in order.

Cost: 6 Hq D (visible pairs) FLOPs, 4 with DELTA_ONLY. p, R and dz in float32, dz rounded once to key's dtype for its
product; sums in float32. Bitwise reproducible.
"""

import triton
import triton.language as tl

from fusedmm.kernels.attention.backward_rows import padded_row
from fusedmm.kernels.indexing import (
    hidden_zero,
    keep_mask,
    load_rows,
    load_work,
    segment_range,
    split_range,
    store_rows,
    take_split,
)
from fusedmm.kernels.softmax import LOG2_E


@triton.jit
def _walk_keys(
    grad_query,  # [BLOCK_Q, BLOCK_D]
    grad_gate,  # [BLOCK_Q]
    query,  # [BLOCK_Q, BLOCK_D]
    grad_output,  # [BLOCK_Q, BLOCK_D]
    key_ptr,
    value_ptr,
    key_stride_k,
    value_stride_k,
    start,
    stop,
    skip_start,  # or None
    skip_stop,
    key_stop,
    scale2,
    offset,  # [BLOCK_Q], base 2
    shift,  # [BLOCK_Q]
    slope,  # [BLOCK_Q]
    low,  # [BLOCK_Q] or None
    high,
    offs_q,
    head,
    seed,  # or None
    dropout_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTIAL: tl.constexpr,
    DELTA_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the tiles of ``start : stop`` without ``skip_start : skip_stop``.

    With ``low : high`` only the keys each row sees; if PARTIAL, only those before ``key_stop``.
    """
    BLOCK_D: tl.constexpr = query.shape[1]
    skipped = 0
    if skip_start is not None:
        skipped = skip_stop - skip_start
    for step in tl.range(start, stop - skipped, BLOCK_K, disable_licm=BLOCK_D > 64 and query.dtype != tl.float32):
        first_key = step
        if skip_start is not None:
            first_key = tl.where(step < skip_start, step, step + skipped)
        offs_k = first_key + tl.arange(0, BLOCK_K)
        # [BLOCK_K, BLOCK_D]
        key = load_rows(key_ptr, key_stride_k, first_key, key_stop, BLOCK_K, HEAD_DIM, BLOCK_D, PARTIAL)
        value = load_rows(value_ptr, value_stride_k, first_key, key_stop, BLOCK_K, HEAD_DIM, BLOCK_D, PARTIAL)
        # [BLOCK_Q, BLOCK_K]
        scores = tl.dot(query, key.T, input_precision=PRECISION)
        probs = tl.exp2(scores * scale2 + offset[:, None])
        # After exp2: a masked score of 0 may overflow where lse is very negative.
        if low is not None:
            sees = (offs_k[None, :] >= low[:, None]) & (offs_k[None, :] < high[:, None])
            probs = tl.where(sees, probs, 0.0)
        elif PARTIAL:
            probs = tl.where((offs_k < key_stop)[None, :], probs, 0.0)
        # R = grad_output.v
        grad_probs = tl.dot(grad_output, value.T, input_precision=PRECISION)
        if seed is not None:
            keep = keep_mask(seed, dropout_p, offs_q[:, None], head, offs_k[None, :])
            grad_probs = tl.where(keep, grad_probs * (1.0 / (1.0 - dropout_p)), 0.0)
        grad_gate += tl.sum(probs * grad_probs, 1)
        if not DELTA_ONLY:
            # dz = p (slope R + shift)
            grad_scores = probs * (grad_probs * slope[:, None] + shift[:, None])
            grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query, grad_gate


@triton.jit
def _attention_backward_query_kernel(
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
    grad_output_stride_m,
    key_ranges_stride_b,
    key_ranges_stride_h,
    key_ranges_stride_m,
    num_heads,
    group_size,
    num_modalities,
    padded_rows,
    split_rows,
    HEAD_DIM: tl.constexpr,
    IS_PARTIALS: tl.constexpr,
    DELTA_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, first_query, head = load_work(query_tiles_ptr, num_heads, BLOCK_Q)
    query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    if first_query >= query_stop:
        return
    rows = tl.arange(0, BLOCK_Q)
    offs_q = first_query + rows
    mask_q = offs_q < query_stop
    plane = num_modalities * tl.cast(padded_rows, tl.int64) * num_heads
    first_term = head * num_modalities * padded_rows + padded_row(cu_seqlens_q_ptr, sample, first_query)
    row_terms_ptr += first_term
    first_row = first_query.to(tl.int64) * num_heads + head
    offs_m = rows * (num_heads * num_modalities)
    mask_mass = mask_q
    split_row = tl.cast(0, tl.int64)
    if split_rows is not None:  # a split's sums stand apart; the first counts the mass
        split = tl.program_id(1).to(tl.int64)
        mask_mass = mask_q & (split == 0)
        split_row = split * split_rows
        if DELTA_ONLY:
            shift_ptr += split * plane
    if DELTA_ONLY:
        shift_ptr += first_term
    else:
        grad_query_ptr += split_row * HEAD_DIM
        mass_ptr += first_row * num_modalities
    if grad_gate_ptr is not None:
        grad_gate_ptr += (split_row + first_row) * num_modalities
    if grad_log_prior_ptr is not None:
        grad_log_prior_ptr += (split_row + first_row) * num_modalities
    if visible_ptr is not None:
        visible_ptr += first_query.to(tl.int64) * num_modalities * 2
    # [BLOCK_Q, BLOCK_D]
    query = load_rows(
        query_ptr + head * query_stride_h, query_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
    )
    grad_output_ptr += head * grad_output_stride_h
    grad_output = load_rows(
        grad_output_ptr, grad_output_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
    )
    key_ptr += head // group_size * key_stride_h
    value_ptr += head // group_size * value_stride_h
    key_ranges_ptr += sample.to(tl.int64) * key_ranges_stride_b + head * key_ranges_stride_h
    scale2 = scale * LOG2_E
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    grad_query = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    grad_prior_sum = tl.zeros([BLOCK_Q], tl.float32)
    for index in tl.range(num_modalities, disable_licm=True):
        modality = tl.cast(index, tl.int64)
        start, stop, full_start, full_stop, low, high = segment_range(
            key_ranges_ptr + modality * key_ranges_stride_m, visible_ptr, rows, mask_q, modality, num_modalities
        )
        rows = tl.arange(0, BLOCK_Q) + hidden_zero(start)
        modality_ptrs = row_terms_ptr + modality * padded_rows + rows
        offset = tl.load(modality_ptrs)
        shift = tl.load(modality_ptrs + plane)
        slope = tl.load(modality_ptrs + 2 * plane)
        stop = tl.where(tl.max(offset, 0) > -float("inf"), stop, start)
        if split_rows is not None:
            start, stop, full_start, full_stop = take_split(start, stop, full_start, full_stop, index, BLOCK_K)
        if IS_PARTIALS:
            grad_output_m_ptr = grad_output_ptr + modality * grad_output_stride_m
            grad_output = load_rows(
                grad_output_m_ptr, grad_output_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
            )
        grad_gate = tl.zeros([BLOCK_Q], tl.float32)
        if stop > start:
            full_start, full_stop, wide_stop = split_range(start, stop, full_start, full_stop, BLOCK_K)
            starts = (start, full_start, wide_stop)
            stops = (wide_stop, full_stop, stop)
            for piece in tl.static_range(3):
                # Piece 0, whole tiles before and after the full ones, exists only where rows differ in what they see.
                if piece > 0 or visible_ptr is not None:
                    grad_query, grad_gate = _walk_keys(
                        grad_query=grad_query,
                        grad_gate=grad_gate,
                        query=query,
                        grad_output=grad_output,
                        key_ptr=key_ptr,
                        value_ptr=value_ptr,
                        key_stride_k=key_stride_k,
                        value_stride_k=value_stride_k,
                        start=starts[piece],
                        stop=stops[piece],
                        skip_start=full_start if piece == 0 else None,
                        skip_stop=full_stop,
                        key_stop=stop,
                        scale2=scale2,
                        offset=offset,
                        shift=shift,
                        slope=slope,
                        low=low if visible_ptr is not None and piece != 1 else None,
                        high=high,
                        offs_q=offs_q,
                        head=head,
                        seed=seed,
                        dropout_p=dropout_p,
                        HEAD_DIM=HEAD_DIM,
                        BLOCK_K=BLOCK_TAIL if piece == 2 else BLOCK_K,
                        PARTIAL=piece == 2,
                        DELTA_ONLY=DELTA_ONLY,
                        PRECISION=PRECISION,
                    )
        if DELTA_ONLY:
            tl.store(shift_ptr + modality * padded_rows + rows, -slope * grad_gate)
        else:
            if grad_gate_ptr is not None:
                tl.store(grad_gate_ptr + modality + offs_m, grad_gate, mask=mask_q)
            if grad_log_prior_ptr is not None:
                mass = tl.load(mass_ptr + modality + offs_m, mask=mask_mass, other=0.0)
                grad_log_prior = slope * grad_gate + shift * mass
                grad_prior_sum += grad_log_prior
                tl.store(grad_log_prior_ptr + modality + offs_m, grad_log_prior, mask=mask_q)
    if BLOCK_D > 128:  # Once more: carried through the loops they would spill.
        sample, first_query, head = load_work(query_tiles_ptr, num_heads + hidden_zero(num_heads), BLOCK_Q)
        query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    if grad_log_prior_ptr is not None:
        tl.debug_barrier()  # the rows below were stored by other threads of this program
        for index in tl.range(num_modalities, disable_licm=True):
            mass = tl.load(mass_ptr + index + offs_m, mask=mask_q, other=0.0)
            grad_log_prior = tl.load(grad_log_prior_ptr + index + offs_m, mask=mask_q, other=0.0)
            tl.store(grad_log_prior_ptr + index + offs_m, grad_log_prior - mass * grad_prior_sum, mask=mask_q)
    if not DELTA_ONLY:
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
