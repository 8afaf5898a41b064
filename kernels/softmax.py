"""Softmax in base 2 and in pieces: the device helpers every kernel with an online softmax shares.

Kernels keep scores in base 2 (``exp2`` is one instruction); what they return is a natural logarithm. A running
maximum of -inf means that nothing was seen yet, so the shift that is subtracted is 0 there and no ``-inf - -inf``
arises.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finite_shift(running_max):
    """What to subtract before exp2: the maximum, or 0 where nothing was seen."""
    return tl.where(running_max == -float("inf"), 0.0, running_max)


@triton.jit
def natural_lse(running_max, running_sum):
    """Natural log of a sum of exponentials from its base-2 maximum and rescaled sum; -inf where nothing was seen.

    In float64 up to the last rounding: the backward starts from this number, and what it lacks is a factor on every
    probability of the row.
    """
    seen = running_sum > 0.0
    lse2 = running_max.to(tl.float64) + tl.log2(tl.where(seen, running_sum, 1.0))
    return tl.where(seen, (lse2 * LN_2).to(tl.float32), -float("inf"))
