"""The inner loop of the attention forward: a run of key tiles of one segment.

    new_max = max(running_max, max_j z_j)      p_j = exp2(z_j - new_max)      rescale = exp2(running_max - new_max)
    sum = sum rescale + sum_j p_j              acc = acc rescale + sum_j gate p_j v_j

with z in base 2. Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
"""

import triton
import triton.language as tl

from fusedmm.kernels.indexing import keep_mask, load_rows
from fusedmm.kernels.softmax import finite_shift


@triton.jit
def softmax_step(
    scores,  # [BLOCK_Q, BLOCK_K]
    running_max,  # [BLOCK_Q], base 2
    running_sum,  # [BLOCK_Q]
    scale2,
    prior,  # [BLOCK_Q], base 2
    gate,  # [BLOCK_Q] or None
    offs_q,
    offs_k,
    head,
    seed,  # or None
    dropout_p,
):
    """One step of the online softmax.

    Returns the probabilities times gate and dropout, what older sums are multiplied by, the new maximum and sum.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale2 + prior)
    shift = finite_shift(new_max)
    # p = exp(z - max)
    probs = tl.exp2(scores * scale2 + (prior - shift)[:, None])
    rescale = tl.exp2(running_max - shift)
    running_sum = running_sum * rescale + tl.sum(probs, 1)
    if seed is not None:
        probs = tl.where(keep_mask(seed, dropout_p, offs_q[:, None], head, offs_k[None, :]), probs, 0.0)
    if gate is not None:
        probs = probs * gate[:, None]
    return probs, rescale, new_max, running_sum


@triton.jit
def attend_keys(
    acc,  # [BLOCK_Q, BLOCK_D]
    running_max,  # [BLOCK_Q], base 2
    running_sum,  # [BLOCK_Q]
    query,  # [BLOCK_Q, BLOCK_D]
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
    prior,
    gate,
    low,  # [BLOCK_Q] or None
    high,
    offs_q,
    head,
    seed,
    dropout_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTIAL: tl.constexpr,
    CARRY_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to the tiles of ``start : stop`` without ``skip_start : skip_stop``.

    With ``low : high`` only to the keys each row sees; if PARTIAL, only to those before ``key_stop``. CARRY_SCORES,
    for whole tiles that need no mask, issues the scores of the next tile before the second product of this one: the
    order in which Hopper's asynchronous products run under the softmax.
    """
    BLOCK_D: tl.constexpr = query.shape[1]
    skipped = 0
    if skip_start is not None:
        skipped = skip_stop - skip_start
    last = stop - skipped
    if CARRY_SCORES:
        last = stop - BLOCK_K
        # [BLOCK_K, BLOCK_D]
        key = load_rows(key_ptr, key_stride_k, start, key_stop, BLOCK_K, HEAD_DIM, BLOCK_D, PARTIAL)
        # [BLOCK_Q, BLOCK_K]
        scores = tl.dot(query, key.T, input_precision=PRECISION)
    for step in tl.range(start, last, BLOCK_K, disable_licm=BLOCK_D > 64 and query.dtype != tl.float32):
        first_key = step
        if skip_start is not None:
            first_key = tl.where(step < skip_start, step, step + skipped)
        offs_k = first_key + tl.arange(0, BLOCK_K)
        if not CARRY_SCORES:
            key = load_rows(key_ptr, key_stride_k, first_key, key_stop, BLOCK_K, HEAD_DIM, BLOCK_D, PARTIAL)
            scores = tl.dot(query, key.T, input_precision=PRECISION)
            if low is not None:
                sees = (offs_k[None, :] >= low[:, None]) & (offs_k[None, :] < high[:, None])
                scores = tl.where(sees, scores, -float("inf"))
            elif PARTIAL:
                scores = tl.where((offs_k < key_stop)[None, :], scores, -float("inf"))
        probs, rescale, running_max, running_sum = softmax_step(
            scores, running_max, running_sum, scale2, prior, gate, offs_q, offs_k, head, seed, dropout_p
        )
        probs = probs.to(query.dtype)
        if CARRY_SCORES:
            key = load_rows(key_ptr, key_stride_k, first_key + BLOCK_K, key_stop, BLOCK_K, HEAD_DIM, BLOCK_D, PARTIAL)
            scores = tl.dot(query, key.T, input_precision=PRECISION)
        # [BLOCK_K, BLOCK_D]
        value = load_rows(value_ptr, value_stride_k, first_key, key_stop, BLOCK_K, HEAD_DIM, BLOCK_D, PARTIAL)
        acc = tl.dot(probs, value, acc * rescale[:, None], input_precision=PRECISION)
    if CARRY_SCORES:
        offs_k = last + tl.arange(0, BLOCK_K)
        probs, rescale, running_max, running_sum = softmax_step(
            scores, running_max, running_sum, scale2, prior, gate, offs_q, offs_k, head, seed, dropout_p
        )
        value = load_rows(value_ptr, value_stride_k, last, key_stop, BLOCK_K, HEAD_DIM, BLOCK_D, PARTIAL)
        acc = tl.dot(probs.to(query.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
    return acc, running_max, running_sum
