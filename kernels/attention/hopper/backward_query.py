"""Gradients of queries, gates and priors on Hopper: warp-specialised, fed by TMA, without atomics.

    p_ij = exp2(scale2 q_i.k_j + offset_i)       R_ij = grad_output_i.v_j       dz_ij = p_ij (slope_i R_ij + shift_i)
    dq_i = scale sum_j dz_ij k_j                 dgate_i,m = sum_{j in m} p_ij R_ij
    dlog_prior_i,m = slope_i dgate_i,m + shift_i mass_i,m

with offset, shift and slope from the portable `backward_rows`; the formulas stand there. DELTA_ONLY is the pass that
the per-modality softmax needs before this one: two of the three products, and shift = -slope dgate into the row
terms.

A CTA owns 128 queries of one sample and one head, a consumer (4 warps) 64 of them; the producer (1 warp) streams the
key and value tiles of all segments. exp2 runs under dO V^T. A segment's row terms are loaded and its gradients
stored when the segment changes, for partials also its output gradient.

Precision: p, R and dz in float32, dz rounded once to the keys' dtype for its product; sums in float32; grad_query
rounded once. Determinism: fixed order, bitwise reproducible."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmm.kernels.attention.hopper.ragged import load_rows
from fusedmm.kernels.attention.hopper.tiles import (
    CONSUMERS,
    ENTRY,
    ROWS,
    allocate_barriers,
    allocate_boxes,
    first_item,
    load_entry,
    load_visible,
    mask_tile,
    ring_slot,
    store_rows,
    work_row,
)


@gluon.jit
def _query_producer(
    descriptors,  # query, grad_output, key, value
    buffers,  # query, grad_output, key, value
    query_full,  # [CONSUMERS]
    gradient_ring,  # full, empty, [CONSUMERS]
    ring,  # full, empty
    work,  # pointer, number of tiles
    QUERY_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    MODALITIES: gl.constexpr,
    WORK_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    IS_PARTIALS: gl.constexpr,
):
    """Load the queries, then every tile of keys and values; the output gradient once, for partials once a segment."""
    query_desc, grad_output_desc, key_desc, value_desc = descriptors
    query_smem, grad_output_smem, key_smem, value_smem = buffers
    gradient_full, gradient_empty = gradient_ring
    full, empty = ring
    work_ptr, num_tiles = work
    BLOCK_K: gl.constexpr = key_smem.shape[3]
    BYTES: gl.constexpr = key_smem.shape[5] * 2  # a row
    item = first_item()
    tile = item // QUERY_HEADS
    head = item % QUERY_HEADS
    entry_ptr = work_row(work_ptr, tile, head, num_tiles, MODALITIES, WORK_HEADS)
    first_query, end_query, _, tiles, _ = load_entry(entry_ptr)
    if tiles > 0:
        for part in gl.static_range(CONSUMERS):
            row = first_query + ROWS * part
            mbarrier.expect(query_full.index(part), ROWS * BYTES)
            load_rows(query_desc, row, end_query, head, query_full.index(part), query_smem.index(part))
    key = 0
    high = 0
    segment = 0
    GRADIENTS: gl.constexpr = MODALITIES if IS_PARTIALS else 1
    for step in range(tiles):
        if key >= high:
            entry_ptr += ENTRY
            modality, key, _, _, high = load_entry(entry_ptr)
            if segment < GRADIENTS:
                gradient_head = head
                if IS_PARTIALS:
                    gradient_head = head * MODALITIES + modality
                for part in gl.static_range(CONSUMERS):
                    row = first_query + ROWS * part
                    mbarrier.wait(gradient_empty.index(part), (segment & 1) ^ 1)
                    mbarrier.expect(gradient_full.index(part), ROWS * BYTES)
                    load_rows(
                        grad_output_desc, row, end_query, gradient_head, gradient_full.index(part),
                        grad_output_smem.index(part),
                    )  # fmt: skip
            segment += 1
        slot, phase = ring_slot(step, STAGES)
        mbarrier.wait(empty.index(slot), phase ^ 1)
        mbarrier.expect(full.index(slot), 2 * BLOCK_K * BYTES)
        load_rows(key_desc, key, high, head // GROUP, full.index(slot), key_smem.index(slot))
        load_rows(value_desc, key, high, head // GROUP, full.index(slot), value_smem.index(slot))
        key += BLOCK_K


@gluon.jit
def _store_segment(
    grad_gate, slope, shift, outputs, terms_ptr, stats_start, offs, mask, plane, DELTA_ONLY: gl.constexpr
):
    """What a segment leaves behind: dgate and dlog_prior, or the shift of the per-modality softmax."""
    _, grad_log_prior_ptr, grad_gate_ptr, mass_ptr = outputs
    if DELTA_ONLY:
        gl.store(terms_ptr + plane, -slope * grad_gate)
    else:
        if grad_gate_ptr is not None:
            gl.store(grad_gate_ptr + stats_start + offs, grad_gate, mask=mask)
        if grad_log_prior_ptr is not None:
            mass = gl.load(mass_ptr + stats_start + offs, mask=mask, other=0.0)
            gl.store(grad_log_prior_ptr + stats_start + offs, slope * grad_gate + shift * mass, mask=mask)


@gluon.jit
def _query_consumer(
    PART: gl.constexpr,
    buffers,
    query_full,
    gradient_ring,
    ring,
    work,
    outputs,  # pointers of grad_query, grad_log_prior or None, grad_gate or None, mass
    terms,  # pointer of the row terms, padded rows
    visible_ptr,
    scale,
    scale2,  # scale / ln 2
    HEAD_DIM: gl.constexpr,
    QUERY_HEADS: gl.constexpr,
    MODALITIES: gl.constexpr,
    WORK_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    IS_PARTIALS: gl.constexpr,
    DELTA_ONLY: gl.constexpr,
):
    """Sum the gradients of ROWS queries over all their keys."""
    query_smem, grad_output_smem, key_smem, value_smem = buffers
    gradient_full, gradient_empty = gradient_ring
    full, empty = ring
    work_ptr, num_tiles = work
    grad_query_ptr, grad_log_prior_ptr, grad_gate_ptr, _ = outputs
    row_terms_ptr, padded_rows = terms
    BLOCK_K: gl.constexpr = key_smem.shape[3]
    BLOCK_D: gl.constexpr = key_smem.shape[5]
    DTYPE: gl.constexpr = key_smem.dtype
    HAS_VISIBLE: gl.constexpr = visible_ptr is not None
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    GRADIENTS: gl.constexpr = MODALITIES if IS_PARTIALS else 1
    item = first_item()
    tile = item // QUERY_HEADS
    head = item % QUERY_HEADS
    item_ptr = work_row(work_ptr, tile, head, num_tiles, MODALITIES, WORK_HEADS)
    first_query, end_query, _, tiles, padded_row = load_entry(item_ptr)
    first_query += ROWS * PART
    offs_q = gl.arange(0, ROWS, BY_ROW)
    mask_q = first_query + offs_q < end_query
    stats_start = (first_query.to(gl.int64) * QUERY_HEADS + head) * MODALITIES
    offs_stats = offs_q * (QUERY_HEADS * MODALITIES)
    plane = padded_rows * (QUERY_HEADS * MODALITIES)
    head_terms_ptr = row_terms_ptr + padded_rows * (head * MODALITIES) + padded_row + ROWS * PART + offs_q
    grad_query = gl.zeros([ROWS, BLOCK_D], gl.float32, OUTPUT)
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)
    grad_gate = gl.zeros([ROWS], gl.float32, BY_ROW)
    offset = gl.zeros([ROWS], gl.float32, BY_ROW)
    shift = offset
    slope = offset
    row_low = gl.zeros([ROWS], gl.int32, BY_ROW)
    row_high = row_low
    if not DELTA_ONLY:
        # modalities that no row sees keep these zeros
        for unseen in range(MODALITIES):
            if grad_gate_ptr is not None:
                gl.store(grad_gate_ptr + stats_start + unseen + offs_stats, grad_gate, mask=mask_q)
            if grad_log_prior_ptr is not None:
                gl.store(grad_log_prior_ptr + stats_start + unseen + offs_stats, grad_gate, mask=mask_q)
    query = query_smem.index(PART).reshape([ROWS, BLOCK_D])
    grad_output = grad_output_smem.index(PART).reshape([ROWS, BLOCK_D])
    if tiles > 0:
        mbarrier.wait(query_full.index(PART), 0)
    entry_ptr = item_ptr
    terms_ptr = head_terms_ptr
    modality = 0
    key = 0
    full_low = 0
    full_high = 0
    high = 0
    segment = 0
    for step in range(tiles):
        if key >= high:
            if segment > 0:
                _store_segment(
                    grad_gate,
                    slope,
                    shift,
                    outputs,
                    terms_ptr,
                    stats_start + modality,
                    offs_stats,
                    mask_q,
                    plane,
                    DELTA_ONLY,
                )
                grad_gate = grad_gate * 0.0
                if IS_PARTIALS:
                    mbarrier.arrive(gradient_empty.index(PART), count=1)
            entry_ptr += ENTRY
            modality, key, full_low, full_high, high = load_entry(entry_ptr)
            if segment < GRADIENTS:
                mbarrier.wait(gradient_full.index(PART), segment & 1)
            segment += 1
            terms_ptr = head_terms_ptr + padded_rows * modality
            offset = gl.load(terms_ptr)
            shift = gl.load(terms_ptr + plane)
            slope = gl.load(terms_ptr + 2 * plane)
            if HAS_VISIBLE:
                row_low, row_high = load_visible(visible_ptr, first_query, modality, offs_q, mask_q, MODALITIES)
        slot, phase = ring_slot(step, STAGES)
        key_tile = key_smem.index(slot).reshape([BLOCK_K, BLOCK_D])
        value_tile = value_smem.index(slot).reshape([BLOCK_K, BLOCK_D])
        mbarrier.wait(full.index(slot), phase)
        scores = warpgroup_mma(query, key_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        grad_probs = warpgroup_mma(grad_output, value_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        # [ROWS, BLOCK_K], under dO V^T; masked after exp2, for a zero score may overflow where lse is very negative
        probs = gl.exp2(scores * scale2 + offset[:, None])
        probs = mask_tile(probs, 0.0, key, full_low, full_high, high, row_low, row_high, SCORES, HAS_VISIBLE)
        # Passed at once; the branch keeps ptxas from hoisting the next wait above exp2.
        mbarrier.wait(full.index(slot), phase)
        grad_probs = warpgroup_mma_wait(0, deps=(grad_probs,))
        grad_gate += gl.sum(probs * grad_probs, 1)
        if not DELTA_ONLY:
            grad_scores = (probs * (grad_probs * slope[:, None] + shift[:, None])).to(DTYPE)
            grad_query = warpgroup_mma(gl.convert_layout(grad_scores, LEFT), key_tile, grad_query, is_async=True)
            grad_query = warpgroup_mma_wait(0, deps=(grad_query,))
        mbarrier.arrive(empty.index(slot), count=1)
        key += BLOCK_K
    if tiles > 0:
        _store_segment(
            grad_gate, slope, shift, outputs, terms_ptr, stats_start + modality, offs_stats, mask_q, plane, DELTA_ONLY
        )
    if not DELTA_ONLY:
        start = (first_query.to(gl.int64) * QUERY_HEADS + head) * HEAD_DIM
        store_rows(
            grad_query_ptr + start, grad_query * scale, QUERY_HEADS * HEAD_DIM, None, (0, 0),
            first_query, end_query, head, DTYPE, HEAD_DIM,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tiles"])
def _attention_backward_query_hopper_kernel(
    query_desc,
    grad_output_desc,
    key_desc,
    value_desc,
    grad_query_ptr,
    grad_log_prior_ptr,
    grad_gate_ptr,
    mass_ptr,
    row_terms_ptr,
    visible_ptr,
    work_ptr,
    scale,
    scale2,
    num_tiles,
    padded_rows: gl.int64,
    HEAD_DIM: gl.constexpr,
    QUERY_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    MODALITIES: gl.constexpr,
    WORK_HEADS: gl.constexpr,
    IS_PARTIALS: gl.constexpr,
    DELTA_ONLY: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Set up the rings and start producer and consumers on one (query tile, head)."""
    query_smem = allocate_boxes(query_desc, CONSUMERS)
    grad_output_smem = allocate_boxes(query_desc, CONSUMERS)
    key_smem = allocate_boxes(key_desc, STAGES)
    value_smem = allocate_boxes(key_desc, STAGES)
    query_full = allocate_barriers(CONSUMERS, 1)
    gradient_full = allocate_barriers(CONSUMERS, 1)
    gradient_empty = allocate_barriers(CONSUMERS, 1)
    full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, CONSUMERS)
    fence_async_shared()
    descriptors = (query_desc, grad_output_desc, key_desc, value_desc)
    buffers = (query_smem, grad_output_smem, key_smem, value_smem)
    gradient_ring = (gradient_full, gradient_empty)
    ring = (full, empty)
    work = (work_ptr, num_tiles)
    outputs = (grad_query_ptr, grad_log_prior_ptr, grad_gate_ptr, mass_ptr)
    terms = (row_terms_ptr, padded_rows)
    gl.warp_specialize(
        [
            (
                _query_consumer,
                (0, buffers, query_full, gradient_ring, ring, work, outputs, terms, visible_ptr, scale, scale2,
                 HEAD_DIM, QUERY_HEADS, MODALITIES, WORK_HEADS, STAGES, IS_PARTIALS, DELTA_ONLY),
            ),
            (
                _query_consumer,
                (1, buffers, query_full, gradient_ring, ring, work, outputs, terms, visible_ptr, scale, scale2,
                 HEAD_DIM, QUERY_HEADS, MODALITIES, WORK_HEADS, STAGES, IS_PARTIALS, DELTA_ONLY),
            ),
            (
                _query_producer,
                (descriptors, buffers, query_full, gradient_ring, ring, work,
                 QUERY_HEADS, GROUP, MODALITIES, WORK_HEADS, STAGES, IS_PARTIALS),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
