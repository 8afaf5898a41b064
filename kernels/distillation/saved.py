"""Rows of what statistics save for a gradient, [SAVED, N] float32 in base 2; k is a head's most likely class."""

import triton.language as tl
from torch import Tensor

STUDENT_SHIFT, TEACHER_SHIFT = tl.constexpr(0), tl.constexpr(1)
STUDENT_LOG_SUM, TEACHER_LOG_SUM = tl.constexpr(2), tl.constexpr(3)
STUDENT_ARG, TEACHER_ARG = tl.constexpr(4), tl.constexpr(5)  # k
STUDENT_OTHERS, TEACHER_OTHERS = tl.constexpr(6), tl.constexpr(7)  # 1 - p_k
STUDENT_RATIO, TEACHER_RATIO = tl.constexpr(8), tl.constexpr(9)  # u_k
STUDENT_MEAN_RATIO, TEACHER_MEAN_RATIO = tl.constexpr(10), tl.constexpr(11)  # log-ratio at k minus the mean of all
UNIT = tl.constexpr(12)  # three rows of the student at T = 1: peak, log of the sum, share of the others than k
GAP = tl.constexpr(15)  # c
SAVED = 16


def mean_ratios(saved: Tensor) -> Tensor:
    """A view [2, N] of student's and teacher's."""
    return saved[STUDENT_MEAN_RATIO.value : TEACHER_MEAN_RATIO.value + 1]
