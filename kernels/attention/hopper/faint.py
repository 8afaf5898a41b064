"""Second pass of the Hopper forward under the joint softmax: the modalities that the first could not see.

    lse_m = log sum_{j in m} exp(z_j)        mass_m = exp(lse_m - logsumexp_m lse_m)

The forward keeps one maximum for all segments, so that the sum of one far below those before it underflows; it leaves
lse -inf there, as where nothing is visible. Here a tile that has such a row, and something visible in it, sums the
segment once more against its own maximum. A program owns BLOCK_Q queries of one head.

Cost: reads lse once, 4 Hq M bytes a query, and ends there but for a faint modality, which costs 2 D FLOPs a
visible pair of its tile and segment. Launched always, for only the GPU knows; no synchronisation. Sums in float32, lse
rounded once. No atomics, fixed order: bitwise reproducible.
"""

import triton
import triton.language as tl
from torch import Tensor

from fusedmm.kernels.attention.arguments import AttentionProblem, strides_of
from fusedmm.kernels.attention.forward_mass import sum_keys
from fusedmm.kernels.attention.hopper.config import faint_config
from fusedmm.kernels.indexing import TILE, load_prior, load_rows, load_work, segment_range
from fusedmm.kernels.softmax import LOG2_E, finite_shift, natural_lse


@triton.jit
def _attention_faint_kernel(
    query_ptr,
    key_ptr,
    mass_ptr,
    lse_ptr,
    query_tiles_ptr,
    cu_seqlens_q_ptr,
    key_ranges_ptr,
    log_prior_ptr,
    visible_ptr,
    scale2,
    query_stride_q,
    query_stride_h,
    key_stride_k,
    key_stride_h,
    key_ranges_stride_b,
    key_ranges_stride_h,
    key_ranges_stride_m,
    log_prior_stride_q,
    log_prior_stride_h,
    log_prior_stride_m,
    num_heads,
    group_size,
    num_modalities,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sample, first_query, head = load_work(query_tiles_ptr, num_heads, BLOCK_Q)
    query_stop = tl.load(cu_seqlens_q_ptr + sample + 1)
    if first_query >= query_stop:
        return
    rows = tl.arange(0, BLOCK_Q)
    mask_q = first_query + rows < query_stop
    first_query64 = first_query.to(tl.int64)
    lse_ptr += (first_query64 * num_heads + head) * num_modalities
    mass_ptr += (first_query64 * num_heads + head) * num_modalities
    offs_row = rows * (num_heads * num_modalities)
    offs_m = tl.arange(0, BLOCK_M)[None, :]
    mask = mask_q[:, None] & (offs_m < num_modalities)
    # [BLOCK_Q, BLOCK_M]
    lse = tl.load(lse_ptr + offs_row[:, None] + offs_m, mask=mask, other=-float("inf"))
    missing = mask & (lse == -float("inf"))
    if tl.max(tl.max(missing.to(tl.int32), 1), 0) == 0:
        return
    # [BLOCK_Q], base 2; what is missing would not change it
    largest = finite_shift(tl.max(lse, 1))
    total = tl.sum(tl.exp2((lse - largest[:, None]) * LOG2_E), 1)
    total = largest * LOG2_E + tl.log2(tl.where(total > 0.0, total, 1.0))
    query_ptr += head * query_stride_h
    key_ptr += head // group_size * key_stride_h
    key_ranges_ptr += sample.to(tl.int64) * key_ranges_stride_b + head * key_ranges_stride_h
    if log_prior_ptr is not None:
        log_prior_ptr += first_query64 * log_prior_stride_q + head * log_prior_stride_h
    if visible_ptr is not None:
        visible_ptr += first_query64 * num_modalities * 2
    for index in range(num_modalities):
        modality = tl.cast(index, tl.int64)
        range_ptr = key_ranges_ptr + modality * key_ranges_stride_m
        start, stop, _, _, low, high = segment_range(range_ptr, visible_ptr, rows, mask_q, modality, num_modalities)
        prior = load_prior(log_prior_ptr, modality * log_prior_stride_m, log_prior_stride_q, rows, mask_q)
        is_faint = tl.load(lse_ptr + offs_row + modality, mask=mask_q, other=0.0) == -float("inf")
        is_faint = is_faint & (prior > -float("inf")) & (stop > start)
        if visible_ptr is not None:
            is_faint = is_faint & (high > low)
        if tl.max(is_faint.to(tl.int32), 0) > 0:
            own_max, own_sum = sum_keys(
                query=load_rows(query_ptr, query_stride_q, first_query, query_stop, BLOCK_Q, HEAD_DIM, BLOCK_D, True),
                key_ptr=key_ptr,
                key_stride_k=key_stride_k,
                start=start,
                stop=stop,
                scale2=scale2,
                prior=prior,
                low=low if visible_ptr is not None else None,
                high=high,
                HEAD_DIM=HEAD_DIM,
                BLOCK_K=BLOCK_K,
                PRECISION="ieee",
            )
            tl.store(lse_ptr + offs_row + modality, natural_lse(own_max, own_sum), mask=is_faint)
            tl.store(mass_ptr + offs_row + modality, own_sum * tl.exp2(own_max - total), mask=is_faint)


def resum_faint(
    query: Tensor,
    key: Tensor,
    mass: Tensor,
    lse: Tensor,
    problem: AttentionProblem,
) -> None:
    """Launch the kernel; corrects ``mass`` and ``lse`` where the forward left lse -inf and something is visible.

    Args:
        query: [total_q, Hq, D] float16 or bfloat16, its last stride 1; key likewise [total_k, Hkv, D].
        key: see query.
        mass: contiguous [total_q, Hq, M] float32, like lse.
        lse: see mass.
        problem: with a positive scale.
    """
    _, num_heads, num_modalities = mass.shape
    config = faint_config(query.shape[-1])
    key_ranges = problem.key_ranges(num_heads)
    _attention_faint_kernel[(problem.query_tiles.shape[0] * (TILE.value // config.blocks["BLOCK_Q"]) * num_heads,)](
        query_ptr=query,
        key_ptr=key,
        mass_ptr=mass,
        lse_ptr=lse,
        query_tiles_ptr=problem.query_tiles,
        cu_seqlens_q_ptr=problem.cu_seqlens_q,
        key_ranges_ptr=key_ranges,
        log_prior_ptr=problem.log_prior,
        visible_ptr=problem.visible,
        scale2=problem.scale * LOG2_E.value,
        **strides_of(query, "query", "qh"),
        **strides_of(key, "key", "kh"),
        **strides_of(key_ranges, "key_ranges", "bhm"),
        **strides_of(problem.log_prior, "log_prior", "qhm"),
        num_heads=num_heads,
        group_size=num_heads // key.shape[1],
        num_modalities=num_modalities,
        HEAD_DIM=query.shape[-1],
        BLOCK_M=triton.next_power_of_2(num_modalities),
        **config.launch_options(),
    )
