"""The end of the attention forward under the joint softmax: mass and lse of each modality.

    mass_m = sum_m exp2(max_m - max) / sum        lse_m = ln 2 (max_m + log2 sum_m)

from what the loop left in their places: the running maximum ``max_m`` after segment m, and the segment's sum against
it. The sum of a segment that lies far under those before it underflows: such a faint segment is summed once more
against its own maximum, so that its lse is right however small its mass is. The branch is decided a tile.
"""

import triton
import triton.language as tl

from fusedmm.kernels.attention.forward_keys import softmax_step
from fusedmm.kernels.indexing import hidden_zero, load_prior, load_rows, segment_range, take_split
from fusedmm.kernels.softmax import finite_shift, natural_lse

FAINT = tl.constexpr(2.0**-64)  # a sum of probabilities below it may lack some that count, for exp2 ends at 2^-126


@triton.jit
def sum_keys(
    query,  # [BLOCK_Q, BLOCK_D]
    key_ptr,
    key_stride_k,
    start,
    stop,
    scale2,
    prior,  # [BLOCK_Q], base 2
    low,  # [BLOCK_Q] or None
    high,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum and sum of the keys ``start : stop`` alone, or with ``low : high`` of those that each row sees."""
    BLOCK_Q: tl.constexpr = query.shape[0]
    BLOCK_D: tl.constexpr = query.shape[1]
    running_max = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_Q], tl.float32)
    for first_key in tl.range(start, stop, BLOCK_K, num_stages=1):
        offs_k = first_key + tl.arange(0, BLOCK_K)
        key = load_rows(key_ptr, key_stride_k, first_key, stop, BLOCK_K, HEAD_DIM, BLOCK_D, True)
        scores = tl.dot(query, key.T, input_precision=PRECISION)
        if low is not None:
            sees = (offs_k[None, :] >= low[:, None]) & (offs_k[None, :] < high[:, None])
            scores = tl.where(sees, scores, -float("inf"))
        else:
            scores = tl.where((offs_k < stop)[None, :], scores, -float("inf"))
        _, _, running_max, running_sum = softmax_step(
            scores, running_max, running_sum, scale2, prior, None, None, None, None, None, None
        )
    return running_max, running_sum


@triton.jit
def store_mass(
    mass_ptr,
    lse_ptr,
    running_max,  # [BLOCK_Q], base 2, of all segments
    running_sum,  # [BLOCK_Q], at least the smallest positive number
    query_ptr,
    query_stride_q,
    key_ptr,
    key_stride_k,
    key_ranges_ptr,
    key_ranges_stride_m,
    log_prior_ptr,
    log_prior_stride_q,
    log_prior_stride_m,
    visible_ptr,
    scale2,
    first_query,
    query_stop,
    mass_stride_q,
    num_modalities,
    SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Turn each segment's sum and maximum, in the places of mass and lse, into mass and lse."""
    first_query += hidden_zero(first_query)
    query_stride_q += hidden_zero(first_query) * 16
    rows = tl.arange(0, BLOCK_Q)
    mask_q = first_query + rows < query_stop
    offs_m = rows * mass_stride_q
    tl.debug_barrier()  # the rows below were stored by other threads of this program
    for index in tl.range(num_modalities, disable_licm=True):
        modality = tl.cast(index, tl.int64)
        segment_sum = tl.load(mass_ptr + modality + offs_m, mask=mask_q, other=1.0)
        segment_max = tl.load(lse_ptr + modality + offs_m, mask=mask_q, other=-float("inf"))
        if tl.min(segment_sum, 0) < FAINT:
            range_ptr = key_ranges_ptr + modality * key_ranges_stride_m
            start, stop, _, _, low, high = segment_range(range_ptr, visible_ptr, rows, mask_q, modality, num_modalities)
            if SPLIT:
                start, stop, _, _ = take_split(start, stop, start, stop, index, BLOCK_K)
            prior = load_prior(log_prior_ptr, modality * log_prior_stride_m, log_prior_stride_q, rows, mask_q)
            is_faint = mask_q & (segment_sum < FAINT) & (prior > -float("inf"))
            if visible_ptr is not None:
                is_faint = is_faint & (high > low)
            if (stop > start) & (tl.max(is_faint.to(tl.int32), 0) > 0):
                own_max, own_sum = sum_keys(
                    query=load_rows(
                        query_ptr, query_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
                    ),
                    key_ptr=key_ptr,
                    key_stride_k=key_stride_k,
                    start=start,
                    stop=stop,
                    scale2=scale2,
                    prior=prior,
                    low=low if visible_ptr is not None else None,
                    high=high,
                    HEAD_DIM=HEAD_DIM,
                    BLOCK_K=BLOCK_TAIL,
                    PRECISION=PRECISION,
                )
                segment_max = tl.where(is_faint, own_max, segment_max)
                segment_sum = tl.where(is_faint, own_sum, segment_sum)
        mass = segment_sum * tl.exp2(segment_max - finite_shift(running_max)) / running_sum
        tl.store(mass_ptr + modality + offs_m, mass, mask=mask_q)
        tl.store(lse_ptr + modality + offs_m, natural_lse(segment_max, segment_sum), mask=mask_q)
