"""Tiles of logits of one head or two: from a matmul with the vocabulary's weight, or from logits that exist.

A tile is [BLOCK_N, BLOCK_V] float32 in base 2, ``log2(e) * z``: the matmul accumulates in float32 (float32 inputs are
multiplied exactly, without TF32) from the bias on, then the soft-cap, and nothing is rounded in between. A logit of
-inf counts as `LOWEST`, -1e30 in base e: finite, so that 0 times it is 0. Classes beyond the last lie lower still, at
`ABSENT`. On Hopper and later TMA copies the 16-bit matrices of a matmul, so that their addresses take no registers
beside two tiles of logits.
"""

import triton
import triton.language as tl

from fusedmm.kernels.softmax import LOG2_E

LOWEST = tl.constexpr(-1e30)  # of a forbidden class, in base e
MISSING = tl.constexpr(-2e30)  # of a class beyond the last, in base e
ABSENT = tl.constexpr(-2.8853900817779268e30)  # the same in base 2
ALLOWED = tl.constexpr(-1.1e30)  # in base 2, of classes that are not forbidden only more
PRESENT = tl.constexpr(-2.2e30)  # of classes that are there, forbidden or not, only more
SATURATED = tl.constexpr(-80.0)  # its sigmoid is 0 beside 1, and nothing overflows on the way


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
    first_n, num_rows, first_v, num_classes,
    IS_SHARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Slabs of the tiles of student and teacher: tuples of [BLOCK_N, BLOCK_V // SLABS].

    Rows from `first_n` may lie beyond `num_rows`, and hold anything; classes from `first_v` beyond `num_classes`.
    """
    if IS_SHARED:
        student, teacher = _shared_matmul(
            student_ptr, student_bias_ptr, teacher_ptr, teacher_bias_ptr, student_weight_ptr,
            student_stride_n, teacher_stride_n, student_weight_stride_v, student_size_d,
            first_n, num_rows, first_v, num_classes, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        students = _finish(slabs(student, SLABS), student_softcap, num_classes - first_v)
        return students, _finish(slabs(teacher, SLABS), teacher_softcap, num_classes - first_v)
    else:
        students = head_slabs(
            student_ptr, student_weight_ptr, student_bias_ptr,
            student_stride_n, student_weight_stride_v, student_size_d, student_softcap,
            first_n, num_rows, first_v, num_classes, BLOCK_N, BLOCK_V, BLOCK_D, SLABS,
        )  # fmt: skip
        teachers = head_slabs(
            teacher_ptr, teacher_weight_ptr, teacher_bias_ptr,
            teacher_stride_n, teacher_weight_stride_v, teacher_size_d, teacher_softcap,
            first_n, num_rows, first_v, num_classes, BLOCK_N, BLOCK_V, BLOCK_D, SLABS,
        )  # fmt: skip
        return students, teachers


@triton.jit
def head_slabs(
    source_ptr, weight_ptr, bias_ptr, stride_n, weight_stride_v, size_d, softcap,
    first_n, num_rows, first_v, num_classes,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """`logit_slabs` of one head."""
    tile = _head_tile(
        source_ptr, weight_ptr, bias_ptr, stride_n, weight_stride_v, size_d,
        first_n, num_rows, first_v, num_classes, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    return _finish(slabs(tile, SLABS), softcap, num_classes - first_v)


@triton.jit
def _rows_of(source, stride, first, count, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """What `_load_rows` needs of a matrix: its descriptor, or pointers [BLOCK, BLOCK_D] to rows that exist."""
    if isinstance(source, tl.tensor_descriptor):
        return source
    else:
        rows = tl.minimum(first + tl.arange(0, BLOCK), count - 1).to(tl.int64)
        return source + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_rows(source, first, first_d, size_d, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of a matrix from column `first_d`; columns from `size_d` on are 0."""
    if isinstance(source, tl.tensor_descriptor):
        return source.load([first, first_d])
    else:
        return tl.load(source + first_d, mask=(first_d + tl.arange(0, BLOCK_D) < size_d)[None, :], other=0.0)


@triton.jit
def _bias_tile(bias_ptr, first_n, first_v, num_classes, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """[BLOCK_N, BLOCK_V] float32 for logits to be added to: the bias, or 0, and `MISSING` where no class is.

    Matmuls start from it, because registers are free then: after them each column's bias and mask would take one.
    The rows differ in a 0 that the compiler cannot see: where it copies one accumulator's register to that of another
    row, ptxas waits for each product before it starts the next (C7514).
    """
    offs_v = first_v + tl.arange(0, BLOCK_V)
    mask_v = offs_v < num_classes
    bias = tl.zeros([BLOCK_V], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        bias = tl.maximum(bias, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    zero = tl.minimum(first_n + tl.arange(0, BLOCK_N), 0).to(tl.float32)
    return tl.where(mask_v, bias, MISSING)[None, :] + zero[:, None]


@triton.jit
def _head_tile(
    source_ptr, weight_ptr, bias_ptr, stride_n, weight_stride_v, size_d, first_n, num_rows, first_v, num_classes,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_V] logits of one head, float32."""
    acc = _bias_tile(bias_ptr, first_n, first_v, num_classes, BLOCK_N, BLOCK_V)
    if weight_ptr is None:
        mask = (first_v + tl.arange(0, BLOCK_V) < num_classes)[None, :]
        sources = _rows_of(source_ptr, stride_n, first_n, num_rows, BLOCK_N, BLOCK_V)
        z = acc + tl.load(sources + first_v, mask=mask, other=0.0).to(tl.float32)
        return tl.where(mask, tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL), MISSING)
    else:
        sources = _rows_of(source_ptr, stride_n, first_n, num_rows, BLOCK_N, BLOCK_D)
        weights = _rows_of(weight_ptr, weight_stride_v, first_v, num_classes, BLOCK_V, BLOCK_D)
        for first_d in range(0, size_d, BLOCK_D):
            source = _load_rows(sources, first_n, first_d, size_d, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            weight = _load_rows(weights, first_v, first_d, size_d, BLOCK_D)  # [BLOCK_V, BLOCK_D]
            acc = tl.dot(source, weight.T, acc, input_precision="ieee")
        return acc


@triton.jit
def _shared_matmul(
    student_ptr, student_bias_ptr, teacher_ptr, teacher_bias_ptr, weight_ptr,
    student_stride_n, teacher_stride_n, weight_stride_v, size_d,
    first_n, num_rows, first_v, num_classes, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Both matmuls in one sweep over a weight that the heads share."""
    students = _rows_of(student_ptr, student_stride_n, first_n, num_rows, BLOCK_N, BLOCK_D)
    teachers = _rows_of(teacher_ptr, teacher_stride_n, first_n, num_rows, BLOCK_N, BLOCK_D)
    weights = _rows_of(weight_ptr, weight_stride_v, first_v, num_classes, BLOCK_V, BLOCK_D)
    student_acc = _bias_tile(student_bias_ptr, first_n, first_v, num_classes, BLOCK_N, BLOCK_V)
    teacher_acc = _bias_tile(teacher_bias_ptr, first_n, first_v, num_classes, BLOCK_N, BLOCK_V)
    for first_d in range(0, size_d, BLOCK_D):
        weight = _load_rows(weights, first_v, first_d, size_d, BLOCK_D).T  # [BLOCK_D, BLOCK_V]
        student = _load_rows(students, first_n, first_d, size_d, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        teacher = _load_rows(teachers, first_n, first_d, size_d, BLOCK_D)
        student_acc = tl.dot(student, weight, student_acc, input_precision="ieee")
        teacher_acc = tl.dot(teacher, weight, teacher_acc, input_precision="ieee")
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
def _finish(parts, softcap, num_classes):
    """Soft-cap and base 2 of every slab; a NaN stays one, and what is `MISSING` too."""
    z = parts[0]
    if softcap is not None:  # noqa: SIM102 (the inner one is a branch for every slab, see `tile_state`)
        if num_classes > 0:
            ratio = tl.maximum(z * (2.0 / softcap), SATURATED, propagate_nan=tl.PropagateNan.ALL)
            z = tl.where(z == MISSING, z, softcap * (2.0 * tl.sigmoid(ratio) - 1.0))
    first = (tl.maximum(z, MISSING, propagate_nan=tl.PropagateNan.ALL) * LOG2_E,)
    if len(parts) == 1:
        return first
    else:
        return first + _finish(parts[1:], softcap, num_classes - z.shape[1])
