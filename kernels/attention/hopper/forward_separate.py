"""The consumer of the Hopper forward for one softmax a modality: ``per_modality`` and ``partials``.

    z_j    = scale q.k_j + log_prior[m(j)]          lse_m = log sum_{j in m} exp(z_j)
    o_m    = sum_{j in m} exp(z_j - lse_m) v_j      mass_m = 1 where something of m is visible, else 0
    per_modality: output = sigmoid(output_gate) sum_m gate_m o_m        partials: output_m = o_m

Setup and producer are those of `forward`; so is the loop over the tiles of a segment, with the softmax of tile i
under P_{i-1} V_{i-1}. A segment is finished before the next one starts: its accumulator is divided by its sum, and
added to the total (per_modality, in registers: no [query, modality, dim] tensor exists) or stored (partials)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from fusedmm.kernels.attention.hopper.tiles import (
    ENTRY,
    HIDDEN,
    LOG2_E,
    ROWS,
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
def separate_consumer(
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
    IS_PARTIALS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attend ROWS rows of each item, one segment after the other."""
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
    BY_OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    offs_q = gl.arange(0, ROWS, BY_ROW)
    offs_stats = offs_q * (QUERY_HEADS * MODALITIES)
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)
    nothing = gl.zeros([ROWS], gl.float32, BY_ROW)
    query = query_smem.index(PART).reshape([ROWS, BLOCK_D])
    step = 0
    turn = 0
    for item in range(first_item(), num_items, num_programs):
        tile, head = decode_item(item, num_tiles, GROUP)
        item_ptr = work_row(work_ptr, tile, head, num_tiles, MODALITIES, WORK_HEADS)
        first_query, end_query, segments, _, _ = load_entry(item_ptr)
        first_query += ROWS * PART
        mask_q = first_query + offs_q < end_query
        stats_start = (first_query.to(gl.int64) * QUERY_HEADS + head) * MODALITIES
        total = gl.zeros([ROWS, BLOCK_D], gl.float32, OUTPUT)
        # modalities that no row sees keep these
        for unseen in range(MODALITIES):
            gl.store(mass_ptr + stats_start + unseen + offs_stats, nothing, mask=mask_q)
            gl.store(lse_ptr + stats_start + unseen + offs_stats, nothing - float("inf"), mask=mask_q)
            if IS_PARTIALS:
                store_rows(
                    output_ptr + (stats_start + unseen) * HEAD_DIM, total, QUERY_HEADS * MODALITIES * HEAD_DIM, None,
                    (0, 0), first_query, end_query, head, DTYPE, HEAD_DIM,
                )  # fmt: skip
        mbarrier.wait(query_full.index(PART), turn & 1)
        for segment in range(segments):
            modality, key, full_low, full_high, high = load_entry(item_ptr + (1 + segment) * ENTRY)
            prior = nothing
            row_low = gl.zeros([ROWS], gl.int32, BY_ROW)
            row_high = row_low
            slot, phase = ring_slot(step, STAGES)
            mbarrier.wait(key_full.index(slot), phase)
            key_tile = key_smem.index(slot).reshape([BLOCK_K, BLOCK_D]).permute((1, 0))
            scores = warpgroup_mma(query, key_tile, zeros, use_acc=False, is_async=True)
            if log_prior_ptr is not None:
                prior = (
                    load_factor(log_prior_ptr, log_prior_strides, first_query, head, modality, offs_q, mask_q) * LOG2_E
                )
            if HAS_VISIBLE:
                row_low, row_high = load_visible(visible_ptr, first_query, modality, offs_q, mask_q, MODALITIES)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(key_empty.index(slot), count=1)
            scores = mask_tile(
                scores, -float("inf"), key, full_low, full_high, high, row_low, row_high, SCORES, HAS_VISIBLE
            )
            running_max = gl.full([ROWS], HIDDEN, gl.float32, BY_ROW)
            probs, running_sum, _, running_max = softmax_tile(scores, running_max, prior, scale2)
            weights = gl.convert_layout(probs.to(DTYPE), PROBS)
            acc = gl.zeros([ROWS, BLOCK_D], gl.float32, OUTPUT)
            mbarrier.wait(value_full.index(slot), phase)
            step += 1
            for first_key in range(key + BLOCK_K, high, BLOCK_K):
                last_slot = slot
                slot, phase = ring_slot(step, STAGES)
                mbarrier.wait(key_full.index(slot), phase)
                key_tile = key_smem.index(slot).reshape([BLOCK_K, BLOCK_D]).permute((1, 0))
                scores = warpgroup_mma(query, key_tile, zeros, use_acc=False, is_async=True)
                value_tile = value_smem.index(last_slot).reshape([BLOCK_K, BLOCK_D])
                acc = warpgroup_mma(weights, value_tile, acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                mbarrier.arrive(key_empty.index(slot), count=1)
                scores = mask_tile(
                    scores, -float("inf"), first_key, full_low, full_high, high, row_low, row_high, SCORES, HAS_VISIBLE
                )
                probs, sums, rescale, running_max = softmax_tile(scores, running_max, prior, scale2)
                running_sum = running_sum * rescale + sums
                # V_i is due here anyway; without this wait ptxas hoists that for P V_{i-1} above the softmax.
                mbarrier.wait(value_full.index(slot), phase)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(value_empty.index(last_slot), count=1)
                acc = acc * gl.convert_layout(rescale, BY_OUTPUT_ROW)[:, None]
                weights = gl.convert_layout(probs.to(DTYPE), PROBS)
                step += 1
            acc = warpgroup_mma(weights, value_smem.index(slot).reshape([BLOCK_K, BLOCK_D]), acc, is_async=True)
            # read again rather than kept in registers through the loop
            first_query, end_query, _, _, _ = load_entry(item_ptr)
            first_query += ROWS * PART
            mask_q = first_query + offs_q < end_query
            stats_start = (first_query.to(gl.int64) * QUERY_HEADS + head) * MODALITIES
            segment_start = stats_start + modality
            lse = natural_lse(running_max, running_sum)
            mass = gl.where(running_sum > 0.0, 1.0, 0.0)
            gl.store(lse_ptr + segment_start + offs_stats, lse, mask=mask_q)
            gl.store(mass_ptr + segment_start + offs_stats, mass, mask=mask_q)
            share = mass / gl.where(running_sum > 0.0, running_sum, 1.0)
            if gate_ptr is not None:
                share = share * load_factor(gate_ptr, gate_strides, first_query, head, modality, offs_q, mask_q)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(value_empty.index(slot), count=1)
            acc = acc * gl.convert_layout(share, BY_OUTPUT_ROW)[:, None]
            if IS_PARTIALS:
                store_rows(
                    output_ptr + segment_start * HEAD_DIM, acc, QUERY_HEADS * MODALITIES * HEAD_DIM, None,
                    (0, 0), first_query, end_query, head, DTYPE, HEAD_DIM,
                )  # fmt: skip
            else:
                total += acc
        mbarrier.arrive(query_empty.index(PART), count=1)
        if not IS_PARTIALS:
            start = (first_query.to(gl.int64) * QUERY_HEADS + head) * HEAD_DIM
            store_rows(
                output_ptr + start, total, QUERY_HEADS * HEAD_DIM, output_gate_ptr, output_gate_strides,
                first_query, end_query, head, DTYPE, HEAD_DIM,
            )  # fmt: skip
        turn += 1  # noqa: SIM113 (device code has no enumerate)
