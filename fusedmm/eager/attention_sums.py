"""Sums that rounding must not change: of the probabilities of a softmax, and of the gradients of its scores.

The backward of `fusedmm.eager.attention` makes P = exp2(s + exponent) of an exponent that a float32 lse has rounded. At
scores of 1000 that is a factor of 1 +- 1e-4 on all of a row, where a sharp softmax is exactly 1 and its gradient 0. So
where exponents are far from 0, P is divided by its sum, and what the gradients sum to but should not is taken back in
the ratio of P. Nearer, the operators are saved: they are 20 % of forward and backward of short segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedmm.eager.attention_groups import Block, Group
from fusedmm.eager.attention_inputs import Counts, Inputs
from fusedmm.eager.products import LOG2_E

NEAR = 16.0  # exponents in base 2, of which P is off by 1e-6 at most


class RowTerms(NamedTuple):
    """What the backward knows of a query before it reads a key."""

    exponent: Tensor  # [total_q, Hq, M] added to the scores in base 2 so that exp2 gives P
    offset: Tensor  # [total_q, Hq, M] the part of dz that P multiplies
    certain: Tensor | None  # [total_q, Hq, M] True where a softmax is over a single key: dz is exactly ``total``
    total: Tensor | None  # [total_q, Hq, M] what dz sums to over a softmax; None: 0
    mass: Tensor | None  # [total_q, Hq, M] what P is made to sum to; None where a rounded lse leaves it close enough


def is_far(exponent: Tensor, lse: Tensor, mass: Tensor) -> bool:
    """Whether an exponent, or the lse that a prior brings near 0 again, is beyond `NEAR` where the ``mass`` is not 0;
    all [total_q, Hq, M].
    """
    given = exponent, lse * LOG2_E
    if all(low.item() >= -NEAR and high.item() <= NEAR for low, high in (t.aminmax() for t in given)):
        return False
    return bool((torch.maximum(*(t.abs() for t in given)) > NEAR).logical_and_(mass > 0).any())


def settle(shares: list[Tensor], terms: RowTerms, x: Inputs, group: Group, block: Block) -> None:
    """Make columns of P sum to what they should: by a division, so that a single probability is 1."""
    if terms.mass is not None:
        sums = group.reduce(shares, torch.sum, 0.0).clamp_min_(torch.finfo(shares[0].dtype).tiny)
        for share, excess in zip(shares, group.factors(sums.div_(x.rows(terms.mass, group, block))), strict=True):
            share.div_(excess)
    elif terms.certain is not None:
        for share, each in zip(shares, group.factors(x.rows(terms.certain, group, block).bool()), strict=True):
            share.copy_(torch.where(each, share.round(), share))


def correct(
    columns: list[Tensor], shares: list[Tensor], terms: RowTerms, x: Inputs, group: Group, block: Block
) -> None:
    """Give columns of dz the sum that they have but for rounding: what is too much goes by P."""
    total = None if terms.total is None else x.rows(terms.total, group, block)
    if terms.mass is not None and x.softmax != "per_modality":
        excess = group.reduce(columns, torch.sum, 0.0)
        if x.softmax == "joint":
            excess = excess.sum(-1, keepdim=True).expand_as(excess)
        elif total is not None:
            excess -= total
        for part, share, each in zip(columns, shares, group.factors(excess), strict=True):
            part.addcmul_(share, each, value=-1.0)
    if terms.certain is None:
        return
    is_certain = group.factors(x.rows(terms.certain, group, block).bool())
    if total is None:
        for part, each in zip(columns, is_certain, strict=True):
            part.masked_fill_(each, 0.0)
        return
    for part, share, each, exact in zip(columns, shares, is_certain, group.factors(total), strict=True):
        part.copy_(torch.where(each, share * exact, part))


def certain_rows(x: Inputs, groups: tuple[Group, ...], counts: Counts) -> Tensor | None:
    """[total_q, Hq, M] True where a query sees a single key, of a modality unless they share a softmax: it is constant,
    and dz is the gradient of lse alone, not the rounding error of delta; None where there is no such row. ``counts``
    are those of ``x``.
    """
    is_joint = x.softmax == "joint"
    if x.visible is None and x.active is None and not any(group.has_single_key(is_joint) for group in groups):
        return None
    seen = counts()
    if is_joint:
        seen = seen.sum(-1, keepdim=True).expand_as(seen)
    certain = seen == 1
    return certain if bool(certain.any()) else None
