"""Which keys each query may see by time, as ranges: one launch instead of a bisection by PyTorch operators.

With keys sorted by time within their segments, query i sees keys ``low : high`` of segment (b, m), where

    high = first key with key_time > query_time_i
    low  = first key with key_time > query_time_i - lookback_m       (the start of the segment without a look-back,
                                                                      and where the difference is below any int64)

A program owns a tile of up to 128 queries of one sample and one modality; every lane bisects by itself.
Cost: reads 8 bytes a query and ``log2(keys)`` scattered int64 a query and bound, writes 8 bytes a query and modality.
"""

import triton
import triton.language as tl
from torch import Tensor

from fusedmm.kernels.indexing import TILE
from fusedmm.kernels.launch import LAUNCH_OPTIONS


@triton.jit
def _first_later(key_time_ptr, limit, start, stop, mask, steps):
    """[TILE] first position in ``start : stop`` whose time exceeds ``limit``."""
    low = tl.zeros_like(limit).to(tl.int32) + start
    high = tl.zeros_like(limit).to(tl.int32) + stop
    for _ in range(steps):
        middle = low + (high - low) // 2
        is_open = mask & (low < high)
        time = tl.load(key_time_ptr + middle, mask=is_open, other=0)
        move = is_open & (time <= limit)
        low = tl.where(move, middle + 1, low)
        high = tl.where(is_open & (time > limit), middle, high)
    return low


@triton.jit
def _visible_ranges_kernel(
    query_time_ptr,
    key_time_ptr,
    lookback_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    query_tiles_ptr,
    ranges_ptr,
    num_modalities,
    steps,
):
    tile = tl.program_id(0).to(tl.int64)
    modality = tl.program_id(1)
    sample = tl.load(query_tiles_ptr + 2 * tile)
    first_query = tl.load(query_tiles_ptr + 2 * tile + 1)
    if sample < 0:
        return
    segment = sample * num_modalities + modality
    start = tl.load(cu_seqlens_k_ptr + segment)
    stop = tl.load(cu_seqlens_k_ptr + segment + 1)
    offs_q = first_query.to(tl.int64) + tl.arange(0, TILE)
    mask_q = offs_q < tl.load(cu_seqlens_q_ptr + sample + 1)
    time = tl.load(query_time_ptr + offs_q, mask=mask_q, other=0)
    high = _first_later(key_time_ptr, time, start, stop, mask_q, steps)
    if lookback_ptr is not None:
        limit = time - tl.load(lookback_ptr + modality)
        low = _first_later(key_time_ptr, limit, start, stop, mask_q, steps)
        low = tl.where(limit > time, start, low)  # it wrapped: older than any int64
    else:
        low = tl.zeros_like(high) + start
    ranges_ptrs = ranges_ptr + (offs_q * num_modalities + modality) * 2
    tl.store(ranges_ptrs, low, mask=mask_q)
    tl.store(ranges_ptrs + 1, high, mask=mask_q)


def visible_ranges(
    query_time: Tensor,
    key_time: Tensor,
    lookback: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_tiles: Tensor,
    ranges: Tensor,
    max_seqlen_k: int,
) -> None:
    """Launch the kernel; writes ``ranges`` [total_q, M, 2] int32.

    Args:
        query_time: [total_q] int64, contiguous.
        key_time: [total_k] int64, sorted within each segment, contiguous.
        lookback: [M] int64, contiguous, or None.
        cu_seqlens_q: [B+1] int32.
        cu_seqlens_k: [B*M+1] int32.
        query_tiles: [tiles, 2] int32, work list of the layout.
        ranges: [total_q, M, 2] int32, contiguous.
        max_seqlen_k: most keys of one sample.
    """
    num_modalities = ranges.shape[1]
    _visible_ranges_kernel[(query_tiles.shape[0], num_modalities)](
        query_time_ptr=query_time,
        key_time_ptr=key_time,
        lookback_ptr=lookback,
        cu_seqlens_q_ptr=cu_seqlens_q,
        cu_seqlens_k_ptr=cu_seqlens_k,
        query_tiles_ptr=query_tiles,
        ranges_ptr=ranges,
        num_modalities=num_modalities,
        steps=max_seqlen_k.bit_length(),
        num_warps=4,
        **LAUNCH_OPTIONS,
    )
