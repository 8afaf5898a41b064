"""Second pass: divergences against the mixture of two heads, and total variation, once the log-sum-exps are known.

With d = log t - log p, q = beta / (1 - beta) * t / p and k the student's most likely class, the gradient of a
generalised Jensen-Shannon divergence holds only

    log(p / mix) - log(p_k / mix_k) = log((1 + q_k) / (1 + q))

whose size is that of the gap between heads that agree, and that of the overlap of heads that do not: it is formed
without subtracting from a constant. The teacher's side is the same with the roles exchanged. FLOPs: 2 N V (Ds + Dt) for
heads with weights. float32; bitwise reproducible.
"""

import torch
import triton
import triton.language as tl

from fusedmm.kernels.distillation.arguments import DistillationProblem
from fusedmm.kernels.distillation.config import vocabulary_splits
from fusedmm.kernels.distillation.heads import HeadTensors, launch_heads
from fusedmm.kernels.distillation.saved import (
    GAP,
    STUDENT_LOG_SUM,
    STUDENT_RATIO,
    STUDENT_SHIFT,
    TEACHER_LOG_SUM,
    TEACHER_RATIO,
    TEACHER_SHIFT,
)
from fusedmm.kernels.distillation.tiles import logit_slabs, program_tile
from fusedmm.kernels.launch import device_arch
from fusedmm.kernels.softmax import LN_2

SUMS = 3  # mean log-ratio of the student, of the teacher, total variation
RATIO_LIMIT = tl.constexpr(86.0)  # in base 2, as EXP_LIMIT of the eager path in base e


@triton.jit
def log1p(x):
    """Natural log(1 + x), exact for small x (Kahan): the logarithm errs by as much as 1 + x was rounded."""
    rounded = 1.0 + x
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for abs(x) <= 1, exact for small x (Kahan)."""
    power = tl.exp(x)
    safe = tl.where(power == 1.0, 2.0, power)
    return tl.where(power == 1.0, x, (power - 1.0) * x / tl.log(safe))


@triton.jit
def mixture_ratio(ratio, ratio_top, odds):
    """log((1 + q_top) / (1 + q)), natural, for ratios ``log2(t / p)`` of a tile [BLOCK_N, BLOCK_V] and at the top class
    [BLOCK_N]; odds = beta / (1 - beta).
    """
    q = odds * tl.exp2(tl.minimum(ratio, RATIO_LIMIT))
    q_top = odds * tl.exp2(tl.minimum(ratio_top, RATIO_LIMIT))[:, None]
    distance = (ratio - ratio_top[:, None]) * LN_2
    is_near = tl.abs(distance) < 1.0
    near = log1p(-q_top * expm1(tl.where(is_near, distance, 0.0)) / (1.0 + q))
    return tl.where(is_near, near, log1p(q_top) - log1p(q))


@triton.jit
def _mixture_kernel(
    student_ptr,
    student_weight_ptr,
    student_bias_ptr,
    teacher_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    row_temperature_ptr,
    saved_ptr,
    sums_ptr,
    student_stride_n,
    student_weight_stride_v,
    student_size_d,
    student_softcap,
    teacher_stride_n,
    teacher_weight_stride_v,
    teacher_size_d,
    teacher_softcap,
    inverse_temperature,
    odds,
    num_rows,
    num_classes,
    tiles_per_split,
    num_splits,
    IS_SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLABS: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    row_block, split = program_tile(tl.cdiv(num_rows, BLOCK_N), num_splits, GROUP_N)
    first_n = row_block * BLOCK_N
    rows = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    mask_n = rows < num_rows
    offs_n = tl.minimum(rows, num_rows - 1)
    inverse = tl.full([BLOCK_N], 1.0, tl.float32) * inverse_temperature
    if row_temperature_ptr is not None:
        inverse = 1.0 / tl.load(row_temperature_ptr + offs_n)
    row_stride = tl.full([], 1, tl.int64) * num_rows
    saved_ptrs = saved_ptr + offs_n
    student_shift = tl.load(saved_ptrs + STUDENT_SHIFT * row_stride)
    teacher_shift = tl.load(saved_ptrs + TEACHER_SHIFT * row_stride)
    student_log = tl.load(saved_ptrs + STUDENT_LOG_SUM * row_stride)
    teacher_log = tl.load(saved_ptrs + TEACHER_LOG_SUM * row_stride)
    gap = tl.load(saved_ptrs + GAP * row_stride)
    student_top = tl.load(saved_ptrs + STUDENT_RATIO * row_stride) - gap
    teacher_top = gap - tl.load(saved_ptrs + TEACHER_RATIO * row_stride)
    first = split * tiles_per_split * BLOCK_V
    student_mean = tl.zeros([BLOCK_N], tl.float32)
    teacher_mean = tl.zeros([BLOCK_N], tl.float32)
    variation = tl.zeros([BLOCK_N], tl.float32)
    for first_v in range(first, tl.minimum(first + tiles_per_split * BLOCK_V, num_classes), BLOCK_V):
        students, teachers = logit_slabs(
            student_ptr, student_weight_ptr, student_bias_ptr,
            student_stride_n, student_weight_stride_v, student_size_d, student_softcap,
            teacher_ptr, teacher_weight_ptr, teacher_bias_ptr,
            teacher_stride_n, teacher_weight_stride_v, teacher_size_d, teacher_softcap,
            first_n, num_rows, first_v, num_classes, IS_SHARED, BLOCK_N, BLOCK_V, BLOCK_D, SLABS,
        )  # fmt: skip
        for i in tl.static_range(SLABS):
            if num_classes - first_v > i * (BLOCK_V // SLABS):  # a branch for every slab, see `tile_state`
                s = students[i] * inverse[:, None]
                t = teachers[i] * inverse[:, None]
                p = tl.exp2((s - student_shift[:, None]) - student_log[:, None])
                q = tl.exp2((t - teacher_shift[:, None]) - teacher_log[:, None])
                ratio = (t - s) - gap[:, None]
                student_mean += tl.sum(p * mixture_ratio(ratio, student_top, odds), 1)
                teacher_mean += tl.sum(q * mixture_ratio(-ratio, teacher_top, 1.0 / odds), 1)
                variation += 0.5 * tl.sum(tl.abs(p - q), 1)
    sums_ptrs = sums_ptr + split * SUMS_SIZE * row_stride + rows
    tl.store(sums_ptrs, student_mean, mask=mask_n)
    tl.store(sums_ptrs + row_stride, teacher_mean, mask=mask_n)
    tl.store(sums_ptrs + 2 * row_stride, variation, mask=mask_n)


SUMS_SIZE = tl.constexpr(SUMS)


def mixture_sums(
    student: HeadTensors, teacher: HeadTensors, saved: torch.Tensor, problem: DistillationProblem
) -> torch.Tensor:
    """[SUMS, N] sums over this rank's classes: ``p * ratio`` of the student, the same of the teacher (natural, each
    minus its value at the top class), and total variation.
    """
    arch = device_arch(student.source.device)
    num_rows, num_classes = student.source.shape[0], problem.num_classes
    config, heads = launch_heads(
        student, teacher, arch=arch, kind="mixture", num_classes=num_classes, columns=num_classes
    )
    splits = vocabulary_splits(arch, num_rows, num_classes, config)
    sums = saved.new_empty((splits, SUMS, num_rows))
    if num_rows == 0:
        return sums.sum(0)
    _mixture_kernel[(triton.cdiv(num_rows, config.blocks["BLOCK_N"]) * splits,)](
        **heads,
        row_temperature_ptr=problem.row_temperature,
        saved_ptr=saved,
        sums_ptr=sums,
        inverse_temperature=1.0 / problem.temperature,
        odds=problem.beta / (1.0 - problem.beta),
        num_rows=num_rows,
        num_classes=num_classes,
        tiles_per_split=triton.cdiv(triton.cdiv(num_classes, config.blocks["BLOCK_V"]), splits),
        num_splits=splits,
        **config.launch_options(),
    )
    return sums.sum(0)
