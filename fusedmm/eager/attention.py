"""Gated multimodal attention composed from PyTorch's own operators: the CPU path.

Works through blocks of scores that stay in cache (`fusedmm.eager.attention_groups`), heads first
(`fusedmm.eager.attention_rows`). In a block the columns of modality m are a slice; prior, normaliser and gate are
numbers a row and modality, and cost one pass together. All exponents are base 2, s and prior being multiplied by
log2(e)::

    E = exp2(s)                    sums[m] = sum_m E               share = exp2(prior - max(prior))
    factor = share / (share * sums).sum()                          mass = factor * sums
    output = (E * factor[m] * gate[m]) @ v                         lse = log(sums) + prior

without the largest score taken off, which is two passes less: exp2 holds what is far from 0 as exactly as what is near
it. `LARGEST` says how far; beyond it everything is done again with the peak of every modality taken off its columns and
added to its prior, so that its lse is exact however small its share is. That costs three products more.

The backward recomputes P = exp2(s + prior[m] - lse) and forms ``dz = P * (gate[m] * R + offset[m])``, R = dO @ v^T.
What is added to a product, or hides its columns, is what the matrix product starts from. What lives at once is a block
and its gradient. Accumulation is float32, or float64 for float64 inputs.

Samples of large heads (`fusedmm.eager.attention_heads`) and small problems (`fusedmm.eager.attention_small`) take ways
of their own. `torch.exp2` rather than `exp`: a quarter of the time (0.16 ns an element on one thread of an AMD EPYC,
0.7 by MKL's exp, which takes 3 ns where the result is 0).
"""

import math
from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from fusedmm.eager import attention_heads, attention_small
from fusedmm.eager.attention_groups import Block, Group
from fusedmm.eager.attention_inputs import (
    LARGEST,
    LEAST,
    Counts,
    Inputs,
    block_scores,
    drop,
    row_exponent,
    shares,
    ungrouped,
    without_unseen,
)
from fusedmm.eager.attention_rows import add_key_product, add_keys, as_matrices, product
from fusedmm.eager.attention_sums import RowTerms, certain_rows, correct, is_far, settle
from fusedmm.eager.products import LN_2, LOG2_E, cast


def forward(x: Inputs, *, keep: bool = False) -> tuple[tuple[Tensor, Tensor, Tensor], attention_small.Kept | None]:
    """Output ([total_q, Hq, D], or [total_q, Hq, M, D] for partials) in the query's dtype, mass and lse in the
    accumulation dtype; to ``keep``, of a small problem, what its backward need not make again.
    """
    groups, small = x.groups(), None
    if attention_small.fits(x, groups):
        small = attention_small.forward(x, groups[0], keep=keep and x.output_gate is None)
    (output, mass, lse), kept = (_exact(x, groups), None) if small is None else small
    if x.output_gate is not None:
        output = output * torch.sigmoid(x.output_gate.to(output.dtype))
    return (cast(output, x.query.dtype), mass, lse), kept


def _exact(x: Inputs, groups: tuple[Group, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Output without output gate, mass and lse, in the accumulation dtype."""
    x = ungrouped(x)
    counts = Counts(x)
    x = without_unseen(x, counts)
    results, sums, total = _attend(x, groups, None)
    # Values overflow in products with exponentials, gates in quotients with their sums.
    may_overflow = x.softmax == "joint" or x.gate is not None
    is_finite = not may_overflow or math.isfinite(results[0].sum())
    if is_finite and (not groups or _is_near(x, groups, sums, total, counts)):
        return results
    beyond = _rows_beyond(results[0], sums, total, counts() == 0)
    again, _, _ = _attend(x, groups, _peaks(x, groups))
    output, mass, lse = (
        torch.where(beyond.view(*beyond.shape, *[1] * (old.ndim - 2)), new, old)
        for old, new in zip(results, again, strict=True)
    )
    return output, mass, lse


def _attend(
    x: Inputs, groups: tuple[Group, ...], peaks: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor | None]:
    """Results of `forward`, the sums of exponentials [total_q, Hq, M], of which ``peaks`` are taken off where given,
    and with a prior beside them their total [total_q, Hq, 1].
    """
    by_head = [False] * len(groups) if peaks is not None else attention_heads.fits(x, groups)
    start = peaks
    if x.log_prior is not None and not (groups and all(by_head) and attention_heads.takes_prior(x)):
        prior = x.log_prior * LOG2_E
        start = prior if peaks is None else peaks + prior
    share = shares(start) if x.softmax == "joint" and start is not None else None
    shift = None if peaks is None else torch.where(torch.isneginf(peaks), 0.0, -peaks)
    output, sums = _sweep(x, groups, by_head, shift, share)
    parts = sums if share is None else sums * share
    total = parts.sum(-1, keepdim=True) if x.softmax == "joint" else parts
    mass = parts / total.clamp_min(LEAST)
    lse = sums.log()
    if start is not None:
        lse.add_(start, alpha=LN_2)
    return (output, mass, lse), sums, None if share is None else total


def _sweep(
    x: Inputs, groups: Sequence[Group], by_head: Sequence[bool], shift: Tensor | None, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output, [total_q, Hq, D] or [total_q, Hq, M, D], and by modality the sums of exponentials [total_q, Hq, M] of
    scores to which ``shift`` [total_q, Hq, M] is added.
    """
    total_q, heads, dim = x.query.shape
    modalities = x.num_modalities
    has_all_rows = sum(group.count_q for group in groups) == total_q
    shape = (total_q, heads, modalities, dim) if x.softmax == "partials" else (total_q, heads, dim)
    output = _buffer(x, shape, has_all_rows)
    sums = _buffer(x, (total_q, heads, modalities), has_all_rows)
    buffers = output.flatten(2), sums
    for span in attention_heads.spans(x, compress(groups, by_head)):
        attention_heads.forward(x, span, share, buffers)
    for group in compress(groups, (not is_done for is_done in by_head)):
        tokens = x.keys(group)
        for block in group.blocks:
            _forward_block(x, group, block, tokens, shift, share, buffers)
    return output, sums


def _forward_block(
    x: Inputs,
    group: Group,
    block: Block,
    tokens: tuple[Tensor, Tensor],
    shift: Tensor | None,
    share: Tensor | None,
    buffers: tuple[Tensor, Tensor],
) -> None:
    """Write a block's output and sums. The weights are gone before those of the next block, which get their memory."""
    (keys, values), (output, sums) = tokens, buffers
    query = x.rows(x.query, group, block)
    start = None if shift is None else x.rows(shift, group, block)
    weights, columns = block_scores(x, group, block, as_matrices(query), query.shape[:-1], keys, start)
    weights.exp2_()
    block_sums = group.reduce(columns, torch.sum, 0.0)
    x.write(sums, group, block, block_sums)
    is_weighed = x.softmax != "joint" or share is not None or x.gate is not None
    if is_weighed:
        factor = _factor(x, group, block, block_sums, share)
        for part, scale in zip(columns, group.factors(factor), strict=True):
            part.mul_(scale)
    if x.seed is not None:
        drop(weights, x, group, block)
    if x.softmax == "partials":
        pieces = zip(weights.split(group.widths, -1), values.split(group.widths, 1), strict=True)
        result = torch.cat([torch.bmm(w, v) for w, v in pieces], -1)
    else:
        result = torch.bmm(weights, values)
    # One factor for all modalities divides the output, which has fewer numbers than the weights.
    total = None if is_weighed else block_sums.sum(-1, keepdim=True).clamp_min_(LEAST)
    x.write(output, group, block, result, total)


def _factor(x: Inputs, group: Group, block: Block, sums: Tensor, share: Tensor | None) -> Tensor:
    """[*shape, M] what a block's exponentials are multiplied by, from their sums [*shape, M]."""
    if x.softmax != "joint":
        if x.gate is not None:  # that of nothing stays a number, to be multiplied by 0
            return x.rows(x.gate, group, block) / sums.masked_fill(sums == 0, 1.0)
        factor = sums.clamp_min(LEAST).reciprocal_()
    elif share is None:
        factor = sums.sum(-1, keepdim=True).clamp_min_(LEAST).reciprocal_()
    else:
        share = x.rows(share, group, block)
        factor = share / (share * sums).sum(-1, keepdim=True).clamp_min_(LEAST)
    return factor if x.gate is None else factor * x.rows(x.gate, group, block)


def _peaks(x: Inputs, groups: tuple[Group, ...]) -> Tensor:
    """[total_q, Hq, M] the largest score of each modality in base 2, -inf for nothing."""
    peaks = x.query.new_full((*x.query.shape[:2], x.num_modalities), -torch.inf, dtype=x.compute_dtype)
    for group in groups:
        keys, _ = x.keys(group)
        for block in group.blocks:
            query = x.rows(x.query, group, block)
            _, columns = block_scores(x, group, block, as_matrices(query), query.shape[:-1], keys)
            x.write(peaks, group, block, group.reduce(columns, torch.amax, -torch.inf))
    return peaks


def _is_near(x: Inputs, groups: tuple[Group, ...], sums: Tensor, total: Tensor | None, counts: Counts) -> bool:
    """Whether no sum [total_q, Hq, M], and no total [total_q, Hq, 1] where given, is beyond `LARGEST`, or NaN, but of
    what sees no key, which makes up for nothing else.
    """
    low, high = (bound.item() for bound in sums.aminmax())
    if not high <= 1 / LEAST:  # NaN is not
        return False
    if low >= LEAST:
        return True
    far = tuple(0 if t is None else t.numel() - int((t >= LEAST).sum()) for t in (sums, total))
    return far == _count_blind(x, groups, total, counts)


def _rows_beyond(output: Tensor, sums: Tensor, total: Tensor | None, is_blind: Tensor) -> Tensor:
    """[total_q, Hq] True where peaks are to be taken off, by row, so that none depends on another: NaN stays where it
    is. ``is_blind`` [total_q, Hq, M] where no key is seen.
    """
    beyond = (~(sums.log2().abs_() <= LARGEST) & ~is_blind).any(-1) | ~output.isfinite().flatten(2).all(-1)
    return beyond if total is None else beyond | (~(total >= LEAST)[..., 0] & ~is_blind.all(-1))


def _count_blind(x: Inputs, groups: tuple[Group, ...], total: Tensor | None, counts: Counts) -> tuple[int, int]:
    """How many of [total_q, Hq, M], and of [total_q, Hq] where totals are counted, see no key, by ``counts`` of the
    inputs before `without_unseen`.
    """
    if x.visible is None and x.active is None:
        total_q, heads = x.query.shape[:2]
        segments = heads * (total_q * x.num_modalities - sum(group.count_segments for group in groups))
        rows = heads * (total_q - sum(group.count_q for group in groups))
    else:
        is_blind = counts() == 0
        segments, rows = int(is_blind.sum()), int(is_blind.all(-1).sum())
    return segments, 0 if total is None else rows


def backward(
    x: Inputs,
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    inner: Tensor,
    mass: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_prior and gate in the accumulation dtype; the last two are unwritten where
    there is no such input.

    Args:
        grad_output: of the output before the output gate, shaped like the forward's.
        grad_mass: [total_q, Hq, M] or None; constant masses (per_modality) have no gradient.
        grad_lse: [total_q, Hq, M] or None, for partials.
        inner: [total_q, Hq] or, for partials, [total_q, Hq, M]: the inner product of grad_output and output.
        mass, lse: [total_q, Hq, M] of the forward.
    """
    single = ungrouped(x)
    if single is not x:
        gradients = backward(single, grad_output, grad_mass, grad_lse, inner, mass, lse)
        grad_key, grad_value = (t.unflatten(1, (x.key.shape[1], -1)).sum(2) for t in gradients[1:3])
        return gradients[0], grad_key, grad_value, gradients[3], gradients[4]
    groups = x.groups()
    counts = Counts(x)
    certain = certain_rows(x, groups, counts)
    exponent, offset = _exponent_and_offset(x, grad_mass, grad_lse, inner, mass, lse)
    is_settled = not groups or not is_far(exponent, lse, mass)
    terms = RowTerms(exponent, offset, certain, grad_lse, None if is_settled else mass)
    x = without_unseen(x, counts)
    has_all_rows = sum(group.count_q for group in groups) == x.query.shape[0]
    has_all_keys = sum(group.count_k for group in groups) == x.key.shape[0]
    grad_query, sums = (_buffer(x, t.shape, has_all_rows) for t in (x.query, mass))
    grad_key, grad_value = (_buffer(x, t.shape, has_all_keys) for t in (x.key, x.value))
    grad_output = grad_output.to(x.compute_dtype).flatten(2).contiguous()  # an expanded one is multiplied row by row
    held = terms.mass if certain is None else mass  # by which a single probability is exactly 1, too
    for group, by_head in zip(groups, attention_heads.fits(x, groups), strict=True):
        tokens = x.keys(group)
        for number, block in enumerate(attention_heads.blocks(x, group) if by_head else group.blocks):
            token_sums = grad_key, grad_value, number > 0
            if by_head:
                packed = grad_output, held, terms.exponent, terms.offset, certain
                results = attention_heads.backward_block(x, group, block, tokens, packed, token_sums)
            else:
                results = _backward_block(x, group, block, tokens, grad_output, terms, token_sums)
            for buffer, result in zip((grad_query, sums), results, strict=True):
                if result is not None:
                    x.write(buffer, group, block, result)
    grad_prior = sums
    if x.log_prior is not None and not _starts_from_offset(x):
        grad_prior = (sums if x.gate is None else sums * x.gate) + terms.offset * mass
    if x.log_prior is not None and x.softmax == "joint":  # it sums to 0: what is left of rounding goes by mass
        grad_prior = torch.addcmul(grad_prior, mass, grad_prior.sum(-1, keepdim=True), value=-1.0)
    if x.log_prior is not None and certain is not None:
        grad_prior = grad_prior.masked_fill(certain, 0.0)
    return grad_query, grad_key, grad_value, grad_prior, sums


def _backward_block(
    x: Inputs,
    group: Group,
    block: Block,
    tokens: tuple[Tensor, Tensor],
    grad_output: Tensor,
    terms: RowTerms,
    token_sums: tuple[Tensor, Tensor, bool],
) -> tuple[Tensor, Tensor | None]:
    """The query's gradient, and by modality the sum of dz where products start from the offset, else of P * R, if
    anything needs it; writes the gradients of keys and values to two buffers [total_k, Hkv, D], or adds them.
    """
    (keys, values), (grad_key, grad_value, add) = tokens, token_sums
    dim = x.query.shape[2]
    packed = x.query, grad_output, terms.exponent, terms.offset
    query, gradient, exponent, offset = (x.rows(t, group, block) for t in packed)
    shape = query.shape[:-1]
    query, gradient = as_matrices(query), as_matrices(gradient)
    probabilities, shares = block_scores(x, group, block, query, shape, keys, exponent)
    probabilities.exp2_()
    settle(shares, terms, x, group, block)
    products = torch.empty_like(probabilities)
    columns = group.columns(products.view(*shape, group.size_k))
    starts_from_offset = _starts_from_offset(x)
    if starts_from_offset:
        for part, start in zip(columns, group.factors(offset), strict=True):
            part.copy_(start)
    if x.softmax == "partials":
        planes = gradient.split(dim, -1)
        for part, plane, value in zip(
            products.split(group.widths, -1), planes, values.split(group.widths, 1), strict=True
        ):
            part.baddbmm_(plane, value.mT)
    else:
        products.baddbmm_(gradient, values.mT, beta=int(starts_from_offset))
    if x.seed is not None:
        drop(products, x, group, block)
    products.mul_(probabilities)
    needs_sums = x.log_prior is not None or not starts_from_offset
    sums = group.reduce(columns, torch.sum, 0.0) if needs_sums else None
    gate = None if x.gate is None else x.rows(x.gate, group, block)
    if sums is not None and not starts_from_offset:
        if x.softmax == "per_modality":  # a rounded lse leaves P no sum of 1, and what it lacks would not cancel below
            sums = sums.div_(group.reduce(shares, torch.sum, 0.0).clamp_min_(LEAST))
            offset = -sums if gate is None else -gate * sums
        if gate is not None:
            for part, scale in zip(columns, group.factors(gate), strict=True):
                part.mul_(scale)
        for part, share, scale in zip(columns, shares, group.factors(offset), strict=True):
            part.addcmul_(share, scale)
    if terms.mass is not None or terms.certain is not None:
        correct(columns, shares, terms, x, group, block)
    if gate is not None:
        for share, scale in zip(shares, group.factors(gate), strict=True):
            share.mul_(scale)
    if x.seed is not None:
        drop(probabilities, x, group, block)
    grad_query = product(products, keys, x.scale)
    add_key_product(grad_key, group, products.mT, query, add, x.scale)
    if x.softmax == "partials":
        pieces = zip(probabilities.split(group.widths, -1), planes, strict=True)
        add_keys(grad_value, group, torch.cat([torch.bmm(share.mT, plane) for share, plane in pieces], 1), add)
    else:
        add_key_product(grad_value, group, probabilities.mT, gradient, add)
    return grad_query, sums


def _starts_from_offset(x: Inputs) -> bool:
    """Whether R alone is needed nowhere, so that its product may start from the offset: dz = P * (R + offset)."""
    return x.gate is None and x.seed is None and x.softmax != "per_modality"


def _buffer(x: Inputs, shape: tuple[int, ...], is_overwritten: bool) -> Tensor:
    make = x.query.new_empty if is_overwritten else x.query.new_zeros
    return make(shape, dtype=x.compute_dtype)


def _exponent_and_offset(
    x: Inputs, grad_mass: Tensor | None, grad_lse: Tensor | None, inner: Tensor, mass: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The first two of `RowTerms`."""
    exponent = row_exponent(mass, lse, x.log_prior)
    if x.softmax == "per_modality":
        return exponent, torch.zeros_like(mass)  # it needs sums over keys
    if x.softmax == "partials":
        return exponent, -inner if grad_lse is None else grad_lse - inner
    if grad_mass is None:
        return exponent, -inner[..., None].expand_as(mass)
    return exponent, grad_mass - (grad_mass * mass).sum(-1).add_(inner)[..., None]
