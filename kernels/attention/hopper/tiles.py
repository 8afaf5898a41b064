"""Device helpers that the Hopper kernels share: items, the query work, row factors, masks, the online softmax, the
ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fusedmm.kernels.attention.forward_mass import FAINT

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
# Running maximum of a row that has seen nothing: finite, so that differences are not NaN.
HIDDEN: gl.constexpr = gl.constexpr(-1e30)
ROWS: gl.constexpr = gl.constexpr(64)  # rows of a consumer: one wgmma
CONSUMERS: gl.constexpr = gl.constexpr(2)
ENTRY: gl.constexpr = gl.constexpr(8)  # integers of an entry of the query work, as in work.py


@gluon.jit
def first_item():
    """Index of this CTA, read where it is called: `gl.program_id` is hoisted above the partitions, and spilled."""
    return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def decode_item(item, num_tiles, GROUP: gl.constexpr):
    """(tile, head) of an item: heads that share keys first, then tiles, so the L2 holds one key head at a time."""
    place = item // GROUP
    return place % num_tiles, place // num_tiles * GROUP + item % GROUP


@gluon.jit
def work_row(work_ptr, tile, head, num_tiles, MODALITIES: gl.constexpr, WORK_HEADS: gl.constexpr):
    """Pointer to the work of a query tile and head; with one work head all heads share it."""
    row = tile
    if WORK_HEADS > 1:
        row += head * num_tiles
    return work_ptr + row.to(gl.int64) * ((2 + MODALITIES) * ENTRY)


@gluon.jit
def load_entry(entry_ptr):
    """(modality, first visible key, first and end key that all rows see, end of the visible keys)."""
    return (
        gl.load(entry_ptr),
        gl.load(entry_ptr + 1),
        gl.load(entry_ptr + 2),
        gl.load(entry_ptr + 3),
        gl.load(entry_ptr + 4),
    )


@gluon.jit
def load_factor(base_ptr, strides, first_row, head, modality, offs, mask):
    """[rows] of a [query, head, modality] tensor with any strides; masked rows are 0."""
    start = first_row * strides[0] + head * strides[1] + modality * strides[2]
    return gl.load(base_ptr + start + offs * strides[0].to(gl.int32), mask=mask, other=0.0)


@gluon.jit
def load_visible(visible_ptr, first_row, modality, offs, mask, MODALITIES: gl.constexpr):
    """[rows] first key and end of what each query sees of a modality; 0, 0 for masked rows."""
    ptrs = visible_ptr + (first_row.to(gl.int64) * MODALITIES + modality) * 2 + offs * (2 * MODALITIES)
    return gl.load(ptrs, mask=mask, other=0), gl.load(ptrs + 1, mask=mask, other=0)


@gluon.jit
def mask_tile(
    tile, fill, key, full_low, full_high, high, row_low, row_high, LAYOUT: gl.constexpr, HAS_VISIBLE: gl.constexpr
):
    """``fill`` where a row does not see a key; a tile that every row sees whole branches around it."""
    BLOCK_K: gl.constexpr = tile.shape[1]
    if (key < full_low) | (key + BLOCK_K > full_high):
        offs_k = key + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
        if HAS_VISIBLE:
            tile = gl.where((offs_k[None, :] >= row_low[:, None]) & (offs_k[None, :] < row_high[:, None]), tile, fill)
        else:
            tile = gl.where((offs_k < high)[None, :], tile, fill)
    return tile


@gluon.jit
def softmax_tile(scores, running_max, prior, scale2):
    """Online softmax of a tile: exp2(z - new maximum), its row sums, what older sums are multiplied by, new maximum."""
    new_max = gl.maximum(running_max, gl.max(scores, 1) * scale2 + prior)
    probs = gl.exp2(scores * scale2 + (prior - new_max)[:, None])
    return probs, gl.sum(probs, 1), gl.exp2(running_max - new_max), new_max


@gluon.jit
def natural_lse(running_max, running_sum):
    """Natural log of a sum of exponentials from its base-2 maximum and rescaled sum; -inf for a sum below `FAINT`.

    In float64 up to the one rounding, as in the portable kernels: its error is a factor on every probability of the
    backward.
    """
    lse = ((running_max.to(gl.float64) + gl.log2(running_sum)) * LN_2).to(gl.float32)
    return gl.where(running_sum < FAINT, -float("inf"), lse)


@gluon.jit
def ring_slot(step, STAGES: gl.constexpr):
    """(slot, phase) of the ring at a step."""
    return step % STAGES, (step // STAGES) & 1


@gluon.jit
def allocate_boxes(descriptor, COUNT: gl.constexpr):
    """Shared memory for COUNT boxes of a descriptor."""
    shape: gl.constexpr = [COUNT] + descriptor.block_shape  # noqa: RUF005 (device code cannot unpack)
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers whose phases end after ARRIVALS arrivals, and their bytes."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(barriers.index(index), count=ARRIVALS)
    return barriers


@gluon.jit
def store_rows(
    base_ptr,
    tile,
    row_stride,
    output_gate_ptr,
    output_gate_strides,
    first_row,
    end_row,
    head,
    DTYPE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """Store [rows, HEAD_DIM] of a float32 tile, times sigmoid(output_gate) if there is one, rounded to DTYPE.

    Args:
        base_ptr: of the first row and this head.
        row_stride: elements between rows.
    """
    BLOCK_D: gl.constexpr = tile.shape[1]
    # 16 bytes a thread, where scratch memory for the change of layout fits beside the rings
    LAYOUT: gl.constexpr = (
        gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0]) if BLOCK_D <= 128 else tile.type.layout
    )
    offs = gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
    mask = (first_row + offs < end_row)[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    if output_gate_ptr is not None:
        start = first_row * output_gate_strides[0] + head * output_gate_strides[1]
        gate_ptrs = output_gate_ptr + start + offs[:, None] * output_gate_strides[0].to(gl.int32) + offs_d[None, :]
        logits = gl.convert_layout(gl.load(gate_ptrs, mask=mask, other=0.0), tile.type.layout).to(gl.float32)
        tile = tile * (1.0 / (1.0 + gl.exp2(logits * -LOG2_E)))
    rounded = gl.convert_layout(tile.to(DTYPE), LAYOUT)
    gl.store(base_ptr + offs[:, None] * row_stride + offs_d[None, :], rounded, mask=mask)
