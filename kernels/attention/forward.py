"""Forward of gated multimodal attention: one online softmax over the segments of a sample, with everything about
modalities in one pass.

    z_j    = scale q.k_j + log_prior[m(j)]
    lse_m  = log sum_{j in m} exp(z_j)
    joint:         lse = logsumexp_m lse_m, mass_m = exp(lse_m - lse)
                   output = sigmoid(output_gate) sum_m gate_m sum_{j in m} exp(z_j - lse) v_j
    per_modality:  mass_m = 1
                   output = sigmoid(output_gate) sum_m gate_m sum_{j in m} exp(z_j - lse_m) v_j
    partials:      mass_m = 1
                   output_m = sum_{j in m} exp(z_j - lse_m) v_j
    (mass 0 where nothing of m is visible)

A program owns BLOCK_Q queries of one sample and one head and walks the segments. A key tile lies in one segment, so
prior and gate are one number a row: the prior enters the exponent's offset (no instruction), the gate costs one
multiplication an element, mass and lse nothing inside the loop. Whole tiles run without a mask; what is left of a
segment runs in narrow tiles, so that short segments do not pay for wide ones. Segments that are inactive, invisible
to all rows of the tile, or hidden by a prior of -inf in all of them are not read. Where segments are much shorter than
a tile (`config.spans_segments`), the joint softmax is that of `forward_spans`, whose tiles span them.

Where few queries meet many keys (`config.key_splits`), the grid's second dimension shares out the keys: each split does
the same over its part of every segment and leaves a float32 result, and `combine` puts them together. Joint or partial
results merge exactly; the per-modality softmax leaves partials, whose gates come last.

Cost: 4 Hq D (visible query-key pairs) FLOPs; reads query, key and value once from memory if the cache holds a
sample's keys, writes the output once: a floor of (2 total_q Hq + 2 total_k Hkv) D elements, and 8 total_q Hq M bytes
of mass and lse.
Precision: scores, softmax, mass, lse and both accumulators in float32; probabilities (times the gate) are rounded
once to value's dtype for the second product; float32 inputs multiply in full precision unless
``torch.backends.cuda.matmul.fp32_precision`` is "tf32". With the joint softmax a modality so far below those before
it that its probabilities leave float32's range is summed once more, for its lse alone, against its own maximum: a
branch behind the loop that is taken only then.
Determinism: no atomics, fixed order: bitwise reproducible.
Source: Dao 2023, "FlashAttention-2", algorithm 1; the split of the loop follows Triton's tutorial 06.
"""

import triton
import triton.language as tl

from fusedmm.kernels.attention.forward_keys import attend_keys
from fusedmm.kernels.attention.forward_mass import store_mass
from fusedmm.kernels.indexing import (
    hidden_zero,
    load_prior,
    load_rows,
    load_work,
    segment_range,
    split_range,
    store_rows,
    take_split,
)
from fusedmm.kernels.softmax import LOG2_E, finite_shift, natural_lse


@triton.jit
def _attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    mass_ptr,
    lse_ptr,
    query_tiles_ptr,
    cu_seqlens_q_ptr,
    key_ranges_ptr,
    log_prior_ptr,
    gate_ptr,
    output_gate_ptr,
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
    key_ranges_stride_b,
    key_ranges_stride_h,
    key_ranges_stride_m,
    log_prior_stride_q,
    log_prior_stride_h,
    log_prior_stride_m,
    gate_stride_q,
    gate_stride_h,
    gate_stride_m,
    output_gate_stride_q,
    output_gate_stride_h,
    num_heads,
    group_size,
    num_modalities,
    split_rows,
    HEAD_DIM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    CARRY_SCORES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, first_query, head = load_work(query_tiles_ptr, num_heads, BLOCK_Q)
    query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    if first_query >= query_stop:
        return
    if split_rows is not None:
        split_row = tl.program_id(1).to(tl.int64) * split_rows
        output_ptr += split_row * (num_modalities * HEAD_DIM if SOFTMAX == "partials" else HEAD_DIM)
        mass_ptr += split_row * num_modalities
        lse_ptr += split_row * num_modalities
    rows = tl.arange(0, BLOCK_Q)
    offs_q = first_query + rows
    mask_q = offs_q < query_stop
    first_row = first_query.to(tl.int64) * num_heads + head
    mass_ptr += first_row * num_modalities
    lse_ptr += first_row * num_modalities
    query_ptr += head * query_stride_h
    # [BLOCK_Q, BLOCK_D]
    query = load_rows(query_ptr, query_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
    key_ptr += head // group_size * key_stride_h
    value_ptr += head // group_size * value_stride_h
    key_ranges_ptr += sample.to(tl.int64) * key_ranges_stride_b + head * key_ranges_stride_h
    scale2 = scale * LOG2_E
    if log_prior_ptr is not None:
        log_prior_ptr += first_query.to(tl.int64) * log_prior_stride_q + head * log_prior_stride_h
    if gate_ptr is not None:
        gate_ptr += first_query.to(tl.int64) * gate_stride_q + head * gate_stride_h
    if visible_ptr is not None:
        visible_ptr += first_query.to(tl.int64) * num_modalities * 2
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    running_max = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_Q], tl.float32)
    if SOFTMAX == "per_modality":
        total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for index in tl.range(num_modalities, disable_licm=True):
        modality = tl.cast(index, tl.int64)
        range_ptr = key_ranges_ptr + modality * key_ranges_stride_m
        start, stop, full_start, full_stop, low, high = segment_range(
            range_ptr, visible_ptr, rows, mask_q, modality, num_modalities
        )
        rows = tl.arange(0, BLOCK_Q) + hidden_zero(start)
        offs_m = rows * (num_heads * num_modalities)
        prior = load_prior(log_prior_ptr, modality * log_prior_stride_m, log_prior_stride_q, rows, mask_q)
        if log_prior_ptr is not None:
            stop = tl.where(tl.max(prior, 0) > -float("inf"), stop, start)
        if split_rows is not None:
            start, stop, full_start, full_stop = take_split(start, stop, full_start, full_stop, index, BLOCK_K)
        segment_max = running_max
        segment_sum = tl.zeros([BLOCK_Q], tl.float32)
        if SOFTMAX == "joint":
            # Through memory, where the segment before left it: carried in a register, Triton's layouts of the loops'
            # row vectors conflict and every exp2 is done twice (697 instructions a 128 x 128 tile on sm_90, not 530).
            tl.debug_barrier()
            segment_max = tl.load(lse_ptr + (modality - 1) + offs_m, mask=mask_q & (index > 0), other=-float("inf"))
            running_max = segment_max
        if SOFTMAX != "joint":
            acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            segment_max = tl.full([BLOCK_Q], -float("inf"), tl.float32)
        if gate_ptr is not None:
            gate_ptrs = gate_ptr + modality * gate_stride_m + rows * gate_stride_q
        if stop > start:
            gate = None
            if SOFTMAX == "joint" and gate_ptr is not None:
                gate = tl.load(gate_ptrs, mask=mask_q, other=0.0)
            full_start, full_stop, wide_stop = split_range(start, stop, full_start, full_stop, BLOCK_K)
            starts = (start, full_start, wide_stop)
            stops = (wide_stop, full_stop, stop)
            for piece in tl.static_range(3):
                # Piece 0, whole tiles before and after the full ones, exists only where rows differ in what they see.
                if piece > 0 or visible_ptr is not None:  # noqa: SIM102 (decided when compiled, the next when run)
                    if stops[piece] > starts[piece]:
                        acc, segment_max, segment_sum = attend_keys(
                            acc=acc,
                            running_max=segment_max,
                            running_sum=segment_sum,
                            query=query,
                            key_ptr=key_ptr,
                            value_ptr=value_ptr,
                            key_stride_k=key_stride_k,
                            value_stride_k=value_stride_k,
                            start=starts[piece],
                            stop=stops[piece],
                            skip_start=full_start if piece == 0 else None,
                            skip_stop=full_stop,
                            key_stop=stop,
                            scale2=scale2,
                            prior=prior,
                            gate=gate,
                            low=low if visible_ptr is not None and piece != 1 else None,
                            high=high,
                            offs_q=offs_q,
                            head=head,
                            seed=seed,
                            dropout_p=dropout_p,
                            HEAD_DIM=HEAD_DIM,
                            BLOCK_K=BLOCK_TAIL if piece == 2 else BLOCK_K,
                            PARTIAL=piece == 2,
                            CARRY_SCORES=CARRY_SCORES and piece == 1,
                            PRECISION=PRECISION,
                        )
        if SOFTMAX == "joint":
            # The mass needs the final maximum and sum: keep this segment's in its place until then.
            tl.store(mass_ptr + modality + offs_m, segment_sum, mask=mask_q)
            tl.store(lse_ptr + modality + offs_m, segment_max, mask=mask_q)
            running_sum = running_sum * tl.exp2(running_max - finite_shift(segment_max)) + segment_sum
            running_max = segment_max
        else:
            seen = segment_sum > 0.0
            tl.store(mass_ptr + modality + offs_m, tl.where(seen, 1.0, 0.0), mask=mask_q)
            tl.store(lse_ptr + modality + offs_m, natural_lse(segment_max, segment_sum), mask=mask_q)
            weight = 1.0 / (tl.where(seen, segment_sum, 1.0) * (1.0 - dropout_p))
            if SOFTMAX == "partials":
                output_m_ptr = output_ptr + (head * num_modalities + modality) * HEAD_DIM
                row_stride = num_heads * num_modalities * HEAD_DIM
                output = acc * weight[:, None]
                store_rows(output_m_ptr, row_stride, first_query, query_stop, output, BLOCK_Q, HEAD_DIM, BLOCK_D)
            else:
                if gate_ptr is not None:
                    weight = weight * tl.load(gate_ptrs, mask=mask_q, other=0.0)
                total += acc * weight[:, None]

    if BLOCK_D > 64 and query.dtype != tl.float32:  # Once more: carried through the loops they would spill.
        sample, first_query, head = load_work(query_tiles_ptr, num_heads + hidden_zero(num_heads), BLOCK_Q)
        query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    if SOFTMAX == "joint":
        running_sum = tl.where(running_sum > 0.0, running_sum, 1.0)
        total = acc * (1.0 / (running_sum * (1.0 - dropout_p)))[:, None]
    if SOFTMAX != "partials":
        if output_gate_ptr is not None:
            output_gate_ptr += head * output_gate_stride_h
            output_gate = load_rows(
                output_gate_ptr, output_gate_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
            )
            total = total * tl.sigmoid(output_gate.to(tl.float32))
        output_ptr += head * HEAD_DIM
        store_rows(output_ptr, num_heads * HEAD_DIM, first_query, query_stop, total, BLOCK_Q, HEAD_DIM, BLOCK_D)
    if SOFTMAX == "joint":
        store_mass(
            mass_ptr=mass_ptr,
            lse_ptr=lse_ptr,
            running_max=running_max,
            running_sum=running_sum,
            query_ptr=query_ptr,
            query_stride_q=query_stride_q,
            key_ptr=key_ptr,
            key_stride_k=key_stride_k,
            key_ranges_ptr=key_ranges_ptr,
            key_ranges_stride_m=key_ranges_stride_m,
            log_prior_ptr=log_prior_ptr,
            log_prior_stride_q=log_prior_stride_q,
            log_prior_stride_m=log_prior_stride_m,
            visible_ptr=visible_ptr,
            scale2=scale2,
            first_query=first_query,
            query_stop=query_stop,
            mass_stride_q=num_heads * num_modalities,
            num_modalities=num_modalities,
            SPLIT=split_rows is not None,
            HEAD_DIM=HEAD_DIM,
            BLOCK_Q=BLOCK_Q,
            BLOCK_K=BLOCK_K,
            BLOCK_TAIL=BLOCK_TAIL,
            BLOCK_D=BLOCK_D,
            PRECISION=PRECISION,
        )
