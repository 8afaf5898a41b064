"""Where a program works and what it loads: work lists, tiles of rows, key ranges, dropout counters.

Addresses are int64 from the program index on: the head and the row that a tile starts with are widened before they
meet a stride, and only offsets within a tile stay in 32 bits.
"""

import triton
import triton.language as tl

from fusedmm.kernels.softmax import LOG2_E

TILE = tl.constexpr(128)  # rows of a tile of the work lists, fusedmm.layout.TILE


@triton.jit
def load_work(tiles_ptr, num_heads, BLOCK: tl.constexpr):
    """(run, first row, head) of this program; heads vary fastest, so that the longest tile of every head starts first.

    An unused entry of the work list is run -1 at row 0, which lies past the end (0) that ``cu_seqlens[run + 1]``
    gives for it.
    """
    program = tl.program_id(0)
    PARTS: tl.constexpr = TILE // BLOCK
    head = program % num_heads
    part = program // num_heads
    tile = (part // PARTS).to(tl.int64)
    run = tl.load(tiles_ptr + 2 * tile)
    first_row = tl.load(tiles_ptr + 2 * tile + 1) + part % PARTS * BLOCK
    return run, first_row, head.to(tl.int64)


@triton.jit
def hidden_zero(number):
    """0, if ``number`` is at least 0, which the compiler cannot know.

    What it is added to is computed where it is used. Without it the compiler finds row numbers, offsets and masks of
    one loop, or of the end of a kernel, in what was computed before another, and keeps them all, which spills.
    """
    return number >> 31


@triton.jit
def load_rows(
    base_ptr,
    row_stride,
    first_row,
    row_stop,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[BLOCK, BLOCK_D] rows of a matrix whose last stride is 1.

    Columns past HEAD_DIM are 0 and, if MASKED, so are rows from ``row_stop`` on.
    """
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    offs_tile = offs[:, None] * row_stride + offs_d[None, :]
    if BLOCK_D > 64:
        offs_tile += hidden_zero(tl.cast(first_row, tl.int32)) * 16
    ptrs = base_ptr + tl.cast(first_row, tl.int64) * row_stride + offs_tile
    if MASKED:
        mask = (first_row + offs < row_stop)[:, None]
        if HEAD_DIM < BLOCK_D:
            mask = mask & (offs_d < HEAD_DIM)[None, :]
        return tl.load(ptrs, mask=mask, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_rows(
    base_ptr, row_stride, first_row, row_stop, tile, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store a [BLOCK, BLOCK_D] tile, rounded to the pointer's dtype, without the rows from ``row_stop`` on."""
    first_row += hidden_zero(first_row)
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + tl.cast(first_row, tl.int64) * row_stride + (offs[:, None] * row_stride + offs_d[None, :])
    mask = (first_row + offs < row_stop)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_visible(visible_ptr, offs_q, mask_q, modality, num_modalities):
    """[BLOCK_Q] first key and end of what each query sees of a modality; 0, 0 for masked rows.

    ``visible_ptr`` points to the tile's first query, from which ``offs_q`` count.
    """
    ptrs = visible_ptr + modality * 2 + offs_q * (num_modalities * 2)
    return tl.load(ptrs, mask=mask_q, other=0), tl.load(ptrs + 1, mask=mask_q, other=0)


@triton.jit
def load_prior(log_prior_ptr, column, log_prior_stride_q, offs_q, mask_q):
    """[BLOCK_Q] log prior in base 2; 0 without one. ``log_prior_ptr`` points to the tile's first query."""
    if log_prior_ptr is None:
        return tl.zeros(offs_q.shape, tl.float32)
    else:
        prior_ptrs = log_prior_ptr + column + offs_q * log_prior_stride_q
        return tl.load(prior_ptrs, mask=mask_q, other=-float("inf")) * LOG2_E


@triton.jit
def split_range(start, stop, full_start, full_stop, BLOCK_K: tl.constexpr):
    """Cut the keys that some row of a tile sees, ``start : stop``, where every row sees ``full_start : full_stop``.

    Returns (full_start, full_stop, wide_stop): ``start : full_start`` and ``full_stop : wide_stop`` are whole tiles
    that need a mask, ``full_start : full_stop`` whole tiles that need none, and ``wide_stop : stop`` less than a
    tile.
    """
    full_start = start + (full_start - start + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    full_keys = tl.maximum(full_stop - full_start, 0) // BLOCK_K * BLOCK_K
    full_start = tl.where(full_keys > 0, full_start, start)
    full_stop = full_start + full_keys
    wide_stop = full_stop + tl.maximum(stop - full_stop, 0) // BLOCK_K * BLOCK_K
    return full_start, full_stop, wide_stop


@triton.jit
def visible_range(start, stop, low, high, mask_q):
    """The part of ``start : stop`` that some row sees and the part that all see, for rows in any order."""
    sees = high > low
    none = stop == start
    some_start = tl.minimum(tl.min(tl.where(sees, low, 2147483647), 0), stop)
    some_stop = tl.maximum(tl.max(tl.where(sees, high, 0), 0), some_start)
    some_stop = tl.where(none, some_start, some_stop)
    full_start = tl.maximum(tl.max(tl.where(mask_q, low, 0), 0), some_start)
    full_stop = tl.minimum(tl.min(tl.where(mask_q, high, 2147483647), 0), some_stop)
    return some_start, some_stop, full_start, full_stop


@triton.jit
def take_split(start, stop, full_start, full_stop, index, BLOCK_K: tl.constexpr):
    """This program's part of ``start : stop`` among those along the grid's second dimension, and what every row sees of
    it.

    Cut between tiles, and turned by the segment's ``index``, so that short segments do not all fall to one split.
    """
    splits = tl.num_programs(1)
    part = (tl.program_id(1) + index) % splits
    tiles = (stop - start + BLOCK_K - 1) // BLOCK_K
    split_start = start + tiles * part // splits * BLOCK_K
    split_stop = tl.minimum(start + tiles * (part + 1) // splits * BLOCK_K, stop)
    return split_start, split_stop, tl.maximum(full_start, split_start), tl.minimum(full_stop, split_stop)


@triton.jit
def segment_range(range_ptr, visible_ptr, offs_q, mask_q, modality, num_modalities):
    """Of one segment: first key and end of what some row sees, of what all see, and of what each sees.

    Without visible ranges the last are of no row, but numbers: a device function of Triton 3.6 cannot return None.
    """
    start = tl.load(range_ptr)
    stop = tl.load(range_ptr + 1)
    if visible_ptr is None:
        return start, stop, start, stop, start, stop
    else:
        low, high = load_visible(visible_ptr, offs_q + hidden_zero(start), mask_q, modality, num_modalities)
        start, stop, full_start, full_stop = visible_range(start, stop, low, high, mask_q)
        return start, stop, full_start, full_stop, low, high


@triton.jit
def keep_mask(seed, dropout_p, query, head, key):
    """True where a probability survives dropout: Philox 4x32-10 at counters (key, query, head, 0), broadcast."""
    word, _, _, _ = tl.philox(seed, key.to(tl.uint32), query.to(tl.uint32), head.to(tl.uint32), 0)
    return tl.uint_to_uniform_float(word) >= dropout_p
