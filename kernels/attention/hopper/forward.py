"""Forward of gated multimodal attention on Hopper: persistent, warp-specialised, fed by TMA. Here the joint softmax.

    z_j    = scale q.k_j + log_prior[m(j)]
    lse_m  = log sum_{j in m} exp(z_j)
    mass_m = exp(lse_m - logsumexp_m lse_m)
    output = sigmoid(output_gate) sum_m gate_m sum_{j in m} exp(z_j - logsumexp_m lse_m) v_j

One CTA an SM takes items (query tile, head) in turn. Its producer (1 warp) streams the key and value tiles of all
segments of the item through a ring in shared memory; two consumers (4 warps and 64 rows each) keep two products in
flight: while S_i = Q K_i is awaited, O += P_{i-1} V_{i-1} runs, and the softmax of tile i runs under it. A tile lies
in one segment, so prior and gate are one number a row: the prior is part of the exponent's offset (no instruction),
the gate one FMUL an element, mass and lse nothing inside the loop; a change of segment happens while products run.

Rows past the end of a segment arrive as zeros (ragged.py) and their scores are masked, so nothing of a neighbour is
ever multiplied. A row that sees nothing has lse -inf, mass 0 and output 0, never NaN. Precision: scores, softmax and
accumulator in float32; probabilities times gate are rounded to the values' dtype for the second product; the output
is rounded once, and so is lse, in float64 up to there. A modality so far below those before it that its sum underflows
is left with lse -inf, for `faint` to sum once more: nothing of that is in the loop. Determinism: no atomics, fixed
order: bitwise reproducible. Source: Shah et al. 2024, "FlashAttention-3", section 3 (warp specialisation, overlap
within a warpgroup).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmm.kernels.attention.hopper.compat import partition_barrier
from fusedmm.kernels.attention.hopper.forward_separate import separate_consumer
from fusedmm.kernels.attention.hopper.ragged import load_rows
from fusedmm.kernels.attention.hopper.tiles import (
    CONSUMERS,
    ENTRY,
    HIDDEN,
    LOG2_E,
    ROWS,
    allocate_barriers,
    allocate_boxes,
    decode_item,
    first_item,
    load_entry,
    load_factor,
    load_visible,
    mask_tile,
    natural_lse,
    ring_slot,
    softmax_tile,
    store_rows,
    work_row,
)


@gluon.jit
def _forward_producer(
    descriptors,  # query, key, value
    buffers,  # [CONSUMERS, box], [STAGES, box], [STAGES, box]
    query_ring,  # full, empty
    key_ring,
    value_ring,
    work,  # pointer, number of tiles, of items, of programs
    GROUP: gl.constexpr,
    MODALITIES: gl.constexpr,
    WORK_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load what the consumers of this CTA will ask for, in their order, as far ahead as the rings allow."""
    query_desc, key_desc, value_desc = descriptors
    query_smem, key_smem, value_smem = buffers
    query_full, query_empty = query_ring
    key_full, key_empty = key_ring
    value_full, value_empty = value_ring
    work_ptr, num_tiles, num_items, num_programs = work
    BLOCK_K: gl.constexpr = key_smem.shape[3]
    QUERY_BYTES: gl.constexpr = ROWS * query_smem.shape[5] * 2
    KEY_BYTES: gl.constexpr = BLOCK_K * key_smem.shape[5] * 2
    step = 0
    turn = 0
    for item in range(first_item(), num_items, num_programs):
        tile, head = decode_item(item, num_tiles, GROUP)
        entry_ptr = work_row(work_ptr, tile, head, num_tiles, MODALITIES, WORK_HEADS)
        first_query, end_query, _, tiles, _ = load_entry(entry_ptr)
        for part in gl.static_range(CONSUMERS):
            mbarrier.wait(query_empty.index(part), (turn & 1) ^ 1)
            mbarrier.expect(query_full.index(part), QUERY_BYTES)
            load_rows(
                query_desc, first_query + ROWS * part, end_query, head, query_full.index(part), query_smem.index(part)
            )
        key = 0
        high = 0
        for _ in range(tiles):
            if key >= high:
                entry_ptr += ENTRY
                _, key, _, _, high = load_entry(entry_ptr)
            slot, phase = ring_slot(step, STAGES)
            mbarrier.wait(key_empty.index(slot), phase ^ 1)
            mbarrier.expect(key_full.index(slot), KEY_BYTES)
            load_rows(key_desc, key, high, head // GROUP, key_full.index(slot), key_smem.index(slot))
            mbarrier.wait(value_empty.index(slot), phase ^ 1)
            mbarrier.expect(value_full.index(slot), KEY_BYTES)
            load_rows(value_desc, key, high, head // GROUP, value_full.index(slot), value_smem.index(slot))
            key += BLOCK_K
            step += 1
        turn += 1  # noqa: SIM113 (device code has no enumerate)


@gluon.jit
def _joint_consumer(
    PART: gl.constexpr,
    buffers,
    query_ring,
    key_ring,
    value_ring,
    work,
    outputs,  # pointers of output, mass, lse
    factors,  # pointers of log_prior, gate, output_gate, visible, or None
    strides,  # of log_prior, gate, output_gate
    scale2,  # scale / ln 2
    HEAD_DIM: gl.constexpr,
    QUERY_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    MODALITIES: gl.constexpr,
    WORK_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attend ROWS rows of each item."""
    query_smem, key_smem, value_smem = buffers
    query_full, query_empty = query_ring
    key_full, key_empty = key_ring
    value_full, value_empty = value_ring
    work_ptr, num_tiles, num_items, num_programs = work
    output_ptr, mass_ptr, lse_ptr = outputs
    log_prior_ptr, gate_ptr, output_gate_ptr, visible_ptr = factors
    log_prior_strides, gate_strides, output_gate_strides = strides
    BLOCK_K: gl.constexpr = key_smem.shape[3]
    BLOCK_D: gl.constexpr = key_smem.shape[5]
    DTYPE: gl.constexpr = key_smem.dtype
    HAS_VISIBLE: gl.constexpr = visible_ptr is not None
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    offs_q = gl.arange(0, ROWS, BY_ROW)
    offs_stats = offs_q * (QUERY_HEADS * MODALITIES)
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)
    query = query_smem.index(PART).reshape([ROWS, BLOCK_D])
    step = 0
    turn = 0
    for item in range(first_item(), num_items, num_programs):
        tile, head = decode_item(item, num_tiles, GROUP)
        item_ptr = work_row(work_ptr, tile, head, num_tiles, MODALITIES, WORK_HEADS)
        first_query, end_query, _, tiles, _ = load_entry(item_ptr)
        first_query += ROWS * PART
        mask_q = first_query + offs_q < end_query
        stats_start = (first_query.to(gl.int64) * QUERY_HEADS + head) * MODALITIES
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, OUTPUT)
        running_max = gl.full([ROWS], HIDDEN, gl.float32, BY_ROW)
        segment_sum = gl.zeros([ROWS], gl.float32, BY_ROW)  # of the current segment
        older_sum = gl.zeros([ROWS], gl.float32, BY_ROW)  # of those before it
        prior = gl.zeros([ROWS], gl.float32, BY_ROW)
        gate = prior
        row_low = gl.zeros([ROWS], gl.int32, BY_ROW)
        row_high = row_low
        mbarrier.wait(query_full.index(PART), turn & 1)
        if tiles > 0:
            entry_ptr = item_ptr + ENTRY
            modality, key, full_low, full_high, high = load_entry(entry_ptr)
            slot, phase = ring_slot(step, STAGES)
            mbarrier.wait(key_full.index(slot), phase)
            key_tile = key_smem.index(slot).reshape([BLOCK_K, BLOCK_D]).permute((1, 0))
            scores = warpgroup_mma(query, key_tile, zeros, use_acc=False, is_async=True)
            if log_prior_ptr is not None:
                prior = (
                    load_factor(log_prior_ptr, log_prior_strides, first_query, head, modality, offs_q, mask_q) * LOG2_E
                )
            if gate_ptr is not None:
                gate = load_factor(gate_ptr, gate_strides, first_query, head, modality, offs_q, mask_q)
            if HAS_VISIBLE:
                row_low, row_high = load_visible(visible_ptr, first_query, modality, offs_q, mask_q, MODALITIES)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(key_empty.index(slot), count=1)
            scores = mask_tile(
                scores, -float("inf"), key, full_low, full_high, high, row_low, row_high, SCORES, HAS_VISIBLE
            )
            probs, segment_sum, _, running_max = softmax_tile(scores, running_max, prior, scale2)
            if gate_ptr is not None:
                probs = probs * gate[:, None]
            weights = gl.convert_layout(probs.to(DTYPE), PROBS)
            mbarrier.wait(value_full.index(slot), phase)
            key += BLOCK_K
            step += 1
            for _ in range(1, tiles):
                previous = modality
                changed = key >= high
                if changed:
                    entry_ptr += ENTRY
                    modality, key, full_low, full_high, high = load_entry(entry_ptr)
                last_slot = slot
                slot, phase = ring_slot(step, STAGES)
                mbarrier.wait(key_full.index(slot), phase)
                key_tile = key_smem.index(slot).reshape([BLOCK_K, BLOCK_D]).permute((1, 0))
                scores = warpgroup_mma(query, key_tile, zeros, use_acc=False, is_async=True)
                value_tile = value_smem.index(last_slot).reshape([BLOCK_K, BLOCK_D])
                acc = warpgroup_mma(weights, value_tile, acc, is_async=True)
                if changed:  # while the two products run
                    segment_lse = natural_lse(running_max, segment_sum)
                    gl.store(lse_ptr + stats_start + previous + offs_stats, segment_lse, mask=mask_q)
                    older_sum += segment_sum
                    segment_sum = segment_sum * 0.0
                    if log_prior_ptr is not None:
                        prior = (
                            load_factor(log_prior_ptr, log_prior_strides, first_query, head, modality, offs_q, mask_q)
                            * LOG2_E
                        )
                    if gate_ptr is not None:
                        gate = load_factor(gate_ptr, gate_strides, first_query, head, modality, offs_q, mask_q)
                    if HAS_VISIBLE:
                        row_low, row_high = load_visible(visible_ptr, first_query, modality, offs_q, mask_q, MODALITIES)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                mbarrier.arrive(key_empty.index(slot), count=1)
                scores = mask_tile(
                    scores, -float("inf"), key, full_low, full_high, high, row_low, row_high, SCORES, HAS_VISIBLE
                )
                probs, sums, rescale, running_max = softmax_tile(scores, running_max, prior, scale2)
                segment_sum = segment_sum * rescale + sums
                older_sum = older_sum * rescale
                if gate_ptr is not None:
                    probs = probs * gate[:, None]
                # V_i is due here anyway; without this wait ptxas hoists that for P V_{i-1} above the softmax.
                mbarrier.wait(value_full.index(slot), phase)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(value_empty.index(last_slot), count=1)
                acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
                weights = gl.convert_layout(probs.to(DTYPE), PROBS)
                key += BLOCK_K
                step += 1
            mbarrier.arrive(query_empty.index(PART), count=1)
            acc = warpgroup_mma(weights, value_smem.index(slot).reshape([BLOCK_K, BLOCK_D]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(value_empty.index(slot), count=1)
            segment_lse = natural_lse(running_max, segment_sum)
            gl.store(lse_ptr + stats_start + modality + offs_stats, segment_lse, mask=mask_q)
        else:
            mbarrier.arrive(query_empty.index(PART), count=1)
        # read again rather than kept in registers through the loop
        first_query, end_query, segments, _, _ = load_entry(item_ptr)
        first_query += ROWS * PART
        mask_q = first_query + offs_q < end_query
        stats_start = (first_query.to(gl.int64) * QUERY_HEADS + head) * MODALITIES
        total = older_sum + segment_sum
        total = gl.where(total == 0.0, 1.0, total)
        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUTPUT))[:, None]
        start = (first_query.to(gl.int64) * QUERY_HEADS + head) * HEAD_DIM
        store_rows(
            output_ptr + start, acc, QUERY_HEADS * HEAD_DIM, output_gate_ptr, output_gate_strides,
            first_query, end_query, head, DTYPE, HEAD_DIM,
        )  # fmt: skip
        partition_barrier()  # one of the threads that hold a row stored its statistics; all of them read it
        _store_mass(
            mass_ptr + stats_start, lse_ptr + stats_start, item_ptr, segments, natural_lse(running_max, total),
            offs_stats, mask_q, MODALITIES,
        )  # fmt: skip
        turn += 1  # noqa: SIM113 (device code has no enumerate)


@gluon.jit
def _store_mass(mass_ptr, lse_ptr, item_ptr, segments, total_lse, offs, mask, MODALITIES: gl.constexpr):
    """Mass of every modality from the lse stored in the loop; 0 and -inf where unlisted."""
    listed = 0
    for modality in range(MODALITIES):
        lse = gl.full([ROWS], -float("inf"), gl.float32, offs.type.layout)
        candidate = gl.load(item_ptr + (1 + listed) * ENTRY)
        if (listed < segments) & (candidate == modality):
            lse = gl.load(lse_ptr + modality + offs, mask=mask, other=-float("inf"))
            listed += 1
        gl.store(mass_ptr + modality + offs, gl.exp2((lse - total_lse) * LOG2_E), mask=mask)
        gl.store(lse_ptr + modality + offs, lse, mask=mask)


@gluon.jit(
    do_not_specialize=[
        *("num_tiles", "num_items", "num_programs"),
        *(f"{name}_stride_{dim}" for name in ("log_prior", "gate") for dim in "qhm"),
    ]
)
def _attention_forward_hopper_kernel(
    query_desc,
    key_desc,
    value_desc,
    output_ptr,
    mass_ptr,
    lse_ptr,
    log_prior_ptr,
    gate_ptr,
    output_gate_ptr,
    visible_ptr,
    work_ptr,
    scale2,
    num_tiles,
    num_items,
    num_programs,
    log_prior_stride_q: gl.int64,
    log_prior_stride_h: gl.int64,
    log_prior_stride_m: gl.int64,
    gate_stride_q: gl.int64,
    gate_stride_h: gl.int64,
    gate_stride_m: gl.int64,
    output_gate_stride_q: gl.int64,
    output_gate_stride_h: gl.int64,
    HEAD_DIM: gl.constexpr,
    QUERY_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    MODALITIES: gl.constexpr,
    WORK_HEADS: gl.constexpr,
    SOFTMAX: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Set up the rings and start producer and consumers; CTAs take items until none is left."""
    query_smem = allocate_boxes(query_desc, CONSUMERS)
    key_smem = allocate_boxes(key_desc, STAGES)
    value_smem = allocate_boxes(value_desc, STAGES)
    query_full = allocate_barriers(CONSUMERS, 1)
    query_empty = allocate_barriers(CONSUMERS, 1)
    key_full = allocate_barriers(STAGES, 1)
    key_empty = allocate_barriers(STAGES, CONSUMERS)
    value_full = allocate_barriers(STAGES, 1)
    value_empty = allocate_barriers(STAGES, CONSUMERS)
    fence_async_shared()
    descriptors = (query_desc, key_desc, value_desc)
    buffers = (query_smem, key_smem, value_smem)
    rings = ((query_full, query_empty), (key_full, key_empty), (value_full, value_empty))
    work = (work_ptr, num_tiles, num_items, num_programs)
    outputs = (output_ptr, mass_ptr, lse_ptr)
    factors = (log_prior_ptr, gate_ptr, output_gate_ptr, visible_ptr)
    strides = (
        (log_prior_stride_q, log_prior_stride_h, log_prior_stride_m),
        (gate_stride_q, gate_stride_h, gate_stride_m),
        (output_gate_stride_q, output_gate_stride_h),
    )
    if SOFTMAX == "joint":
        gl.warp_specialize(
            [
                (
                    _joint_consumer,
                    (0, buffers, rings[0], rings[1], rings[2], work, outputs, factors, strides, scale2,
                     HEAD_DIM, QUERY_HEADS, GROUP, MODALITIES, WORK_HEADS, STAGES),
                ),
                (
                    _joint_consumer,
                    (1, buffers, rings[0], rings[1], rings[2], work, outputs, factors, strides, scale2,
                     HEAD_DIM, QUERY_HEADS, GROUP, MODALITIES, WORK_HEADS, STAGES),
                ),
                (
                    _forward_producer,
                    (descriptors, buffers, rings[0], rings[1], rings[2], work,
                     GROUP, MODALITIES, WORK_HEADS, STAGES),
                ),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    separate_consumer,
                    (0, buffers, rings[0], rings[1], rings[2], work, outputs, factors, strides, scale2,
                     HEAD_DIM, QUERY_HEADS, GROUP, MODALITIES, WORK_HEADS, SOFTMAX == "partials", STAGES),
                ),
                (
                    separate_consumer,
                    (1, buffers, rings[0], rings[1], rings[2], work, outputs, factors, strides, scale2,
                     HEAD_DIM, QUERY_HEADS, GROUP, MODALITIES, WORK_HEADS, SOFTMAX == "partials", STAGES),
                ),
                (
                    _forward_producer,
                    (descriptors, buffers, rings[0], rings[1], rings[2], work,
                     GROUP, MODALITIES, WORK_HEADS, STAGES),
                ),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
