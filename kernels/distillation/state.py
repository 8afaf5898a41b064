"""Row statistics of two heads that can be taken over any part of the classes and merged: over tiles, splits of the
vocabulary, and ranks.

Of each head, with x its logits in base 2, s = x / T, k its most likely class so far and u = t - s the teacher's minus
the student's tempered logit:

    peak     x_k              others   sum over v != k of 2^(s_v - s_k)
    arg      k                slope    sum over v of 2^(s_v - s_k) (u_v - u_k)         ratio   u_k

The largest class is kept apart, so that 1 - p_k and ``log p_k - log t_k - KL`` of a saturated row keep their digits,
and u is a difference of logits taken element by element, so that a student near its teacher does. A state is a tuple of
[BLOCK_N] float32, in the order of `SIZE_BASE` numbers below, then those of the loss or of the scores.

    base     0 peak, 1 arg, 2 others, 3 slope, 4 ratio of the student    5..9 the same of the teacher    10 others of
    the student at T = 1 loss     11 logit of the label    12 sum of logits scores   11 logit of the label    12 of the
    teacher    13 largest logit of another class    14 sum over v != k of 4^(x_v - x_k)    15 others of the teacher at T
    = 1
             16 sum a log2 a    17 sum b log2 b    18 sum sqrt(a b)    19 sum (a - b)^2    20 sum (a - b) b    21 sum
             b^2       a = 2^(s - s_k), b = 2^(t - t_k)
"""

import triton
import triton.language as tl

SIZE_LOSS = tl.constexpr(13)
SIZE_SCORES = tl.constexpr(22)
NOTHING = tl.constexpr(-1e35)  # peak of a state that has seen no class: below any logit
NO_CLASS = tl.constexpr(1 << 30)  # beyond every class, and exact in float32


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
def _head_state(x, scaled, u, offs_v):
    """Peak and the rest of one head's tile."""
    peak = tl.max(x, 1)
    arg = tl.min(tl.where(x == peak[:, None], offs_v[None, :], NO_CLASS), 1)
    is_peak = offs_v[None, :] == arg[:, None]
    a = tl.exp2(scaled - tl.max(scaled, 1)[:, None])
    ratio = tl.sum(tl.where(is_peak, u, 0.0), 1)
    return peak, arg.to(tl.float32), tl.sum(tl.where(is_peak, 0.0, a), 1), tl.sum(a * (u - ratio[:, None]), 1), ratio


@triton.jit
def loss_state(x, y, inverse_temperature, offs_v, labels, mask_v, IS_UNIT: tl.constexpr, HAS_LABELS: tl.constexpr):
    """Base and loss numbers of one tile: x the student's and y the teacher's logits in base 2 [BLOCK_N, BLOCK_V];
    offs_v are classes over all ranks.
    """
    s = x * inverse_temperature[:, None]
    t = y * inverse_temperature[:, None]
    u = t - s
    student_peak, student_arg, student_others, student_slope, student_ratio = _head_state(x, s, u, offs_v)
    teacher_peak, teacher_arg, teacher_others, teacher_slope, teacher_ratio = _head_state(y, t, u, offs_v)
    unit_others = student_others
    label_logit = tl.zeros_like(student_peak)
    total = label_logit
    if HAS_LABELS:
        label_logit = tl.sum(tl.where(offs_v[None, :] == labels[:, None], x, 0.0), 1)
        total = tl.sum(tl.where(mask_v[None, :], x, 0.0), 1)
        if not IS_UNIT:
            is_peak = offs_v[None, :] == student_arg.to(tl.int32)[:, None]
            unit_others = tl.sum(tl.where(is_peak, 0.0, tl.exp2(x - student_peak[:, None])), 1)
    return (
        student_peak, student_arg, student_others, student_slope, student_ratio,
        teacher_peak, teacher_arg, teacher_others, teacher_slope, teacher_ratio, unit_others, label_logit, total,
    )  # fmt: skip


@triton.jit
def score_sums(x, y, base, inverse_temperature, offs_v, labels, IS_UNIT: tl.constexpr, HAS_LABELS: tl.constexpr):
    """Numbers 12 to 21 of a state for scores of a tile whose loss state is `base`."""
    s = (x - base[0][:, None]) * inverse_temperature[:, None]
    t = (y - base[5][:, None]) * inverse_temperature[:, None]
    a = tl.exp2(s)
    b = tl.exp2(t)
    zero = tl.zeros_like(base[0])
    teacher_label_logit = zero
    runner_up = zero
    squares = zero
    teacher_unit_others = zero
    if HAS_LABELS:
        is_label = offs_v[None, :] == labels[:, None]
        teacher_label_logit = tl.sum(tl.where(is_label, y, 0.0), 1)
        runner_up = tl.max(tl.where(is_label, NOTHING, x), 1)
        unit = a
        if not IS_UNIT:
            unit = tl.exp2(x - base[0][:, None])
            is_teacher_peak = offs_v[None, :] == base[6].to(tl.int32)[:, None]
            teacher_unit_others = tl.sum(tl.where(is_teacher_peak, 0.0, tl.exp2(y - base[5][:, None])), 1)
        squares = tl.sum(tl.where(offs_v[None, :] == base[1].to(tl.int32)[:, None], 0.0, unit * unit), 1)
    difference = a - b
    return (
        teacher_label_logit, runner_up, squares, teacher_unit_others, tl.sum(a * s, 1), tl.sum(b * t, 1),
        tl.sum(tl.exp2(0.5 * (s + t)), 1),
        tl.sum(difference * difference, 1), tl.sum(difference * b, 1), tl.sum(b * b, 1),
    )  # fmt: skip


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
