"""Tiles of logits of two heads: from a matmul with the vocabulary's weight, or from logits that exist.

A tile is [BLOCK_N, BLOCK_V] float32 in base 2, ``log2(e) * z``: the matmul accumulates in float32 (float32 inputs are
multiplied exactly, without TF32), then bias and soft-cap, and nothing is rounded in between. A logit of -inf counts as
`FORBIDDEN`, -1e30 in base e: finite, so that ``0 * FORBIDDEN`` is 0. Classes beyond the last lie lower still.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusedmm.kernels.softmax import LOG2_E

FORBIDDEN = tl.constexpr(-1.4426950408889634e30)


class HeadTensors(NamedTuple):
    """One head as kernels take it.

    Attributes:
        source: hidden states [N, D] with a weight, else logits [N, V]; the last stride is 1.
        weight: [V, D] of source's dtype, the last stride 1, or None.
        bias: [V], or None.
        softcap: positive bound on a logit, or None.
    """

    source: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    softcap: float | None

    def arguments(self, role: str) -> dict[str, object]:
        """Launch arguments under the names ``<role>_ptr``, ``<role>_weight_ptr`` and so on."""
        source = self.source if self.source.stride(-1) == 1 else self.source.contiguous()
        weight = self.weight if self.weight is None or self.weight.stride(-1) == 1 else self.weight.contiguous()
        return {
            f"{role}_ptr": source,
            f"{role}_weight_ptr": weight,
            f"{role}_bias_ptr": None if self.bias is None else self.bias.contiguous(),
            f"{role}_stride_n": source.stride(0),
            f"{role}_weight_stride_v": 0 if weight is None else weight.stride(0),
            f"{role}_size_d": 0 if weight is None else weight.shape[1],
            f"{role}_softcap": self.softcap,
        }


def shares_weight(student: HeadTensors, teacher: HeadTensors) -> bool:
    """Whether both heads multiply with the same weight in memory."""
    a, b = student.weight, teacher.weight
    if a is None or b is None:
        return False
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )


@triton.jit
def program_tile(row_blocks, columns, GROUP_N: tl.constexpr):
    """Row block and column (a split or a tile of classes) of this program.

    Programs that run together share `GROUP_N` row blocks and walk the columns: hidden states of all rows (100 MB at
    8192 rows and 6144 dimensions) do not fit L2, those of a group do, and a weight is read once a group.
    """
    program = tl.program_id(0)
    group = program // (GROUP_N * columns)
    first = group * GROUP_N
    size = tl.minimum(row_blocks - first, GROUP_N)
    inside = program - first * columns
    return first + inside % size, inside // size


@triton.jit
def logit_slabs(
    student_ptr, student_weight_ptr, student_bias_ptr,
    student_stride_n, student_weight_stride_v, student_size_d, student_softcap,
    teacher_ptr, teacher_weight_ptr, teacher_bias_ptr,
    teacher_stride_n, teacher_weight_stride_v, teacher_size_d, teacher_softcap,
    offs_n, first_v, num_classes,
    IS_SHARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Slabs of the tiles of student and teacher: tuples of [BLOCK_N, BLOCK_V // SLABS].

    Rows `offs_n` must exist; classes from `first_v` may lie beyond `num_classes`.
    """
    offs_v = first_v + tl.arange(0, BLOCK_V)
    if IS_SHARED:
        student, teacher = _shared_matmul(
            student_ptr, teacher_ptr, student_weight_ptr, student_stride_n, teacher_stride_n, student_weight_stride_v,
            student_size_d, offs_n, offs_v, num_classes, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
    else:
        student = head_tile(
            student_ptr, student_weight_ptr, student_stride_n, student_weight_stride_v, student_size_d,
            offs_n, offs_v, num_classes, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        teacher = head_tile(
            teacher_ptr, teacher_weight_ptr, teacher_stride_n, teacher_weight_stride_v, teacher_size_d,
            offs_n, offs_v, num_classes, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
    return (
        _finish_slabs(slabs(student, SLABS), student_bias_ptr, student_softcap, first_v, num_classes),
        _finish_slabs(slabs(teacher, SLABS), teacher_bias_ptr, teacher_softcap, first_v, num_classes),
    )


@triton.jit
def head_tile(
    source_ptr,
    weight_ptr,
    stride_n,
    weight_stride_v,
    size_d,
    offs_n,
    offs_v,
    num_classes,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head's tile [BLOCK_N, BLOCK_V] float32 before `finish`."""
    if weight_ptr is None:
        mask = (offs_v < num_classes)[None, :]
        return tl.load(source_ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_v[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    else:
        offs_d = tl.arange(0, BLOCK_D)
        safe_v = tl.minimum(offs_v, num_classes - 1).to(tl.int64)
        source_ptrs = source_ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]
        weight_ptrs = weight_ptr + safe_v[None, :] * weight_stride_v + offs_d[:, None]
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for first in range(0, size_d, BLOCK_D):
            mask_d = first + offs_d < size_d
            source = tl.load(source_ptrs, mask=mask_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
            weight = tl.load(weight_ptrs, mask=mask_d[:, None], other=0.0)  # [BLOCK_D, BLOCK_V]
            acc = tl.dot(source, weight, acc, input_precision="ieee")
            source_ptrs += BLOCK_D
            weight_ptrs += BLOCK_D
        return acc


@triton.jit
def _shared_matmul(
    student_ptr, teacher_ptr, weight_ptr, student_stride_n, teacher_stride_n, weight_stride_v,
    size_d, offs_n, offs_v, num_classes, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Both matmuls in one sweep over a weight that the heads share."""
    offs_d = tl.arange(0, BLOCK_D)
    safe_v = tl.minimum(offs_v, num_classes - 1).to(tl.int64)
    student_ptrs = student_ptr + offs_n.to(tl.int64)[:, None] * student_stride_n + offs_d[None, :]
    teacher_ptrs = teacher_ptr + offs_n.to(tl.int64)[:, None] * teacher_stride_n + offs_d[None, :]
    weight_ptrs = weight_ptr + safe_v[None, :] * weight_stride_v + offs_d[:, None]
    student_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    teacher_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, size_d, BLOCK_D):
        mask_d = first + offs_d < size_d
        weight = tl.load(weight_ptrs, mask=mask_d[:, None], other=0.0)  # [BLOCK_D, BLOCK_V]
        student_acc = tl.dot(
            tl.load(student_ptrs, mask=mask_d[None, :], other=0.0), weight, student_acc, input_precision="ieee"
        )
        teacher_acc = tl.dot(
            tl.load(teacher_ptrs, mask=mask_d[None, :], other=0.0), weight, teacher_acc, input_precision="ieee"
        )
        student_ptrs += BLOCK_D
        teacher_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    return student_acc, teacher_acc


@triton.jit
def slabs(x, SLABS: tl.constexpr):
    """Tuple of `SLABS` neighbouring parts of a tile's columns: registers are only renamed, and what is computed from
    one part is gone before the next.
    """
    if SLABS == 1:
        return (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))
        return slabs(left, SLABS // 2) + slabs(right, SLABS // 2)


@triton.jit
def after(x, row):
    """`x` [BLOCK_N, width], but not before `row` [BLOCK_N], which is finite, is known.

    Without a dependence from slab to slab the compiler interleaves them until registers spill (48 spills for a mixture
    on sm_90); 0 times a number is not folded, as it might be NaN.
    """
    return x + (row * 0.0)[:, None]


@triton.jit
def _finish_slabs(parts, bias_ptr, softcap, first_v, num_classes):
    """`finish` of every slab."""
    width: tl.constexpr = parts[0].shape[1]
    first = (finish(parts[0], bias_ptr, softcap, first_v + tl.arange(0, width), num_classes),)
    if len(parts) == 1:
        return first
    else:
        return first + _finish_slabs(parts[1:], bias_ptr, softcap, first_v + width, num_classes)


@triton.jit
def finish(z, bias_ptr, softcap, offs_v, num_classes):
    """Bias, soft-cap, base 2 and the classes that do not exist; a NaN stays one."""
    mask_v = offs_v < num_classes
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    if softcap is not None:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    z = tl.maximum(z * LOG2_E, FORBIDDEN, propagate_nan=tl.PropagateNan.ALL)
    return z + tl.where(mask_v, 0.0, 2.0 * FORBIDDEN)[None, :]
