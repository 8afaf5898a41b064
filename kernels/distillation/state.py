"""Row statistics of two heads that can be taken over any part of the classes and merged: over tiles, splits of the
vocabulary, and ranks.

Of each head, with x its logits in base 2, s = x / T, k its most likely class so far and u = t - s the teacher's minus
the student's tempered logit:

    peak     x_k              others   sum over v != k of 2^(s_v - s_k)
    arg      k                slope    sum over v of 2^(s_v - s_k) (u_v - u_k)         ratio   u_k

The largest class is kept apart, so that 1 - p_k and ``log p_k - log t_k - KL`` of a saturated row keep their digits,
and u is a difference of logits taken element by element, so that a student near its teacher does. A state is a tuple of
[BLOCK_N] float32, with a = 2^(s - s_k) and b = 2^(t - t_k):

    both        0 peak, 1 arg, 2 others, 3 slope, 4 ratio of the student
                5 to 9 the same of the teacher
                10 others of the student at T = 1
                11 student's logit of the label
    loss        12 sum of the student's logits
    scores      12 teacher's logit of the label
                13 student's largest logit of a class other than the label
                14 sum over v != k of 4^(x_v - x_k)
                15 others of the teacher at T = 1
                16 sum a log2 a, 17 sum b log2 b, 18 sum sqrt(a b)
                19 sum (a - b)^2, 20 sum (a - b) b, 21 sum b^2
"""

import triton
import triton.language as tl

from fusedmm.kernels.distillation.tiles import PRESENT
from fusedmm.kernels.softmax import LN_2

SIZE_LOSS = tl.constexpr(13)
SIZE_SCORES = tl.constexpr(22)
NOTHING = tl.constexpr(-1e35)  # peak of a state that has seen no class: below any logit
NO_CLASS = tl.constexpr(1 << 30)  # beyond every class, and exact in float32


@triton.constexpr_function
def state_size(is_scores):
    """Numbers of a state."""
    return SIZE_SCORES if is_scores else SIZE_LOSS


@triton.jit
def empty_state(BLOCK_N: tl.constexpr, IS_SCORES: tl.constexpr):
    """The state of no classes."""
    zero = tl.zeros([BLOCK_N], tl.float32)
    none = tl.full([BLOCK_N], NOTHING, tl.float32)
    base = (none, zero, zero, zero, zero, none, zero, zero, zero, zero, zero)
    if IS_SCORES:
        return base + (zero, zero, none, zero, zero, zero, zero, zero, zero, zero, zero)  # noqa: RUF005
    else:
        return base + (zero, zero)  # noqa: RUF005 (Triton knows no unpacking)


@triton.jit
def tile_state(
    students, teachers, inverse, labels, num_classes, first_class,
    IS_SCORES: tl.constexpr, IS_UNIT: tl.constexpr, HAS_LABELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The state of one tile, given as slabs of both heads' logits in base 2 [BLOCK_N, width].

    Labels, and the `num_classes` that exist, are counted from its first column: class `first_class` over all ranks.

    The peaks of the whole tile come first. Against them everything else is a plain sum, taken slab by slab, and only
    one merge is left to do a tile. Each slab is a branch, which the classes beyond the last skip: the compiler does not
    mix the work of two branches, while it would mix that of slabs in a row until registers spill (235 spills on sm_90).
    A slab's columns are compared with ``arg - i * width``: numbers of every column of
    the tile would be kept in registers.
    """
    slabs: tl.constexpr = len(students)
    block_n: tl.constexpr = students[0].shape[0]
    width: tl.constexpr = students[0].shape[1]
    student_peak = students[0]
    teacher_peak = teachers[0]
    for i in tl.static_range(1, slabs):
        student_peak = tl.maximum(student_peak, students[i])
        teacher_peak = tl.maximum(teacher_peak, teachers[i])
    student_peak = tl.max(student_peak, 1)
    teacher_peak = tl.max(teacher_peak, 1)
    student_arg = tl.full([block_n, width], NO_CLASS, tl.int32)
    teacher_arg = student_arg
    student_label = tl.zeros([block_n, width], tl.float32)
    last = student_label
    runner_up = student_label + NOTHING
    columns = tl.arange(0, width)[None, :]
    for i in tl.static_range(slabs):
        if num_classes > i * width:
            student_arg = tl.minimum(
                student_arg, tl.where(students[i] == student_peak[:, None], columns + i * width, NO_CLASS)
            )
            teacher_arg = tl.minimum(
                teacher_arg, tl.where(teachers[i] == teacher_peak[:, None], columns + i * width, NO_CLASS)
            )
            if HAS_LABELS:
                is_label = columns == (labels - i * width)[:, None]
                student_label += tl.where(is_label, students[i], 0.0)
                if IS_SCORES:
                    last += tl.where(is_label, teachers[i], 0.0)
                    runner_up = tl.maximum(runner_up, tl.where(is_label, NOTHING, students[i]))
                else:
                    last += tl.where(columns < num_classes - i * width, students[i], 0.0)
    student_arg = tl.min(student_arg, 1)
    teacher_arg = tl.min(teacher_arg, 1)
    student_label = tl.sum(student_label, 1)
    last = tl.sum(last, 1)
    if IS_SCORES:
        runner_up = tl.max(runner_up, 1)
    level = (teacher_peak - student_peak) * inverse
    sums = _slab_sums(
        students[0], teachers[0], student_peak, student_arg, teacher_peak, teacher_arg, level, inverse,
        IS_SCORES, IS_UNIT, LANES if slabs > 1 else 0,
    )  # fmt: skip
    for i in tl.static_range(1, slabs):
        if num_classes > i * width:
            slab = _slab_sums(
                students[i], teachers[i], student_peak, student_arg - i * width, teacher_peak,
                teacher_arg - i * width, level, inverse, IS_SCORES, IS_UNIT, LANES,
            )  # fmt: skip
            sums = added(sums, slab)
    if slabs > 1:
        sums = over_lanes(sums)
    base = (
        student_peak, (student_arg + first_class).to(tl.float32),
        sums[0], sums[1] - (sums[2] - level) * sums[0], sums[2],
        teacher_peak, (teacher_arg + first_class).to(tl.float32),
        sums[3], sums[4] - (sums[5] - level) * sums[3], sums[5],
        sums[6], student_label, last,
    )  # fmt: skip
    if IS_SCORES:
        return base + (runner_up,) + sums[7:]  # noqa: RUF005 (Triton knows no unpacking)
    else:
        return base


@triton.jit
def _slab_sums(
    x, y, student_peak, student_arg, teacher_peak, teacher_arg, level, inverse,
    IS_SCORES: tl.constexpr, IS_UNIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sums over one slab: of each head others, slope with `level` in the place of ratio, and ratio; others of the
    student at T = 1; for scores numbers 14 to 21 of a state.
    """
    columns = tl.arange(0, x.shape[1])[None, :]
    u = y - x
    x -= student_peak[:, None]
    y -= teacher_peak[:, None]
    s = x
    t = y
    if not IS_UNIT:
        u *= inverse[:, None]
        s *= inverse[:, None]
        t *= inverse[:, None]
    a = tl.exp2(s)
    b = tl.exp2(t)
    is_student_peak = columns == student_arg[:, None]
    is_teacher_peak = columns == teacher_arg[:, None]
    student_others = tl.where(is_student_peak, 0.0, a)
    teacher_others = tl.where(is_teacher_peak, 0.0, b)
    rise = u - level[:, None]
    unit = student_others
    teacher_unit = teacher_others
    if not IS_UNIT:
        unit = tl.where(is_student_peak, 0.0, tl.exp2(x))
        if IS_SCORES:
            teacher_unit = tl.where(is_teacher_peak, 0.0, tl.exp2(y))
    sums = (
        row_sum(student_others, LANES), row_sum(student_others * rise, LANES),
        row_sum(tl.where(is_student_peak, u, 0.0), LANES),
        row_sum(teacher_others, LANES), row_sum(teacher_others * rise, LANES),
        row_sum(tl.where(is_teacher_peak, u, 0.0), LANES), row_sum(unit, LANES),
    )  # fmt: skip
    if IS_SCORES:
        difference = a - b
        return sums + (  # noqa: RUF005
            row_sum(unit * unit, LANES), row_sum(teacher_unit, LANES),
            row_sum(a * s, LANES), row_sum(b * t, LANES), row_sum(tl.exp2(0.5 * (s + t)), LANES),
            row_sum(difference * difference, LANES), row_sum(difference * b, LANES), row_sum(b * b, LANES),
        )  # fmt: skip
    else:
        return sums


@triton.jit
def row_sum(x, LANES: tl.constexpr):
    """Sum of every row [BLOCK_N]; with `LANES` [BLOCK_N, LANES], what each of the threads holds that share a row of a
    matrix accumulator in pairs of columns: no exchange between threads until all slabs are done.
    """
    if LANES == 0:
        return tl.sum(x, 1)
    else:
        return tl.sum(tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // (2 * LANES), LANES, 2]), 3), 1)


@triton.jit
def added(one, two):
    if len(one) == 1:
        return (one[0] + two[0],)
    else:
        return (one[0] + two[0],) + added(one[1:], two[1:])  # noqa: RUF005


@triton.jit
def over_lanes(sums):
    if len(sums) == 1:
        return (tl.sum(sums[0], 1),)
    else:
        return (tl.sum(sums[0], 1),) + over_lanes(sums[1:])  # noqa: RUF005


@triton.jit
def _merge_head(peak1, arg1, others1, slope1, ratio1, peak2, arg2, others2, slope2, ratio2, inverse_temperature):
    """One head's part of `merge_states`: the state with the larger peak absorbs the other; on a tie the first."""
    first = peak1 >= peak2
    shrink1 = tl.exp2(tl.minimum((peak1 - peak2) * inverse_temperature, 0.0))
    shrink2 = tl.exp2(tl.minimum((peak2 - peak1) * inverse_temperature, 0.0))
    peak = tl.where(first, peak1, peak2)
    others = tl.where(first, others1 + shrink2 * (1.0 + others2), others2 + shrink1 * (1.0 + others1))
    jump = ratio2 - ratio1
    slope = tl.where(
        first,
        slope1 + shrink2 * (slope2 + jump * (1.0 + others2)),
        slope2 + shrink1 * (slope1 - jump * (1.0 + others1)),
    )
    return peak, tl.where(first, arg1, arg2), others, slope, tl.where(first, ratio1, ratio2), shrink1, shrink2


@triton.jit
def _merge_squares(difference, cross, square, shrink_a, shrink_b):
    """sum (a - b)^2, sum (a - b) b and sum b^2 after a and b were multiplied by their own factors."""
    gap = shrink_a - shrink_b
    return (
        shrink_a * shrink_a * difference + 2.0 * shrink_a * gap * cross + gap * gap * square,
        shrink_b * (shrink_a * cross + gap * square),
        shrink_b * shrink_b * square,
    )


@triton.jit
def merge_states(one, two, inverse_temperature, IS_SCORES: tl.constexpr):
    """State of two disjoint sets of classes from the state of each; exact, and associative up to rounding."""
    student_peak, student_arg, student_others, student_slope, student_ratio, a1, a2 = _merge_head(
        one[0], one[1], one[2], one[3], one[4], two[0], two[1], two[2], two[3], two[4], inverse_temperature
    )
    teacher_peak, teacher_arg, teacher_others, teacher_slope, teacher_ratio, b1, b2 = _merge_head(
        one[5], one[6], one[7], one[8], one[9], two[5], two[6], two[7], two[8], two[9], inverse_temperature
    )
    unit1 = tl.exp2(tl.minimum(one[0] - two[0], 0.0))
    unit2 = tl.exp2(tl.minimum(two[0] - one[0], 0.0))
    first = one[0] >= two[0]
    unit_others = tl.where(first, one[10] + unit2 * (1.0 + two[10]), two[10] + unit1 * (1.0 + one[10]))
    base = (
        student_peak, student_arg, student_others, student_slope, student_ratio,
        teacher_peak, teacher_arg, teacher_others, teacher_slope, teacher_ratio, unit_others,
    )  # fmt: skip
    if IS_SCORES:
        squares = tl.where(first, one[14] + unit2 * unit2 * (1.0 + two[14]), two[14] + unit1 * unit1 * (1.0 + one[14]))
        teacher1 = tl.exp2(tl.minimum(one[5] - two[5], 0.0))
        teacher2 = tl.exp2(tl.minimum(two[5] - one[5], 0.0))
        unit_teacher_others = tl.where(
            one[5] >= two[5], one[15] + teacher2 * (1.0 + two[15]), two[15] + teacher1 * (1.0 + one[15])
        )
        student_drop1 = tl.minimum((one[0] - two[0]) * inverse_temperature, 0.0)
        student_drop2 = tl.minimum((two[0] - one[0]) * inverse_temperature, 0.0)
        teacher_drop1 = tl.minimum((one[5] - two[5]) * inverse_temperature, 0.0)
        teacher_drop2 = tl.minimum((two[5] - one[5]) * inverse_temperature, 0.0)
        student_logs = a1 * (one[16] + student_drop1 * (1.0 + one[2])) + a2 * (two[16] + student_drop2 * (1.0 + two[2]))
        teacher_logs = b1 * (one[17] + teacher_drop1 * (1.0 + one[7])) + b2 * (two[17] + teacher_drop2 * (1.0 + two[7]))
        overlap = (
            tl.exp2(0.5 * (student_drop1 + teacher_drop1)) * one[18]
            + tl.exp2(0.5 * (student_drop2 + teacher_drop2)) * two[18]
        )
        difference1, cross1, square1 = _merge_squares(one[19], one[20], one[21], a1, b1)
        difference2, cross2, square2 = _merge_squares(two[19], two[20], two[21], a2, b2)
        return base + (  # noqa: RUF005
            one[11] + two[11], one[12] + two[12], tl.maximum(one[13], two[13]), squares, unit_teacher_others,
            student_logs, teacher_logs, overlap,
            difference1 + difference2, cross1 + cross2, square1 + square2,
        )  # fmt: skip
    else:
        return base + (one[11] + two[11], one[12] + two[12])  # noqa: RUF005


@triton.jit
def label_scores(peak, others, squares, label, runner_up):
    """EL2N and margin from numbers of the student at T = 1: peak, sum and sum of squares of the others' powers, its
    logit of the label and the largest of another class.
    """
    size = 1.0 + others
    is_peak = label == peak
    share = tl.exp2(label - peak) / size
    error = tl.where(is_peak, others / size, 1.0 - share)
    rest = tl.where(is_peak, squares, 1.0 + squares) / (size * size) - tl.where(is_peak, 0.0, share * share)
    margin = tl.where(runner_up < PRESENT, float("inf"), (label - runner_up) * LN_2)  # inf: no other class
    return tl.sqrt(tl.maximum(rest, 0.0) + error * error), margin
