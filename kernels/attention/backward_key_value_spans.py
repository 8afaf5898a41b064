"""Third pass of the attention backward where segments are much shorter than a tile: a program owns BLOCK_K keys of
one sample, whatever their modalities, and one key head.

The formulas are those of `backward_key_value`, with offset, shift, slope and gate of the key's own modality: a row of
the transposed tile [BLOCK_K, BLOCK_Q] belongs to one key, so a tile loads its terms for pairs rather than for queries,
3 or 4 loads beside 8 D FLOPs a pair, and as nothing is summed over keys, nothing has to be told apart afterwards.
Inactive keys are not read; their gradients are 0. Partials, whose gradient of the output differs by modality, stay
with `backward_key_value`.

Counted for one sample and key head, tiles of 64 keys here and of 32 there, and the instructions of both loops for 64
queries (D 64, bfloat16, gate, sm_90: 666 and 319):

    8 modalities of 5 keys:        1 program for 8,    64 keys' work for 256,  666 instructions for 2552
    8 modalities of 1 to 64 keys:  4.5 programs for 12, 290 for 384,           3000 for 3830 (means, random lengths)

There is no work list: program i finds its sample as the last whose first tile, ``first key // BLOCK_K + sample``, is at
most i, reading 4 B bytes.

Cost: 8 Hq D (visible pairs) FLOPs. p, dz in float32, rounded once to the inputs' dtype for the products; sums in
float32. No atomics, bitwise reproducible.
"""

import triton
import triton.language as tl

from fusedmm.kernels.attention.backward_key_value import SCAN, _queries_that_see
from fusedmm.kernels.attention.backward_rows import padded_row
from fusedmm.kernels.indexing import hidden_zero, keep_mask, load_rows, store_rows
from fusedmm.kernels.softmax import LOG2_E


@triton.jit
def _find_tile(cu_seqlens_k_ptr, batch, num_modalities, tile, BLOCK_K: tl.constexpr):
    """(sample, first key) of a tile; past the sample's end for the few tiles that are not in use."""
    sample = -1
    for first in range(0, batch, SCAN):
        offs = first + tl.arange(0, SCAN)
        starts = tl.load(cu_seqlens_k_ptr + offs * num_modalities, mask=offs < batch, other=2147483647)
        sample += tl.sum((starts // BLOCK_K + offs <= tile).to(tl.int32), 0)
    start = tl.load(cu_seqlens_k_ptr + sample * num_modalities)
    return sample, start + (tile - start // BLOCK_K - sample) * BLOCK_K


@triton.jit
def _attention_backward_key_value_spans_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_output_ptr,
    grad_key_ptr,
    grad_value_ptr,
    row_terms_ptr,
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
    key_ranges_stride_b,
    key_ranges_stride_h,
    key_ranges_stride_m,
    batch,
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
    tile = tl.program_id(0) // num_key_heads
    key_head = (tl.program_id(0) % num_key_heads).to(tl.int64)
    sample, first_key = _find_tile(cu_seqlens_k_ptr, batch, num_modalities, tile, BLOCK_K)
    segment = sample * num_modalities
    key_stop = tl.load(cu_seqlens_k_ptr + segment + num_modalities)
    if first_key >= key_stop:
        return
    query_start = tl.load(cu_seqlens_q_ptr + sample)
    query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    plane = num_modalities * tl.cast(padded_rows, tl.int64) * num_key_heads * group_size
    query_ptr += key_head * group_size * query_stride_h
    grad_output_ptr += key_head * group_size * grad_output_stride_h
    scale2 = scale * LOG2_E
    kept = 1.0 / (1.0 - dropout_p)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    offs_k = first_key + tl.arange(0, BLOCK_K)
    modality = tl.zeros([BLOCK_K], tl.int32)
    walk_start = query_start
    walk_stop = query_stop
    if visible_ptr is not None:
        walk_start = query_stop
        walk_stop = query_start
    for index in range(num_modalities):
        start = tl.load(cu_seqlens_k_ptr + segment + index)
        modality = tl.where(offs_k >= start, index, modality)
        if visible_ptr is not None:
            start = tl.maximum(start, first_key)
            stop = tl.minimum(tl.load(cu_seqlens_k_ptr + segment + index + 1), first_key + BLOCK_K)
            if stop > start:
                first, last = _queries_that_see(
                    visible_ptr, query_start, query_stop, start, stop, index, num_modalities, BLOCK_Q
                )
                walk_start = tl.minimum(walk_start, first)
                walk_stop = tl.maximum(walk_stop, last)
    # [BLOCK_K] each: the terms of a key's modality, and its range as the first head of the group sees it
    terms_ptrs = row_terms_ptr + padded_row(cu_seqlens_q_ptr, sample, query_start) + modality.to(tl.int64) * padded_rows
    range_ptrs = (
        key_ranges_ptr
        + sample.to(tl.int64) * key_ranges_stride_b
        + key_head * group_size * key_ranges_stride_h
        + modality.to(tl.int64) * key_ranges_stride_m
    )
    is_read = offs_k < first_key  # by any head of the group
    for member in range(group_size):
        head_ptrs = range_ptrs + member * key_ranges_stride_h
        is_read = is_read | (tl.load(head_ptrs + 1) > tl.load(head_ptrs))
    offs_d = tl.arange(0, BLOCK_D)
    mask = (is_read & (offs_k < key_stop))[:, None] & (offs_d < HEAD_DIM)[None, :]
    # [BLOCK_K, BLOCK_D]
    key_ptrs = key_ptr + key_head * key_stride_h + offs_k.to(tl.int64)[:, None] * key_stride_k + offs_d[None, :]
    key = tl.load(key_ptrs, mask=mask, other=0.0)
    value_ptrs = value_ptr + key_head * value_stride_h + offs_k.to(tl.int64)[:, None] * value_stride_k + offs_d[None, :]
    value = tl.load(value_ptrs, mask=mask, other=0.0)
    grad_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for member in tl.range(group_size, disable_licm=True):
        head = (tl.program_id(0) % (num_key_heads + hidden_zero(member))).to(tl.int64) * group_size + member
        head_ptrs = range_ptrs + member * key_ranges_stride_h
        is_active = tl.load(head_ptrs + 1) > tl.load(head_ptrs)
        member_ptrs = terms_ptrs + head * num_modalities * padded_rows
        member_stop = tl.where(tl.max(is_active.to(tl.int32), 0) > 0, walk_stop, walk_start)
        for first_query in tl.range(
            walk_start, member_stop, BLOCK_Q, disable_licm=query_ptr.dtype.element_ty != tl.float32
        ):
            # [BLOCK_K, BLOCK_Q], as all that is not a query's row
            pair_ptrs = member_ptrs[:, None] + (first_query - query_start) + tl.arange(0, BLOCK_Q)[None, :]
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
            scores = tl.dot(key, query.T, input_precision=PRECISION)
            probs = tl.exp2(scores * scale2 + tl.load(pair_ptrs))
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
            offs_q = first_query + (tl.arange(0, BLOCK_Q) + hidden_zero(first_query))
            sees = is_active[:, None]
            if visible_ptr is not None:
                visible_ptrs = visible_ptr + tl.cast(first_query, tl.int64) * num_modalities * 2
                visible_ptrs += (tl.arange(0, BLOCK_Q)[None, :] * num_modalities + modality[:, None]) * 2
                mask_q = (offs_q < query_stop)[None, :]
                sees = sees & (offs_k[:, None] >= tl.load(visible_ptrs, mask=mask_q, other=0))
                sees = sees & (offs_k[:, None] < tl.load(visible_ptrs + 1, mask=mask_q, other=0))
            probs = tl.where(sees, probs, 0.0)
            # R = v.grad_output
            grad_probs = tl.dot(value, grad_output.T, input_precision=PRECISION)
            kept_probs = probs
            if HAS_GATE:
                kept_probs = probs * tl.load(pair_ptrs + 3 * plane)
            if seed_ptr is not None:
                keep = keep_mask(seed, dropout_p, offs_q[None, :], head, offs_k[:, None])
                kept_probs = tl.where(keep, kept_probs * kept, 0.0)
                grad_probs = tl.where(keep, grad_probs * kept, 0.0)
            grad_value = tl.dot(kept_probs.to(grad_output.dtype), grad_output, grad_value, input_precision=PRECISION)
            # dz = p (slope R + shift)
            grad_scores = probs * (grad_probs * tl.load(pair_ptrs + 2 * plane) + tl.load(pair_ptrs + plane))
            grad_scores = tl.where(sees, grad_scores, 0.0)  # 0 * NaN, should what a head does not see be NaN
            grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    # Once more: carried through the loops they would spill.
    num_key_heads += hidden_zero(num_key_heads)
    sample, first_key = _find_tile(cu_seqlens_k_ptr, batch, num_modalities, tl.program_id(0) // num_key_heads, BLOCK_K)
    key_stop = tl.load(cu_seqlens_k_ptr + (sample + 1) * num_modalities)
    key_head = (tl.program_id(0) % num_key_heads).to(tl.int64)
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
