"""Forward of the joint softmax where segments are much shorter than a tile: key tiles span modalities.

The formulas are those of `forward`. Prior and gate, there one number a row of a tile, are one a pair here: `spans`
lays out the keys and says how a product with a one-hot matrix E spreads them, and takes back the sum of a modality,
from which mass and lse follow:

    z = scale2 q.k + (prior - top) E              with ``top`` the largest prior of a row
    p = exp2(z - max)                             sum_m = sum_m rescale + p E^T
    acc = acc rescale + (p (gate E)) v

One pipelined loop whose state is one maximum a row. The softmax of each modality by itself would need a maximum and a
rescaled accumulator for each, and stays with `forward`; so do splits, which share out the tiles of segments.

Counted for 64 queries of a head (D 64, bfloat16, prior and gate, sm_90), tiles of 64 keys here (32 for more than 16
modalities), tails of 32 and whole tiles of 64 there; instructions of the loops, without what `forward` does between
segments, a round trip through memory among it:

                                   columns         tiles          instructions     products of 64 x 64 x 16
    8 modalities of 5 keys         64 for 256      1 for 8        695 for 2176     15 for 32
    25 modalities of 5 keys        128 for 800     4 for 25       2000 for 6800    44 for 100
    8 modalities of 1 to 64 keys   290 for 383     4.5 for 11.8   3150 for 3231    68 for 48
    8 modalities of 5 to 400 keys  1639 for 1733   26 for 33      17800 for 10230  384 for 216

(means over random lengths; the number here for the number there), whence `config.SHORT_SEGMENT`.

Cost: Hq (4 D + 14 BLOCK_M) (pairs) FLOPs: three parts of the prior, two of the gate, two of p. Precision as in
`forward`; 16-bit inputs have gate and sums within 2^-16. Bitwise reproducible.
"""

import triton
import triton.language as tl

from fusedmm.kernels.attention.forward_mass import FAINT, store_mass
from fusedmm.kernels.attention.spans import (
    HIDDEN,
    add_product,
    find_keys,
    gather_rows,
    lay_out_keys,
    sees_columns,
    spread,
)
from fusedmm.kernels.indexing import keep_mask, load_rows, load_work, store_rows
from fusedmm.kernels.softmax import LOG2_E, finite_shift, natural_lse


@triton.jit
def _attention_forward_spans_kernel(
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
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_HOT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, first_query, head = load_work(query_tiles_ptr, num_heads, BLOCK_Q)
    query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    if first_query >= query_stop:
        return
    rows = tl.arange(0, BLOCK_Q)
    offs_q = first_query + rows
    mask_q = offs_q < query_stop
    first_query64 = first_query.to(tl.int64)
    query_ptr += head * query_stride_h
    # [BLOCK_Q, BLOCK_D]
    query = load_rows(query_ptr, query_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
    key_ptr += head // group_size * key_stride_h
    value_ptr += head // group_size * value_stride_h
    key_ranges_ptr += sample.to(tl.int64) * key_ranges_stride_b + head * key_ranges_stride_h
    scale2 = scale * LOG2_E
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # [BLOCK_Q, BLOCK_M], as all that is one number a query and modality
    offs_m = tl.arange(0, BLOCK_M)[None, :]
    mask = mask_q[:, None] & (offs_m < num_modalities)
    seen = mask
    low = None
    high = None
    if visible_ptr is not None:
        visible_ptr += first_query64 * num_modalities * 2
        visible_ptrs = visible_ptr + (rows[:, None] * num_modalities + offs_m) * 2
        low = tl.load(visible_ptrs, mask=mask, other=0)
        high = tl.load(visible_ptrs + 1, mask=mask, other=0)
        seen = mask & (high > low)
    prior = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    if log_prior_ptr is not None:
        log_prior_ptr += first_query64 * log_prior_stride_q + head * log_prior_stride_h
        prior_ptrs = log_prior_ptr + rows[:, None] * log_prior_stride_q + offs_m * log_prior_stride_m
        prior = tl.load(prior_ptrs, mask=mask, other=-float("inf")) * LOG2_E
    column_start, column_stop, key_shift, columns = lay_out_keys(
        key_ranges_ptr, key_ranges_stride_m, tl.max(prior, 0) == -float("inf"), low, high, mask, num_modalities
    )
    seen = seen & (column_stop > column_start)[None, :] & (prior > -float("inf"))
    if visible_ptr is not None:
        low = (low - key_shift[None, :]).to(tl.float32)  # as columns
        high = (high - key_shift[None, :]).to(tl.float32)
    # [BLOCK_Q]
    top = finite_shift(tl.max(tl.where(seen, prior, -float("inf")), 1))
    prior = tl.where(seen, prior - top[:, None], HIDDEN)
    if gate_ptr is not None:
        gate_ptr += first_query64 * gate_stride_q + head * gate_stride_h
        gate = tl.load(gate_ptr + rows[:, None] * gate_stride_q + offs_m * gate_stride_m, mask=seen, other=0.0)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    running_max = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    for first_column in tl.range(0, columns, BLOCK_K):
        offs_c = first_column + tl.arange(0, BLOCK_K)
        mask_c = offs_c < columns
        one_hot, offs_k = find_keys(offs_c, column_start, column_stop, key_shift, ONE_HOT)
        # [BLOCK_K, BLOCK_D]
        key = gather_rows(key_ptr, key_stride_k, offs_k, mask_c, HEAD_DIM, BLOCK_D)
        # [BLOCK_Q, BLOCK_K]
        scores = tl.dot(query, key.T, input_precision=PRECISION) * scale2
        if log_prior_ptr is not None:
            scores += spread(prior, one_hot, 3)
        sees = mask_c[None, :]
        if visible_ptr is not None:
            sees = sees_columns(low, high, first_column, one_hot)
        scores = tl.where(sees, scores, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        shift = finite_shift(new_max)
        # p = exp(z - max)
        probs = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(running_max - shift)[:, None]
        running_max = new_max
        sums = add_product(sums * rescale, probs, one_hot.T, 2)
        if seed_ptr is not None:
            probs = tl.where(keep_mask(seed, dropout_p, offs_q[:, None], head, offs_k[None, :]), probs, 0.0)
        if gate_ptr is not None:
            probs *= spread(gate, one_hot, 2)
        value = gather_rows(value_ptr, value_stride_k, offs_k, mask_c, HEAD_DIM, BLOCK_D)
        acc = tl.dot(probs.to(query.dtype), value, acc * rescale, input_precision=PRECISION)

    sums = tl.where(seen, sums, 0.0)
    running_sum = tl.sum(sums, 1)
    weight = tl.where(running_sum > 0.0, 1.0 / (tl.where(running_sum > 0.0, running_sum, 1.0) * (1.0 - dropout_p)), 0.0)
    output = acc * weight[:, None]
    if output_gate_ptr is not None:
        output_gate_ptr += head * output_gate_stride_h
        output_gate = load_rows(
            output_gate_ptr, output_gate_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True
        )
        output = output * tl.sigmoid(output_gate.to(tl.float32))
    output_ptr += head * HEAD_DIM
    store_rows(output_ptr, num_heads * HEAD_DIM, first_query, query_stop, output, BLOCK_Q, HEAD_DIM, BLOCK_D)

    running_sum = tl.where(running_sum > 0.0, running_sum, 1.0)
    running_max += top
    first_row = (first_query64 * num_heads + head) * num_modalities
    mass_ptr += first_row
    lse_ptr += first_row
    offs_qm = rows[:, None] * (num_heads * num_modalities) + offs_m
    if tl.min(tl.where(seen, sums, 1.0)) < FAINT:
        tl.store(mass_ptr + offs_qm, sums, mask=mask)
        tl.store(lse_ptr + offs_qm, running_max[:, None] + tl.zeros_like(sums), mask=mask)
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
            SPLIT=False,
            HEAD_DIM=HEAD_DIM,
            BLOCK_Q=BLOCK_Q,
            BLOCK_K=BLOCK_K,
            BLOCK_TAIL=min(BLOCK_K, 32),
            BLOCK_D=BLOCK_D,
            PRECISION=PRECISION,
        )
    else:
        tl.store(mass_ptr + offs_qm, sums / running_sum[:, None], mask=mask)
        tl.store(lse_ptr + offs_qm, natural_lse(running_max[:, None], sums), mask=mask)
