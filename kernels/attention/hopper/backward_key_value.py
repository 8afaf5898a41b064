"""Gradients of keys and values on Hopper: warp-specialised, fed by TMA, without atomics.

    p_ij = exp2(scale2 q_i.k_j + offset_i)       R_ij = grad_output_i.v_j       dz_ij = p_ij (slope_i R_ij + shift_i)
    dv_j = sum_i gate_i p_ij grad_output_i       dk_j = scale sum_i dz_ij q_i

with offset, shift, slope and gate from the portable `backward_rows`; the formulas stand there.

A CTA owns 128 keys of one segment and one key head, a consumer (4 warps) 64 of them. The producer (1 warp) loads the
keys and values once and streams, for each query head of the group, blocks of queries, output gradients and their
four row terms through a ring. Tiles are transposed, [keys, queries], so both products accumulate onto rows the
consumer owns and their left operand comes from registers. exp2 runs under V dO^T, dz under P dO.

Rows past the end of a sample arrive as zeros and have offset -inf: p = dz = 0 without a mask. With time ranges
blocks that some query does not see whole are masked after exp2. Keys that no query may see are not read; their
gradients are 0. Precision: p, R and dz in float32, rounded once to the inputs' dtype for the products; sums in
float32; results rounded once. Determinism: fixed order, bitwise reproducible."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmm.kernels.attention.hopper.compat import load_tile
from fusedmm.kernels.attention.hopper.ragged import load_rows
from fusedmm.kernels.attention.hopper.tiles import (
    CONSUMERS,
    ENTRY,
    ROWS,
    allocate_barriers,
    allocate_boxes,
    first_item,
    load_visible,
    ring_slot,
    store_rows,
)

TERMS: gl.constexpr = gl.constexpr(4)  # offset, shift, slope, gate


@gluon.jit
def _key_work(work_ptr, tile, head, num_tiles, WORK_HEADS: gl.constexpr):
    """Pointer to the work of a key tile and query head; with one work head all heads share it."""
    row = tile
    if WORK_HEADS > 1:
        row += head * num_tiles
    return work_ptr + row.to(gl.int64) * ENTRY


@gluon.jit
def _count_visits(
    work_ptr, tile, first_head, num_tiles, BLOCK_Q: gl.constexpr, GROUP: gl.constexpr, WORK_HEADS: gl.constexpr
):
    """Blocks of queries that a key tile visits, over the heads of its group."""
    visits = 0
    for member in range(GROUP):
        row_ptr = _key_work(work_ptr, tile, first_head + member, num_tiles, WORK_HEADS)
        visits += (gl.load(row_ptr + 5) - gl.load(row_ptr + 4) + BLOCK_Q - 1) // BLOCK_Q
    return visits


@gluon.jit
def _key_value_producer(
    descriptors,  # query, grad_output, key, value, row_terms
    buffers,  # query, grad_output, key, value, row_terms
    key_full,  # [CONSUMERS]
    ring,  # full, empty
    work,  # pointer, number of tiles
    KEY_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    MODALITIES: gl.constexpr,
    WORK_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    IS_PARTIALS: gl.constexpr,
):
    """Load the keys and values, then every block of queries that visits them."""
    query_desc, grad_output_desc, key_desc, value_desc, terms_desc = descriptors
    query_smem, grad_output_smem, key_smem, value_smem, terms_smem = buffers
    full, empty = ring
    work_ptr, num_tiles = work
    BLOCK_Q: gl.constexpr = query_smem.shape[3]
    BLOCK_D: gl.constexpr = query_smem.shape[5]
    item = first_item()
    tile = item // KEY_HEADS
    key_head = item % KEY_HEADS
    first_head = key_head * GROUP
    if _count_visits(work_ptr, tile, first_head, num_tiles, BLOCK_Q, GROUP, WORK_HEADS) > 0:
        row_ptr = _key_work(work_ptr, tile, first_head, num_tiles, WORK_HEADS)
        first_key = gl.load(row_ptr)
        end_key = gl.load(row_ptr + 1)
        modality = gl.load(row_ptr + 2)
        shift = gl.load(row_ptr + 3)
        for part in gl.static_range(CONSUMERS):
            mbarrier.expect(key_full.index(part), 2 * ROWS * BLOCK_D * 2)
            load_rows(key_desc, first_key + ROWS * part, end_key, key_head, key_full.index(part), key_smem.index(part))
            load_rows(
                value_desc, first_key + ROWS * part, end_key, key_head, key_full.index(part), value_smem.index(part)
            )
        step = 0
        for member in range(GROUP):
            head = first_head + member
            row_ptr = _key_work(work_ptr, tile, head, num_tiles, WORK_HEADS)
            end_query = gl.load(row_ptr + 5)
            gradient_head = head
            if IS_PARTIALS:
                gradient_head = head * MODALITIES + modality
            for first_query in range(gl.load(row_ptr + 4), end_query, BLOCK_Q):
                slot, phase = ring_slot(step, STAGES)
                mbarrier.wait(empty.index(slot), phase ^ 1)
                mbarrier.expect(full.index(slot), 2 * BLOCK_Q * BLOCK_D * 2 + TERMS * BLOCK_Q * 4)
                load_rows(query_desc, first_query, end_query, head, full.index(slot), query_smem.index(slot))
                load_rows(
                    grad_output_desc,
                    first_query,
                    end_query,
                    gradient_head,
                    full.index(slot),
                    grad_output_smem.index(slot),
                )
                load_tile(
                    terms_desc,
                    [0, head * MODALITIES + modality, first_query + shift],
                    full.index(slot),
                    terms_smem.index(slot),
                )
                step += 1


@gluon.jit
def _key_value_consumer(
    PART: gl.constexpr,
    buffers,
    key_full,
    ring,
    work,
    outputs,  # pointers of grad_key, grad_value
    visible_ptr,
    scale,
    scale2,  # scale / ln 2
    HEAD_DIM: gl.constexpr,
    KEY_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    MODALITIES: gl.constexpr,
    WORK_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_GATE: gl.constexpr,
):
    """Sum the gradients of ROWS keys over all visits."""
    query_smem, grad_output_smem, key_smem, value_smem, terms_smem = buffers
    full, empty = ring
    work_ptr, num_tiles = work
    grad_key_ptr, grad_value_ptr = outputs
    BLOCK_Q: gl.constexpr = query_smem.shape[3]
    BLOCK_D: gl.constexpr = query_smem.shape[5]
    DTYPE: gl.constexpr = query_smem.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    BY_QUERY: gl.constexpr = gl.SliceLayout(0, SCORES)
    HAS_VISIBLE: gl.constexpr = visible_ptr is not None
    item = first_item()
    tile = item // KEY_HEADS
    key_head = item % KEY_HEADS
    row_ptr = _key_work(work_ptr, tile, key_head * GROUP, num_tiles, WORK_HEADS)
    first_key = gl.load(row_ptr) + ROWS * PART
    modality = gl.load(row_ptr + 2)
    grad_key = gl.zeros([ROWS, BLOCK_D], gl.float32, OUTPUT)
    grad_value = gl.zeros([ROWS, BLOCK_D], gl.float32, OUTPUT)
    zeros = gl.zeros([ROWS, BLOCK_Q], gl.float32, SCORES)
    key = key_smem.index(PART).reshape([ROWS, BLOCK_D])
    value = value_smem.index(PART).reshape([ROWS, BLOCK_D])
    visits = _count_visits(work_ptr, tile, key_head * GROUP, num_tiles, BLOCK_Q, GROUP, WORK_HEADS)
    if visits > 0:
        mbarrier.wait(key_full.index(PART), 0)
    first_query = 0
    end_query = 0
    full_low = 0
    full_high = 0
    for step in range(visits):
        if HAS_VISIBLE:
            while first_query >= end_query:  # the next head of the group that visits
                first_query = gl.load(row_ptr + 4)
                end_query = gl.load(row_ptr + 5)
                full_low = gl.load(row_ptr + 6)
                full_high = gl.load(row_ptr + 7)
                if WORK_HEADS > 1:
                    row_ptr += num_tiles * ENTRY
        slot, phase = ring_slot(step, STAGES)
        query = query_smem.index(slot).reshape([BLOCK_Q, BLOCK_D])
        grad_output = grad_output_smem.index(slot).reshape([BLOCK_Q, BLOCK_D])
        terms = terms_smem.index(slot).reshape([TERMS, BLOCK_Q])
        mbarrier.wait(full.index(slot), phase)
        scores = warpgroup_mma(key, query.permute((1, 0)), zeros, use_acc=False, is_async=True)
        grad_probs = warpgroup_mma(value, grad_output.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        # [1, BLOCK_Q], as gate, slope and shift below; loaded after the wait, they need no registers during it
        offset = terms.slice(0, 1).load(SCORES)
        # [ROWS, BLOCK_Q], under V dO^T
        probs = gl.exp2(scores * scale2 + offset)
        if HAS_VISIBLE:  # noqa: SIM102 (decided when compiled)
            if (first_query < full_low) | (first_query + BLOCK_Q > full_high):
                offs_q = gl.arange(0, BLOCK_Q, BY_QUERY)
                mask_q = first_query + offs_q < end_query
                low, high = load_visible(visible_ptr, first_query, modality, offs_q, mask_q, MODALITIES)
                offs_k = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
                sees = (offs_k[:, None] >= low[None, :]) & (offs_k[:, None] < high[None, :])
                probs = gl.where(sees, probs, 0.0)
        weights = probs
        if HAS_GATE:
            weights = probs * terms.slice(3, 1).load(SCORES)
        weights = gl.convert_layout(weights.to(DTYPE), LEFT)
        grad_value = warpgroup_mma(weights, grad_output, grad_value, is_async=True)
        # Passed at once; the branch keeps ptxas from hoisting the next wait above exp2.
        mbarrier.wait(full.index(slot), phase)
        grad_probs = warpgroup_mma_wait(1, deps=(grad_probs,))
        slope = terms.slice(2, 1).load(SCORES)
        shift = terms.slice(1, 1).load(SCORES)
        # dz = p (slope R + shift), under P dO
        grad_scores = (probs * (grad_probs * slope + shift)).to(DTYPE)
        grad_key = warpgroup_mma(gl.convert_layout(grad_scores, LEFT), query, grad_key, is_async=True)
        grad_value, grad_key = warpgroup_mma_wait(0, deps=(grad_value, grad_key))
        mbarrier.arrive(empty.index(slot), count=1)
        first_query += BLOCK_Q
    # read again rather than kept in registers through the loops
    item = first_item()
    key_head = item % KEY_HEADS
    row_ptr = _key_work(work_ptr, item // KEY_HEADS, 0, num_tiles, WORK_HEADS)
    first_key = gl.load(row_ptr) + ROWS * PART
    end_key = gl.load(row_ptr + 1)
    start = (first_key.to(gl.int64) * KEY_HEADS + key_head) * HEAD_DIM
    store_rows(
        grad_key_ptr + start, grad_key * scale, KEY_HEADS * HEAD_DIM, None, (0, 0),
        first_key, end_key, key_head, DTYPE, HEAD_DIM,
    )  # fmt: skip
    store_rows(
        grad_value_ptr + start, grad_value, KEY_HEADS * HEAD_DIM, None, (0, 0),
        first_key, end_key, key_head, DTYPE, HEAD_DIM,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tiles"])
def _attention_backward_key_value_hopper_kernel(
    query_desc,
    grad_output_desc,
    key_desc,
    value_desc,
    terms_desc,
    grad_key_ptr,
    grad_value_ptr,
    visible_ptr,
    work_ptr,
    scale,
    scale2,
    num_tiles,
    HEAD_DIM: gl.constexpr,
    KEY_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    MODALITIES: gl.constexpr,
    WORK_HEADS: gl.constexpr,
    IS_PARTIALS: gl.constexpr,
    HAS_GATE: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Set up the ring and start producer and consumers on one (key tile, key head)."""
    query_smem = allocate_boxes(query_desc, STAGES)
    grad_output_smem = allocate_boxes(query_desc, STAGES)
    key_smem = allocate_boxes(key_desc, CONSUMERS)
    value_smem = allocate_boxes(key_desc, CONSUMERS)
    terms_smem = allocate_boxes(terms_desc, STAGES)
    key_full = allocate_barriers(CONSUMERS, 1)
    full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, CONSUMERS)
    fence_async_shared()
    descriptors = (query_desc, grad_output_desc, key_desc, value_desc, terms_desc)
    buffers = (query_smem, grad_output_smem, key_smem, value_smem, terms_smem)
    ring = (full, empty)
    work = (work_ptr, num_tiles)
    outputs = (grad_key_ptr, grad_value_ptr)
    gl.warp_specialize(
        [
            (
                _key_value_consumer,
                (0, buffers, key_full, ring, work, outputs, visible_ptr, scale, scale2,
                 HEAD_DIM, KEY_HEADS, GROUP, MODALITIES, WORK_HEADS, STAGES, HAS_GATE),
            ),
            (
                _key_value_consumer,
                (1, buffers, key_full, ring, work, outputs, visible_ptr, scale, scale2,
                 HEAD_DIM, KEY_HEADS, GROUP, MODALITIES, WORK_HEADS, STAGES, HAS_GATE),
            ),
            (
                _key_value_producer,
                (descriptors, buffers, key_full, ring, work,
                 KEY_HEADS, GROUP, MODALITIES, WORK_HEADS, STAGES, IS_PARTIALS),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
