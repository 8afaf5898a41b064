"""Gradient of the loss in the student's logits, for a range of classes, from saved statistics: formed again from the
heads, or from logits that exist.

With p and t the probabilities at the temperature T, p1 at 1, k the student's most likely class, r the log-ratio minus
its value at k, and G minus the mean of r over p:

    beta = 0    g = p - t
    beta = 1    g = p (r + G), r = log(p / t)
    between     g = (1 - beta) p (r + G), r = log(p / mix)

    h = alpha T g + (1 - alpha) (p1 - (1 - label_smoothing) onehot - label_smoothing / V)
    grad_logits = grad_row h (1 - (z / softcap)^2), 0 where grad_row is 0 and where the class is forbidden

At k, where p may round to 1, ``p - t`` is the difference of what p and t leave to the others. One rounding, to the
dtype of the matmuls that follow. FLOPs: 2 N V (Ds + Dt) for heads with weights; bytes: the gradient once, and logits
that exist once.
"""

import torch
import triton
import triton.language as tl

from fusedmm.kernels.distillation.arguments import DistillationProblem
from fusedmm.kernels.distillation.config import Pass
from fusedmm.kernels.distillation.heads import HeadTensors, launch_heads
from fusedmm.kernels.distillation.mixture import mixture_ratio
from fusedmm.kernels.distillation.saved import (
    GAP,
    STUDENT_ARG,
    STUDENT_LOG_SUM,
    STUDENT_MEAN_RATIO,
    STUDENT_OTHERS,
    STUDENT_RATIO,
    STUDENT_SHIFT,
    TEACHER_ARG,
    TEACHER_LOG_SUM,
    TEACHER_OTHERS,
    TEACHER_SHIFT,
    UNIT,
)
from fusedmm.kernels.distillation.tiles import ALLOWED, logit_slabs, program_tile
from fusedmm.kernels.launch import device_arch
from fusedmm.kernels.softmax import LN_2


@triton.jit
def _gradient_kernel(
    student_ptr,
    student_weight_ptr,
    student_bias_ptr,
    teacher_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    labels_ptr,
    row_temperature_ptr,
    saved_ptr,
    grad_rows_ptr,
    grad_logits_ptr,
    student_stride_n,
    student_weight_stride_v,
    student_size_d,
    student_softcap,
    teacher_stride_n,
    teacher_weight_stride_v,
    teacher_size_d,
    teacher_softcap,
    grad_stride_n,
    inverse_temperature,
    beta,
    alpha,
    label_smoothing,
    num_rows,
    num_classes,
    first_class,
    total_classes,
    ignore_index,
    first_column,
    last_column,
    KIND: tl.constexpr,
    IS_SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLABS: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    row_block, column_block = program_tile(
        tl.cdiv(num_rows, BLOCK_N), tl.cdiv(last_column - first_column, BLOCK_V), GROUP_N
    )
    first_n = row_block * BLOCK_N
    rows = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    mask_n = rows < num_rows
    offs_n = tl.minimum(rows, num_rows - 1)
    inverse = tl.full([BLOCK_N], 1.0, tl.float32) * inverse_temperature
    if row_temperature_ptr is not None:
        inverse = 1.0 / tl.load(row_temperature_ptr + offs_n)
    first_tile = column_block * BLOCK_V
    students, teachers = logit_slabs(
        student_ptr, student_weight_ptr, student_bias_ptr,
        student_stride_n, student_weight_stride_v, student_size_d, student_softcap,
        teacher_ptr, teacher_weight_ptr, teacher_bias_ptr,
        teacher_stride_n, teacher_weight_stride_v, teacher_size_d, teacher_softcap,
        first_n, num_rows, first_column + first_tile, num_classes, IS_SHARED, BLOCK_N, BLOCK_V, BLOCK_D, SLABS,
    )  # fmt: skip
    row_stride = tl.full([], 1, tl.int64) * num_rows
    saved_ptrs = saved_ptr + offs_n
    grad_rows = tl.load(grad_rows_ptr + offs_n)
    labels = tl.full([BLOCK_N], -1, tl.int64)
    if labels_ptr is not None:
        labels = tl.load(labels_ptr + offs_n)
        grad_rows = tl.where(labels == ignore_index, 0.0, grad_rows)
    student_arg = tl.load(saved_ptrs + STUDENT_ARG * row_stride).to(tl.int32)
    width: tl.constexpr = BLOCK_V // SLABS
    for i in tl.static_range(SLABS):
        columns = first_tile + i * width + tl.arange(0, width)
        offs_v = first_column + columns
        classes = (first_class + offs_v)[None, :]
        x = students[i]
        y = teachers[i]
        is_top = classes == student_arg[:, None]
        g = (
            _divergence_gradient(
                x * inverse[:, None], y * inverse[:, None], is_top, classes, saved_ptrs, row_stride, beta, KIND
            )
            * (alpha / inverse)[:, None]
        )
        if labels_ptr is not None:
            g += (1.0 - alpha) * cross_entropy_gradient(
                x, is_top, classes == labels[:, None], saved_ptrs + UNIT * row_stride, row_stride,
                label_smoothing, total_classes,
            )  # fmt: skip
        store_gradient(
            grad_logits_ptr + rows[:, None] * grad_stride_n + columns[None, :], g, x, grad_rows, student_softcap,
            mask_n[:, None] & (offs_v < last_column)[None, :],
        )  # fmt: skip


@triton.jit
def cross_entropy_gradient(x, is_top, is_label, unit_ptrs, row_stride, label_smoothing, total_classes):
    """Gradient of the cross entropy in logits `x` (base 2) [BLOCK_N, width], natural, from a row's peak, logarithm of
    the sum, and share of the others than the most likely class at T = 1, in three rows from `unit_ptrs` on.
    """
    unit = tl.exp2((x - tl.load(unit_ptrs)[:, None]) - tl.load(unit_ptrs + row_stride)[:, None])
    at_label = tl.where(
        is_top, label_smoothing - tl.load(unit_ptrs + 2 * row_stride)[:, None], unit - (1.0 - label_smoothing)
    )
    return tl.where(is_label, at_label, unit) - label_smoothing / total_classes


@triton.jit
def store_gradient(grad_ptrs, g, x, grad_rows, softcap, mask):
    """Write a gradient in soft-capped logits `x` (base 2) [BLOCK_N, width], times that of the rows."""
    # Neither rows that do not count, which may hold anything, nor forbidden classes, whose logit is fixed.
    is_forbidden = x < ALLOWED
    if softcap is not None:
        share = tl.where(is_forbidden, 0.0, x) * (LN_2 / softcap)
        g *= 1.0 - share * share
    g = tl.where((grad_rows == 0.0)[:, None] | is_forbidden, 0.0, g * grad_rows[:, None])
    dtype: tl.constexpr = grad_ptrs.dtype.element_ty
    if dtype == tl.float16:
        g = tl.minimum(tl.maximum(g, -65504.0), 65504.0)
    tl.store(grad_ptrs, g.to(dtype), mask=mask)


@triton.jit
def _divergence_gradient(s, t, is_top, classes, saved_ptrs, row_stride, beta, KIND: tl.constexpr):
    """Gradient of the divergence in the tempered logits s and t (base 2), natural, [BLOCK_N, width]."""
    shift = tl.load(saved_ptrs + STUDENT_SHIFT * row_stride)
    p = tl.exp2((s - shift[:, None]) - tl.load(saved_ptrs + STUDENT_LOG_SUM * row_stride)[:, None])
    if KIND == 0:
        shift = tl.load(saved_ptrs + TEACHER_SHIFT * row_stride)
        q = tl.exp2((t - shift[:, None]) - tl.load(saved_ptrs + TEACHER_LOG_SUM * row_stride)[:, None])
        both_top = is_top & (classes == tl.load(saved_ptrs + TEACHER_ARG * row_stride).to(tl.int32)[:, None])
        teacher_others = tl.load(saved_ptrs + TEACHER_OTHERS * row_stride)
        return tl.where(both_top, (teacher_others - tl.load(saved_ptrs + STUDENT_OTHERS * row_stride))[:, None], p - q)
    elif KIND == 1:
        ratio = tl.load(saved_ptrs + STUDENT_RATIO * row_stride)[:, None] - (t - s)
        return p * (ratio + tl.load(saved_ptrs + STUDENT_MEAN_RATIO * row_stride)[:, None]) * LN_2
    else:
        gap = tl.load(saved_ptrs + GAP * row_stride)
        ratio_top = tl.load(saved_ptrs + STUDENT_RATIO * row_stride) - gap
        ratio = mixture_ratio((t - s) - gap[:, None], ratio_top, beta / (1.0 - beta))
        return (1.0 - beta) * p * (ratio + tl.load(saved_ptrs + STUDENT_MEAN_RATIO * row_stride)[:, None])


def gradient_logits(
    student: HeadTensors,
    teacher: HeadTensors,
    saved: torch.Tensor,
    grad_rows: torch.Tensor,
    out: torch.Tensor,
    problem: DistillationProblem,
    *,
    columns: slice,
) -> torch.Tensor:
    """``grad_rows`` times the gradient in the inputs of the student's soft-capped logits, for local classes `columns`,
    written to `out` [N, columns]; `out`.
    """
    arch = device_arch(student.source.device)
    num_rows, width = out.shape
    kind: Pass = "mixture_gradient" if 0.0 < problem.beta < 1.0 else "gradient"
    config, heads = launch_heads(student, teacher, arch=arch, kind=kind, num_classes=problem.num_classes, columns=width)
    if num_rows == 0:
        return out
    tiles = triton.cdiv(num_rows, config.blocks["BLOCK_N"]) * triton.cdiv(width, config.blocks["BLOCK_V"])
    _gradient_kernel[(tiles,)](
        **heads,
        labels_ptr=None if problem.alpha == 1.0 else problem.labels,
        row_temperature_ptr=problem.row_temperature,
        saved_ptr=saved,
        grad_rows_ptr=grad_rows,
        grad_logits_ptr=out,
        grad_stride_n=out.stride(0),
        inverse_temperature=1.0 / problem.temperature,
        beta=problem.beta,
        alpha=problem.alpha,
        label_smoothing=problem.label_smoothing,
        num_rows=num_rows,
        num_classes=problem.num_classes,
        first_class=problem.first_class,
        total_classes=problem.total_classes,
        ignore_index=problem.ignore_index,
        first_column=columns.start,
        last_column=columns.stop,
        KIND=0 if problem.beta == 0.0 else 1 if problem.beta == 1.0 else 2,
        **config.launch_options(),
    )
    return out
