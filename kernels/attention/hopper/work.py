"""What each CTA of the Hopper kernels has to do, as small integer tables written on the device before the main kernel.

A persistent kernel with a producer and two consumers walks the same list of tiles three times, each on its own; the
list must therefore be cheap to read and equal for all of them. So who sees what (segments, `active`, time ranges) is
resolved once a tile here: empty, inactive and invisible segments never reach the main loop, and a tile that every
row sees whole is told apart from one that needs a mask.

Query work, int32 [Hw, query tiles, 2 + M, 8] (Hw is Hq if `active` differs by head, else 1; the last entry may be read,
but is never used):
    [.., 0, :] = first query, end query, segments listed, key tiles in them, padded row of the first query
    [.., 1+e, :] = modality, first visible key, first key that all rows see, end of those, end of the visible keys
Key work, int32 [Hw, key tiles, 8]:
    first key, end key, modality, shift from a query's row to its padded row,
    first and end query to visit, first and end query of those that see the whole tile
    (visits start and end on BLOCK_Q rows of the sample, or at its end)

Cost: one pass over `visible` for each of the two; without it a few integers a tile. No synchronisation.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedmm.kernels import indexing
from fusedmm.kernels.attention.arguments import AttentionProblem, strides_of
from fusedmm.kernels.launch import LAUNCH_OPTIONS

TILE = indexing.TILE.value  # rows of an entry of the work lists

BLOCK_ROWS = 1024  # queries looked at in one step when searching for those that see a key tile
ENTRY = tl.constexpr(8)  # integers of an entry
_FAR = tl.constexpr(2147483647)


@triton.jit
def _attention_query_work_kernel(
    query_tiles_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    active_ptr,
    visible_ptr,
    work_ptr,
    active_stride_b,
    active_stride_h,
    active_stride_m,
    num_modalities,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """One program: the list of one query tile and head."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row_ptr = work_ptr + (head * tl.num_programs(0) + tile).to(tl.int64) * (2 + num_modalities) * ENTRY
    sample = tl.load(query_tiles_ptr + 2 * tile)
    used = sample >= 0
    sample = tl.maximum(sample, 0)
    first = tl.load(query_tiles_ptr + 2 * tile + 1)
    sample_start = tl.load(cu_seqlens_q_ptr + sample)
    end = tl.minimum(first + TILE_ROWS, tl.load(cu_seqlens_q_ptr + sample + 1))
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = (offs_m < num_modalities) & used
    if active_ptr is not None:
        active_ptrs = (
            active_ptr + sample.to(tl.int64) * active_stride_b + head * active_stride_h + offs_m * active_stride_m
        )
        mask_m = mask_m & (tl.load(active_ptrs, mask=mask_m, other=0) != 0)
    segment_ptrs = cu_seqlens_k_ptr + sample * num_modalities + offs_m
    low = tl.load(segment_ptrs, mask=mask_m, other=0)
    high = tl.load(segment_ptrs + 1, mask=mask_m, other=0)
    full_low = low
    full_high = high
    if visible_ptr is not None:
        offs_q = first + tl.arange(0, TILE_ROWS)
        mask = (offs_q < end)[:, None] & mask_m[None, :]
        range_ptrs = visible_ptr + (offs_q.to(tl.int64)[:, None] * num_modalities + offs_m[None, :]) * 2
        # [TILE_ROWS, BLOCK_M]
        row_low = tl.maximum(tl.load(range_ptrs, mask=mask, other=0), low[None, :])
        row_high = tl.minimum(tl.load(range_ptrs + 1, mask=mask, other=0), high[None, :])
        sees = mask & (row_low < row_high)
        full_low = tl.max(tl.where(mask, row_low, 0), 0)
        full_high = tl.min(tl.where(mask, row_high, _FAR), 0)
        low = tl.min(tl.where(sees, row_low, _FAR), 0)
        high = tl.max(tl.where(sees, row_high, 0), 0)
        full_high = tl.maximum(full_low, full_high)
    listed = low < high
    # [BLOCK_M]: place of each listed segment
    place = tl.cumsum(listed.to(tl.int32), 0)
    entry_ptrs = row_ptr + place * ENTRY
    tl.store(entry_ptrs, offs_m, mask=listed)
    tl.store(entry_ptrs + 1, low, mask=listed)
    tl.store(entry_ptrs + 2, full_low, mask=listed)
    tl.store(entry_ptrs + 3, full_high, mask=listed)
    tl.store(entry_ptrs + 4, high, mask=listed)
    tl.store(row_ptr, first)
    tl.store(row_ptr + 1, tl.where(used, end, first))
    tl.store(row_ptr + 2, tl.sum(listed.to(tl.int32), 0))
    tl.store(row_ptr + 3, tl.sum(tl.where(listed, (high - low + BLOCK_K - 1) // BLOCK_K, 0), 0))
    tl.store(row_ptr + 4, (sample_start // TILE_ROWS + sample) * TILE_ROWS + first - sample_start)


@triton.jit
def _attention_key_work_kernel(
    key_tiles_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    active_ptr,
    visible_ptr,
    work_ptr,
    active_stride_b,
    active_stride_h,
    active_stride_m,
    num_modalities,
    BLOCK_Q: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """One program: the queries that one key tile has to visit for one head."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row_ptr = work_ptr + (head * tl.num_programs(0) + tile).to(tl.int64) * ENTRY
    segment = tl.load(key_tiles_ptr + 2 * tile)
    used = segment >= 0
    segment = tl.maximum(segment, 0)
    sample = segment // num_modalities
    modality = segment % num_modalities
    first_key = tl.load(key_tiles_ptr + 2 * tile + 1)
    end_key = tl.where(used, tl.load(cu_seqlens_k_ptr + segment + 1), first_key)
    sample_start = tl.load(cu_seqlens_q_ptr + sample)
    sample_end = tl.load(cu_seqlens_q_ptr + sample + 1)
    if active_ptr is not None:
        active_ptrs = (
            active_ptr + sample.to(tl.int64) * active_stride_b + head * active_stride_h + modality * active_stride_m
        )
        used = used & (tl.load(active_ptrs) != 0)
    low = sample_start
    high = sample_end
    full_low = low
    full_high = high
    if visible_ptr is not None:
        tile_end = tl.minimum(first_key + TILE_ROWS, end_key)
        low = sample_end
        high = sample_start
        full_low = sample_end
        full_high = sample_start
        full_rows = 0
        for start in range(sample_start, sample_end, BLOCK_ROWS):
            offs_q = start + tl.arange(0, BLOCK_ROWS)
            mask_q = offs_q < sample_end
            range_ptrs = visible_ptr + (offs_q.to(tl.int64) * num_modalities + modality) * 2
            row_low = tl.load(range_ptrs, mask=mask_q, other=_FAR)
            row_high = tl.load(range_ptrs + 1, mask=mask_q, other=0)
            sees = mask_q & (row_low < row_high) & (row_low < tile_end) & (row_high > first_key)
            whole = mask_q & (row_low <= first_key) & (row_high >= tile_end)
            low = tl.minimum(low, tl.min(tl.where(sees, offs_q, _FAR), 0))
            high = tl.maximum(high, tl.max(tl.where(sees, offs_q + 1, 0), 0))
            full_low = tl.minimum(full_low, tl.min(tl.where(whole, offs_q, _FAR), 0))
            full_high = tl.maximum(full_high, tl.max(tl.where(whole, offs_q + 1, 0), 0))
            full_rows += tl.sum(whole.to(tl.int32), 0)
        # queries in any order: the whole range counts as full only if no row inside it is partial
        full_high = tl.where(full_rows == full_high - full_low, full_high, full_low)
        low = sample_start + (low - sample_start) // BLOCK_Q * BLOCK_Q
        high = tl.minimum(sample_start + (high - sample_start + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q, sample_end)
        high = tl.maximum(high, low)
    tl.store(row_ptr, first_key)
    tl.store(row_ptr + 1, end_key)
    tl.store(row_ptr + 2, modality)
    tl.store(row_ptr + 3, (sample_start // TILE_ROWS + sample) * TILE_ROWS - sample_start)
    tl.store(row_ptr + 4, low)
    tl.store(row_ptr + 5, tl.where(used, high, low))
    tl.store(row_ptr + 6, full_low)
    tl.store(row_ptr + 7, full_high)


def query_work(problem: AttentionProblem, query_heads: int, block_k: int) -> Tensor:
    """Table of the query tiles, int32 [Hw, tiles, 2 + M, 8], for key tiles of ``block_k``."""
    tiles = problem.query_tiles.shape[0]
    heads, active = _active_arguments(problem.active, query_heads)
    work = problem.query_tiles.new_empty((heads, tiles, 2 + problem.num_modalities, ENTRY.value))
    _attention_query_work_kernel[(tiles, heads)](
        query_tiles_ptr=problem.query_tiles,
        **_shared_arguments(problem, work),
        **active,
        BLOCK_K=block_k,
        BLOCK_M=triton.next_power_of_2(problem.num_modalities),
        num_warps=4,
        **LAUNCH_OPTIONS,
    )
    return work


def key_work(problem: AttentionProblem, query_heads: int, block_q: int) -> Tensor:
    """Table of the key tiles, int32 [Hw, tiles, 8], for visits of ``block_q`` queries."""
    tiles = problem.key_tiles.shape[0]
    heads, active = _active_arguments(problem.active, query_heads)
    work = problem.key_tiles.new_empty((heads, tiles, ENTRY.value))
    _attention_key_work_kernel[(tiles, heads)](
        key_tiles_ptr=problem.key_tiles,
        **_shared_arguments(problem, work),
        **active,
        BLOCK_Q=block_q,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=4,
        **LAUNCH_OPTIONS,
    )
    return work


def _shared_arguments(problem: AttentionProblem, work: Tensor) -> dict[str, Any]:
    return {
        "cu_seqlens_q_ptr": problem.cu_seqlens_q,
        "cu_seqlens_k_ptr": problem.cu_seqlens_k,
        "visible_ptr": problem.visible,
        "work_ptr": work,
        "num_modalities": problem.num_modalities,
        "TILE_ROWS": TILE,
    }


def _active_arguments(active: Tensor | None, query_heads: int) -> tuple[int, dict[str, Any]]:
    """Heads that the tables tell apart, and the kernels' arguments for ``active``."""
    if active is None:
        return 1, {"active_ptr": None, **strides_of(None, "active", "bhm")}
    heads = 1 if active.stride(1) == 0 or query_heads == 1 else query_heads
    return heads, {"active_ptr": active.view(torch.uint8), **strides_of(active, "active", "bhm")}
