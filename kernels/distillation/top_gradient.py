"""Gradient of the loss against a top-k teacher in the student's logits, for a range of classes.

With g the gradient in the K + 1 logits of the top-k classes and the bucket (gradient.py over those), share_v a class's
share of the rest, p1 the probabilities at T = 1 and k the student's most likely class:

    h_v = alpha T (g_j  for the j-th of the top-k, else  share_v g_bucket)
          + (1 - alpha) (p1 - (1 - label_smoothing) onehot - label_smoothing / V)
    grad_logits = grad_row h (1 - (z / softcap)^2), 0 where grad_row is 0 and where the class is forbidden

A row's top-k classes are written into the tile that holds them: no scatter, no atomics. One rounding, to the dtype of
the matmuls that follow. FLOPs: 2 N V Ds for a head with a weight; bytes: the gradient once.
"""

import torch
import triton
import triton.language as tl

from fusedmm.kernels.distillation.arguments import DistillationProblem
from fusedmm.kernels.distillation.gradient import cross_entropy_gradient, store_gradient
from fusedmm.kernels.distillation.heads import HeadTensors, launch_heads
from fusedmm.kernels.distillation.tiles import head_slabs, program_tile
from fusedmm.kernels.distillation.top_state import class_at, count_below
from fusedmm.kernels.distillation.top_statistics import REST_LOG_SUM, REST_SHIFT, STUDENT_ARG, STUDENT_SAVED, UNIT
from fusedmm.kernels.launch import device_arch

FIRST_BUCKET = tl.constexpr(STUDENT_SAVED)


@triton.jit
def _top_gradient_kernel(
    student_ptr,
    student_weight_ptr,
    student_bias_ptr,
    classes_ptr,
    labels_ptr,
    row_temperature_ptr,
    saved_ptr,
    grad_rows_ptr,
    grad_logits_ptr,
    student_stride_n,
    student_weight_stride_v,
    student_size_d,
    student_softcap,
    grad_stride_n,
    inverse_temperature,
    alpha,
    label_smoothing,
    num_rows,
    num_classes,
    first_class,
    total_classes,
    size_k,
    ignore_index,
    first_column,
    last_column,
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
    first_v = first_column + first_tile
    students = head_slabs(
        student_ptr, student_weight_ptr, student_bias_ptr,
        student_stride_n, student_weight_stride_v, student_size_d, student_softcap,
        first_n, num_rows, first_v, num_classes, BLOCK_N, BLOCK_V, BLOCK_D, SLABS,
    )  # fmt: skip
    row_stride = tl.full([], 1, tl.int64) * num_rows
    saved_ptrs = saved_ptr + offs_n
    bucket_ptrs = saved_ptrs + FIRST_BUCKET * row_stride
    grad_rows = tl.load(grad_rows_ptr + offs_n)
    labels = tl.full([BLOCK_N], -1, tl.int32)
    if labels_ptr is not None:
        labels = tl.load(labels_ptr + offs_n)
        grad_rows = tl.where(labels == ignore_index, 0.0, grad_rows)
        labels = (labels - first_class).to(tl.int32)
    class_ptrs = classes_ptr + offs_n * size_k
    start = count_below(class_ptrs, size_k, first_class + first_v)
    most = tl.max(count_below(class_ptrs, size_k, first_class + first_v + BLOCK_V) - start, 0)
    student_arg = tl.load(saved_ptrs + STUDENT_ARG * row_stride).to(tl.int32) - first_class
    width: tl.constexpr = BLOCK_V // SLABS
    for i in tl.static_range(SLABS):
        columns = first_tile + i * width + tl.arange(0, width)
        offs_v = first_column + columns
        classes = offs_v[None, :]  # of this rank: numbers over all ranks would take 10 registers more
        x = students[i]
        shift = tl.load(saved_ptrs + REST_SHIFT * row_stride)
        log_share = (x * inverse[:, None] - shift[:, None]) - tl.load(saved_ptrs + REST_LOG_SUM * row_stride)[:, None]
        share = tl.exp2(tl.minimum(log_share, 0.0))  # above 0 only where a class is one of the top-k
        g = share * tl.load(bucket_ptrs + size_k * row_stride)[:, None]
        for passed in range(most):
            position = start + passed
            bucket = tl.load(bucket_ptrs + position * row_stride, mask=position < size_k, other=0.0)
            column = class_at(class_ptrs, position, size_k) - first_class
            g = tl.where(classes == column[:, None], bucket[:, None], g)
        g *= (alpha / inverse)[:, None]
        if labels_ptr is not None:
            is_top = classes == student_arg[:, None]
            g += (1.0 - alpha) * cross_entropy_gradient(
                x, is_top, classes == labels[:, None], saved_ptrs + UNIT * row_stride, row_stride,
                label_smoothing, total_classes,
            )  # fmt: skip
        store_gradient(
            grad_logits_ptr + rows[:, None] * grad_stride_n + columns[None, :], g, x, grad_rows, student_softcap,
            mask_n[:, None] & (offs_v < last_column)[None, :],
        )  # fmt: skip


def top_gradient_logits(
    student: HeadTensors,
    classes: torch.Tensor,
    saved: torch.Tensor,
    grad_rows: torch.Tensor,
    out: torch.Tensor,
    problem: DistillationProblem,
    *,
    columns: slice,
) -> torch.Tensor:
    """``grad_rows`` times the gradient in the inputs of the student's soft-capped logits, for local classes
    `columns`, written to `out` [N, columns]; `out`.

    `classes` [N, K] int32 ascends in each row; `saved` [6 + K + 1, N] holds numbers of the student (see
    `merge_top_statistics`) and the gradient in the buckets.
    """
    num_rows, width = out.shape
    if num_rows == 0:
        return out
    arch = device_arch(student.source.device)
    config, head = launch_heads(student, arch=arch, kind="top_gradient", num_classes=problem.num_classes, columns=width)
    tiles = triton.cdiv(num_rows, config.blocks["BLOCK_N"]) * triton.cdiv(width, config.blocks["BLOCK_V"])
    _top_gradient_kernel[(tiles,)](
        **head,
        classes_ptr=classes,
        labels_ptr=None if problem.alpha == 1.0 else problem.labels,
        row_temperature_ptr=problem.row_temperature,
        saved_ptr=saved,
        grad_rows_ptr=grad_rows,
        grad_logits_ptr=out,
        grad_stride_n=out.stride(0),
        inverse_temperature=1.0 / problem.temperature,
        alpha=problem.alpha,
        label_smoothing=problem.label_smoothing,
        num_rows=num_rows,
        num_classes=problem.num_classes,
        first_class=problem.first_class,
        total_classes=problem.total_classes,
        size_k=classes.shape[1],
        ignore_index=problem.ignore_index,
        first_column=columns.start,
        last_column=columns.stop,
        **config.launch_options(),
    )
    return out
