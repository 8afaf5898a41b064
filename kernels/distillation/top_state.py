"""Row statistics of one head over any part of the classes, for teachers that know only some: taken over tiles, splits
of the vocabulary and the top-k classes themselves, and merged.

With x the logits in base 2, s = x / T and k the most likely class so far, a state is a tuple of [BLOCK_N] float32:

    0 peak x_k, 1 arg k, 2 sum over v != k of 2^(s_v - s_k), 3 the same at T = 1, 4 logit of the label, or 0
    loss        5 sum of the logits
    scores      5 largest logit of a class other than the label
                6 sum over v of 2^(s_v - s_k) (s_v - s_k), 7 sum over v != k of 4^(s_v - s_k), 8 the same at T = 1
"""

import triton
import triton.language as tl

from fusedmm.kernels.distillation.state import NO_CLASS, NOTHING, added, over_lanes, row_sum
from fusedmm.kernels.distillation.tiles import ABSENT, PRESENT

TOP_SIZE_LOSS = tl.constexpr(6)
TOP_SIZE_SCORES = tl.constexpr(9)


@triton.constexpr_function
def top_state_size(is_scores):
    """Numbers of a state."""
    return TOP_SIZE_SCORES if is_scores else TOP_SIZE_LOSS


@triton.jit
def empty_top_state(BLOCK_N: tl.constexpr, IS_SCORES: tl.constexpr):
    """The state of no classes."""
    zero = tl.zeros([BLOCK_N], tl.float32)
    none = tl.full([BLOCK_N], NOTHING, tl.float32)
    if IS_SCORES:
        return (none, zero, zero, zero, zero, none, zero, zero, zero)
    else:
        return (none, zero, zero, zero, zero, zero)


@triton.jit
def top_tile_state(
    students, inverse, labels, num_classes, first_class,
    IS_SCORES: tl.constexpr, IS_UNIT: tl.constexpr, HAS_LABELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The state of one tile, given as slabs of logits in base 2 [BLOCK_N, width], some of them `ABSENT`; arguments and
    order of work as in `tile_state`.
    """
    slabs: tl.constexpr = len(students)
    block_n: tl.constexpr = students[0].shape[0]
    width: tl.constexpr = students[0].shape[1]
    peak = students[0]
    for i in tl.static_range(1, slabs):
        peak = tl.maximum(peak, students[i])
    peak = tl.max(peak, 1)
    arg = tl.full([block_n, width], NO_CLASS, tl.int32)
    label = tl.zeros([block_n, width], tl.float32)
    last = label
    if IS_SCORES:
        last += NOTHING
    columns = tl.arange(0, width)[None, :]
    for i in tl.static_range(slabs):
        if num_classes > i * width:
            arg = tl.minimum(arg, tl.where(students[i] == peak[:, None], columns + i * width, NO_CLASS))
            if HAS_LABELS:
                is_label = columns == (labels - i * width)[:, None]
                counted = tl.where(students[i] < PRESENT, 0.0, students[i])
                label += tl.where(is_label, counted, 0.0)
                if IS_SCORES:
                    last = tl.maximum(last, tl.where(is_label, NOTHING, students[i]))
                else:
                    last += counted
    arg = tl.min(arg, 1)
    label = tl.sum(label, 1)
    last = tl.max(last, 1) if IS_SCORES else tl.sum(last, 1)
    sums = _slab_sums(students[0], peak, arg, inverse, IS_SCORES, IS_UNIT, LANES if slabs > 1 else 0)
    for i in tl.static_range(1, slabs):
        if num_classes > i * width:
            sums = added(sums, _slab_sums(students[i], peak, arg - i * width, inverse, IS_SCORES, IS_UNIT, LANES))
    if slabs > 1:
        sums = over_lanes(sums)
    return (peak, (arg + first_class).to(tl.float32), sums[0], sums[1], label, last) + sums[2:]  # noqa: RUF005


@triton.jit
def _slab_sums(x, peak, arg, inverse, IS_SCORES: tl.constexpr, IS_UNIT: tl.constexpr, LANES: tl.constexpr):
    """Numbers 2, 3, and for scores 6 to 8 of a state, over one slab."""
    is_peak = tl.arange(0, x.shape[1])[None, :] == arg[:, None]
    x -= peak[:, None]
    unit = tl.where(is_peak, 0.0, tl.exp2(x))
    s = x
    a = unit
    if not IS_UNIT:
        s = x * inverse[:, None]
        a = tl.where(is_peak, 0.0, tl.exp2(s))
    sums = (row_sum(a, LANES), row_sum(unit, LANES))
    if IS_SCORES:
        return sums + (row_sum(a * s, LANES), row_sum(a * a, LANES), row_sum(unit * unit, LANES))  # noqa: RUF005
    else:
        return sums


@triton.jit
def merge_top_states(one, two, inverse, IS_SCORES: tl.constexpr):
    """State of two disjoint sets of classes from the state of each; of equal peaks the smaller class is kept."""
    first = (one[0] > two[0]) | ((one[0] == two[0]) & (one[1] <= two[1]))
    rise = one[0] - two[0]
    unit1 = tl.exp2(tl.minimum(rise, 0.0))
    unit2 = tl.exp2(tl.minimum(-rise, 0.0))
    drop1 = tl.minimum(rise * inverse, 0.0)
    drop2 = tl.minimum(-rise * inverse, 0.0)
    shrink1 = tl.exp2(drop1)
    shrink2 = tl.exp2(drop2)
    base = (
        tl.where(first, one[0], two[0]),
        tl.where(first, one[1], two[1]),
        tl.where(first, one[2] + shrink2 * (1.0 + two[2]), two[2] + shrink1 * (1.0 + one[2])),
        tl.where(first, one[3] + unit2 * (1.0 + two[3]), two[3] + unit1 * (1.0 + one[3])),
        one[4] + two[4],
    )
    if IS_SCORES:
        return base + (  # noqa: RUF005
            tl.maximum(one[5], two[5]),
            shrink1 * (one[6] + drop1 * (1.0 + one[2])) + shrink2 * (two[6] + drop2 * (1.0 + two[2])),
            tl.where(
                first, one[7] + shrink2 * shrink2 * (1.0 + two[7]), two[7] + shrink1 * shrink1 * (1.0 + one[7])
            ),
            tl.where(first, one[8] + unit2 * unit2 * (1.0 + two[8]), two[8] + unit1 * unit1 * (1.0 + one[8])),
        )  # fmt: skip
    else:
        return base + (one[5] + two[5],)  # noqa: RUF005


@triton.jit
def count_below(class_ptrs, size_k, limit):
    """[BLOCK_N] how many of a row's classes, which ascend from `class_ptrs`, come before `limit`: by bisection."""
    low = tl.zeros(class_ptrs.shape, tl.int32)
    high = low + size_k
    size = size_k
    while size > 0:
        middle = (low + high) // 2
        is_below = class_at(class_ptrs, middle, size_k) < limit
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_below, high, middle)
        size = size // 2
    return low


@triton.jit
def class_at(class_ptrs, position, size_k):
    """[BLOCK_N] a row's class at `position`, or beyond every class."""
    return tl.load(class_ptrs + position, mask=position < size_k, other=NO_CLASS)


@triton.jit
def lift(students, class_ptrs, top_ptrs, mask_n, start, end, first_v):
    """The tile from class `first_v` with `ABSENT` in place of a row's top-k classes, numbers `start` to `end` [BLOCK_N]
    of them, whose logits go to `top_ptrs`.

    As many passes as the most of them that one row has. Their count is known before the first: the compiler would take
    a loop until no row has any left for one that threads leave one by one, and keep what steers the matmuls after it in
    registers of each thread (147 instructions a step of a matmul on sm_90, in place of 95).
    """
    for passed in range(tl.max(end - start, 0)):
        position = start + passed
        column = class_at(class_ptrs, position, end) - first_v
        tl.store(top_ptrs + position, tl.sum(_at(students, column), 1), mask=mask_n & (position < end))
        students = _without(students, column)
    return students


@triton.jit
def _at(students, column):
    """[BLOCK_N, width] whose sum over a row is its logit at `column`; 0 where that is beyond the tile."""
    x = students[0]
    width: tl.constexpr = x.shape[1]
    here = tl.where(tl.arange(0, width)[None, :] == column[:, None], x, 0.0)
    if len(students) == 1:
        return here
    else:
        return here + _at(students[1:], column - width)


@triton.jit
def _without(students, column):
    x = students[0]
    width: tl.constexpr = x.shape[1]
    rest = (tl.where(tl.arange(0, width)[None, :] == column[:, None], ABSENT, x),)
    if len(students) == 1:
        return rest
    else:
        return rest + _without(students[1:], column - width)
