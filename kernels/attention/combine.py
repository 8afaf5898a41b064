"""Results of attention over parts of the keys, put together: the second step where few queries meet many keys.

Split s of S has seen its part of every segment, as if that were all: its float32 output o_s and natural logarithms
lse_s,m. With lse_m = log sum_s exp(lse_s,m),

    joint:         lse = logsumexp_m lse_m, mass_m = exp(lse_m - lse)
                   output = sigmoid(output_gate) sum_s (sum_m exp(lse_s,m - lse)) o_s
    partials:      mass_m = 1, output_m = sum_s exp(lse_s,m - lse_m) o_s,m
    per_modality:  mass_m = 1, output = sigmoid(output_gate) sum_m gate_m output_m, from splits that leave partials
    (mass 0, lse -inf where nothing of m is visible)

A program owns one query of one head, and has all splits in flight at once.
Cost: bound by memory: reads S total_q Hq (D + M) float32 (S total_q Hq M (D + 1) but for joint), writes the output once
and 8 total_q Hq M bytes; `config.key_splits` holds the reading to a part of what the splits read of keys and values.
Everything in float32, rounded once to the output's dtype. No atomics, fixed order: bitwise reproducible.
Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

import triton
import triton.language as tl
from torch import Tensor

from fusedmm.kernels.attention.arguments import AttentionProblem, strides_of
from fusedmm.kernels.attention.config import _attention_combine_config
from fusedmm.kernels.softmax import finite_shift


@triton.jit
def _log_sum(lse, axis: tl.constexpr):
    """Logarithm of the sum of ``exp(lse)``, the axis kept; -inf for nothing."""
    largest = tl.max(lse, axis, keep_dims=True)
    total = tl.sum(tl.exp(lse - finite_shift(largest)), axis, keep_dims=True)
    return tl.where(total > 0.0, largest + tl.log(tl.where(total > 0.0, total, 1.0)), -float("inf"))


@triton.jit
def _attention_combine_kernel(
    split_output_ptr,
    split_lse_ptr,
    output_ptr,
    mass_ptr,
    lse_ptr,
    gate_ptr,
    output_gate_ptr,
    gate_stride_q,
    gate_stride_h,
    gate_stride_m,
    output_gate_stride_q,
    output_gate_stride_h,
    num_heads,
    num_modalities,
    splits,
    split_rows,
    HEAD_DIM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    query = row // num_heads
    head = row % num_heads
    offs_m = tl.arange(0, BLOCK_M)[None, :]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    # [BLOCK_S, 1]
    offs_s = tl.arange(0, BLOCK_S)[:, None]
    split_row = offs_s.to(tl.int64) * split_rows + row
    mask_m = offs_m < num_modalities
    mask_d = offs_d < HEAD_DIM
    mask_s = offs_s < splits
    # [BLOCK_S, BLOCK_M]
    split_lse = tl.load(split_lse_ptr + split_row * num_modalities + offs_m, mask=mask_s & mask_m, other=-float("inf"))
    # [1, BLOCK_M], lse_m = log sum_s exp(lse_s,m)
    lse = _log_sum(split_lse, 0)
    output = tl.zeros([1, BLOCK_D], tl.float32)
    if SOFTMAX == "joint":
        shift = finite_shift(_log_sum(lse, 1))
        mass = tl.exp(lse - shift)
        # [BLOCK_S, BLOCK_D]
        split_output = tl.load(split_output_ptr + split_row * HEAD_DIM + offs_d, mask=mask_s & mask_d, other=0.0)
        weight = tl.sum(tl.exp(split_lse - shift), 1, keep_dims=True)
        output += tl.sum(weight * split_output, 0, keep_dims=True)
    else:
        mass = tl.where(lse > -float("inf"), 1.0, 0.0)
        for index in range(num_modalities):
            modality = tl.cast(index, tl.int64)
            split_row_m = split_row * num_modalities + modality
            # [BLOCK_S, 1]
            split_lse_m = tl.load(split_lse_ptr + split_row_m, mask=mask_s, other=-float("inf"))
            # [BLOCK_S, BLOCK_D]
            split_output = tl.load(split_output_ptr + split_row_m * HEAD_DIM + offs_d, mask=mask_s & mask_d, other=0.0)
            weight = tl.exp(split_lse_m - finite_shift(_log_sum(split_lse_m, 0)))
            output_m = tl.sum(weight * split_output, 0, keep_dims=True)
            if SOFTMAX == "partials":
                output_ptrs = output_ptr + (row * num_modalities + modality) * HEAD_DIM + offs_d
                tl.store(output_ptrs, output_m.to(output_ptr.dtype.element_ty), mask=mask_d)
            else:
                if gate_ptr is not None:
                    gate_ptrs = gate_ptr + query * gate_stride_q + head * gate_stride_h + modality * gate_stride_m
                    output_m *= tl.load(gate_ptrs)
                output += output_m
    tl.store(mass_ptr + row * num_modalities + offs_m, mass, mask=mask_m)
    tl.store(lse_ptr + row * num_modalities + offs_m, lse, mask=mask_m)
    if SOFTMAX != "partials":
        if output_gate_ptr is not None:
            output_gate_ptrs = output_gate_ptr + query * output_gate_stride_q + head * output_gate_stride_h + offs_d
            output *= tl.sigmoid(tl.load(output_gate_ptrs, mask=mask_d, other=0.0).to(tl.float32))
        tl.store(output_ptr + row * HEAD_DIM + offs_d, output.to(output_ptr.dtype.element_ty), mask=mask_d)


def combine_splits(
    split_output: Tensor,
    split_lse: Tensor,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    problem: AttentionProblem,
) -> None:
    """Launch the kernel; writes ``output``, ``mass`` and ``lse``, all as `attention_forward` returns them.

    Args:
        split_output: [S, total_q, Hq, D] float32, [S, total_q, Hq, M, D] but for joint.
        split_lse: [S, total_q, Hq, M] float32.
        output: [total_q, Hq, D], or [total_q, Hq, M, D] for partials.
        mass: [total_q, Hq, M] float32.
        lse: [total_q, Hq, M] float32.
        problem: of the whole; its output gate has a last stride of 1. Joint splits have the gate in them.
    """
    total_q, num_heads, num_modalities = mass.shape
    head_dim = output.shape[-1]
    gate = problem.gate if problem.softmax == "per_modality" else None
    config = _attention_combine_config(head_dim)
    _attention_combine_kernel[(total_q * num_heads,)](
        split_output_ptr=split_output,
        split_lse_ptr=split_lse,
        output_ptr=output,
        mass_ptr=mass,
        lse_ptr=lse,
        gate_ptr=gate,
        output_gate_ptr=problem.output_gate,
        **strides_of(gate, "gate", "qhm"),
        **strides_of(problem.output_gate, "output_gate", "qh"),
        num_heads=num_heads,
        num_modalities=num_modalities,
        splits=split_output.shape[0],
        split_rows=total_q * num_heads,
        HEAD_DIM=head_dim,
        SOFTMAX=problem.softmax,
        **config.launch_options(),
    )
