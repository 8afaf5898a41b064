"""Row statistics of one head over any part of the classes, for teachers that know only some: taken over tiles, splits
of the vocabulary and the top-k classes themselves, and merged.

With x the logits in base 2, s = x / T and k the most likely class so far, a state is a tuple of [BLOCK_N] float32:

    0 peak x_k, 1 arg k, 2 sum over v != k of 2^(s_v - s_k), 3 the same at T = 1, 4 logit of the label
    loss        5 sum of the logits
    scores      5 largest logit of a class other than the label
                6 sum over v of 2^(s_v - s_k) (s_v - s_k), 7 sum over v != k of 4^(s_v - s_k), 8 the same at T = 1

Numbers 0 to 3 and 6 to 8 are of the classes that a state is of; 4 and 5 of all, top-k or not.
"""

import triton
import triton.language as tl

from fusedmm.kernels.distillation.state import NO_CLASS, NOTHING

TOP_SIZE_LOSS = tl.constexpr(6)
TOP_SIZE_SCORES = tl.constexpr(9)


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
def top_state(x, classes, inverse, label, last, IS_SCORES: tl.constexpr, IS_UNIT: tl.constexpr):
    """The state of logits `x` [BLOCK_N, width] of `classes` ([1 or BLOCK_N, width] int32), with numbers 4 and 5."""
    peak = tl.max(x, 1)
    arg = tl.min(tl.where(x == peak[:, None], classes, NO_CLASS), 1)
    is_peak = classes == arg[:, None]
    x -= peak[:, None]
    unit = tl.where(is_peak, 0.0, tl.exp2(x))
    s = x
    a = unit
    if not IS_UNIT:
        s = x * inverse[:, None]
        a = tl.where(is_peak, 0.0, tl.exp2(s))
    base = (peak, arg.to(tl.float32), tl.sum(a, 1), tl.sum(unit, 1), label, last)
    if IS_SCORES:
        return base + (tl.sum(a * s, 1), tl.sum(a * a, 1), tl.sum(unit * unit, 1))  # noqa: RUF005
    else:
        return base


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
def count_below(row_ptrs, size_k, limit, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N] how many of a row's classes come before `limit`."""
    count = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, size_k, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        classes = tl.load(row_ptrs[:, None] + offs_k[None, :], mask=(offs_k < size_k)[None, :], other=NO_CLASS)
        count += tl.sum((classes < limit).to(tl.int32), 1)
    return count


@triton.jit
def class_at(row_ptrs, position, size_k):
    """[BLOCK_N] a row's class at `position` of its sorted top-k, or beyond every class."""
    return tl.load(row_ptrs + position, mask=position < size_k, other=NO_CLASS)
