"""Gated multimodal attention composed from PyTorch's own operators: the CPU path.

Works through blocks of scores that stay in cache (`fusedmm.eager.attention_groups`), heads first
(`fusedmm.eager.attention_rows`). In a block the columns of modality m are a slice, each with a maximum of its own, so
that its lse is exact however small its share is; prior, normaliser and gate are numbers a row and modality, and cost
one pass together. All exponents are base 2, s and prior being multiplied by log2(e)::

    E = exp2(s - peak[m])                                  mass[m] = exp2(peak[m] + prior[m] - lse) * sum_m E
    output = (E * exp2(peak[m] + prior[m] - lse) * gate[m]) @ v

The backward recomputes P = exp2(s + prior[m] - lse) and forms ``dz = P * (gate[m] * R + offset[m])``, R = dO @ v^T.
What is added to a product, or hides its columns, is what the matrix product starts from. What lives at once is a block
and its gradient. Accumulation is float32, or float64 for float64 inputs.

`torch.exp2` rather than `exp`: a quarter of the time on an AMD EPYC (0.16 ns an element, 0.7 by MKL's exp, which takes
3 ns where the result is 0).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedmm.eager.attention_groups import Block, Group, find_groups
from fusedmm.eager.attention_rows import add_key_product, add_keys, product, read_keys, read_rows, write_rows
from fusedmm.philox import keep_mask

LOG2_E = math.log2(math.e)
NOTHING = -1e30  # stands for the lse of a modality without visible keys: log of its mass stays -inf beside it


class RowTerms(NamedTuple):
    """What the backward knows of a query before it reads a key."""

    exponent: Tensor  # [total_q, Hq, M] added to the scores in base 2 so that exp2 gives P
    offset: Tensor  # [total_q, Hq, M] the part of dz that P multiplies
    certain: Tensor | None  # [total_q, Hq, M] True where a softmax is over a single key: dz is exactly 0


class Inputs(NamedTuple):
    """What both directions read: packed tensors and how they lie, as the registered operators take them."""

    query: Tensor  # [total_q, Hq, D]
    key: Tensor  # [total_k, Hkv, D]
    value: Tensor  # [total_k, Hkv, D]
    cu_seqlens_q: Tensor  # [B+1]
    cu_seqlens_k: Tensor  # [B*M+1]
    num_modalities: int
    log_prior: Tensor | None  # [total_q, Hq, M]
    gate: Tensor | None  # [total_q, Hq, M]
    active: Tensor | None  # [B, Hq, M]
    visible: Tensor | None  # [total_q, M, 2]
    seed: Tensor | None  # [1]
    dropout_p: float
    scale: float

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def groups(self) -> tuple[Group, ...]:
        return find_groups(self.cu_seqlens_q, self.cu_seqlens_k, self.num_modalities, self.active, self.query.shape[1])

    def keys(self, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv * c, k, D]."""
        return read_keys(self.key, group, self.compute_dtype), read_keys(self.value, group, self.compute_dtype)

    def rows(self, packed: Tensor, group: Group, block: Block) -> Tensor:
        """[Hkv * c, G * n, X] of [total_q, Hq, X], in the accumulation dtype."""
        return read_rows(packed, group, block, self.key.shape[1], self.compute_dtype)

    def write(self, buffer: Tensor, group: Group, block: Block, result: Tensor) -> None:
        """[Hkv * c, G * n, X] to [total_q, Hq, X]."""
        write_rows(buffer, group, block, self.key.shape[1], result)


def forward(x: Inputs, softmax: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output without output gate ([total_q, Hq, D], or [total_q, Hq, M, D] for partials), mass and lse, in the
    accumulation dtype.
    """
    x = _ungrouped(x)
    total_q, heads, dim = x.query.shape
    split = softmax == "partials"
    output = x.query.new_zeros((total_q, heads, x.num_modalities * dim if split else dim), dtype=x.compute_dtype)
    mass = output.new_zeros((total_q, heads, x.num_modalities))
    lse = mass.new_full(mass.shape, -torch.inf)
    groups = x.groups()
    x = _without_unseen(x)
    for group in groups:
        keys, values = x.keys(group)
        for block in group.blocks:
            results = _forward_block(x, softmax, group, block, keys, values)
            for buffer, result in zip((output, mass, lse), results, strict=True):
                x.write(buffer, group, block, result)
    return output.unflatten(-1, (-1, dim)) if split else output, mass, lse.mul_(1 / LOG2_E)


def _forward_block(
    x: Inputs, softmax: str, group: Group, block: Block, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mass and lse in base 2 of a block, [Hkv * c, G * n, D (times M for partials) and M]."""
    weights = _scores(x, group, block, x.rows(x.query, group, block), keys)
    lowest = torch.finfo(weights.dtype).min  # for -inf, of which nothing can be subtracted
    columns = group.columns(weights)
    peak = group.reduce(columns, torch.amax, lowest).clamp_min_(lowest)
    for part, shift in zip(columns, group.factors(peak), strict=True):
        part.sub_(shift)
    weights.exp2_()
    sums = group.reduce(columns, torch.sum, 0.0)
    if x.log_prior is not None:
        peak = torch.add(peak, x.rows(x.log_prior, group, block), alpha=LOG2_E)
    lse = sums.log2().add_(peak)
    if softmax == "joint":
        share = peak.sub_(peak.amax(-1, keepdim=True).clamp_min_(lowest)).exp2_()
        mass = share * sums
        total = mass.sum(-1, keepdim=True).clamp_min_(1.0)  # below 1 only where nothing is visible
        mass, factor = mass.div_(total), share.div_(total)
    else:
        factor = sums.clamp_min(1.0).reciprocal_()
        mass = sums * factor
    if x.gate is not None:
        factor = factor.mul_(x.rows(x.gate, group, block))
    for part, scale in zip(columns, group.factors(factor), strict=True):
        part.mul_(scale)
    if x.seed is not None:
        _drop(weights, x, group, block)
    if softmax != "partials":
        return torch.bmm(weights, values), mass, lse
    pieces = zip(weights.split(group.widths, -1), values.split(group.widths, 1), strict=True)
    return torch.cat([torch.bmm(w, v) for w, v in pieces], -1), mass, lse


def backward(
    x: Inputs,
    softmax: str,
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
    ungrouped = _ungrouped(x)
    if ungrouped is not x:
        gradients = backward(ungrouped, softmax, grad_output, grad_mass, grad_lse, inner, mass, lse)
        grad_key, grad_value = (t.unflatten(1, (x.key.shape[1], -1)).sum(2) for t in gradients[1:3])
        return gradients[0], grad_key, grad_value, gradients[3], gradients[4]
    groups = x.groups()
    certain = _certain_rows(x, softmax, groups)
    terms = RowTerms(*_exponent_and_offset(softmax, x.log_prior, grad_mass, grad_lse, inner, mass, lse), certain)
    x = _without_unseen(x)
    has_all_rows = sum(group.count_q for group in groups) == x.query.shape[0]
    has_all_keys = sum(group.count_k for group in groups) == x.key.shape[0]
    grad_query, sums = (_buffer(t, has_all_rows, x.compute_dtype) for t in (x.query, mass))
    grad_key, grad_value = (_buffer(t, has_all_keys, x.compute_dtype) for t in (x.key, x.value))
    grad_output = grad_output.to(x.compute_dtype).flatten(2).contiguous()  # an expanded one is multiplied row by row
    for group in groups:
        tokens = x.keys(group)
        for number, block in enumerate(group.blocks):
            token_sums = grad_key, grad_value, number > 0
            results = _backward_block(x, softmax, group, block, tokens, grad_output, terms, token_sums)
            for buffer, result in zip((grad_query, sums), results, strict=True):
                if result is not None:
                    x.write(buffer, group, block, result)
    grad_prior = sums
    if x.log_prior is not None and not _starts_from_offset(x, softmax):
        grad_prior = (sums if x.gate is None else sums * x.gate) + terms.offset * mass
    if x.log_prior is not None and softmax == "joint":  # it sums to 0: what is left of rounding goes by mass
        grad_prior = torch.addcmul(grad_prior, mass, grad_prior.sum(-1, keepdim=True), value=-1.0)
    if x.log_prior is not None and certain is not None:
        grad_prior = grad_prior.masked_fill(certain, 0.0)
    return grad_query, grad_key, grad_value, grad_prior, sums


def _backward_block(
    x: Inputs,
    softmax: str,
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
    probabilities = _scores(x, group, block, query, keys, exponent).exp2_()
    products = torch.empty_like(probabilities)
    columns = group.columns(products)
    starts_from_offset = _starts_from_offset(x, softmax)
    if starts_from_offset:
        for part, start in zip(columns, group.factors(offset), strict=True):
            part.copy_(start)
    if softmax == "partials":
        planes = gradient.split(dim, -1)
        for part, plane, value in zip(
            products.split(group.widths, -1), planes, values.split(group.widths, 1), strict=True
        ):
            part.baddbmm_(plane, value.mT)
    else:
        products.baddbmm_(gradient, values.mT, beta=int(starts_from_offset))
    if x.seed is not None:
        _drop(products, x, group, block)
    products.mul_(probabilities)
    needs_sums = x.log_prior is not None or not starts_from_offset
    sums = group.reduce(columns, torch.sum, 0.0) if needs_sums else None
    if sums is not None and not starts_from_offset:
        gate = None if x.gate is None else x.rows(x.gate, group, block)
        if softmax == "per_modality":
            offset = -sums if gate is None else -gate * sums
        shares = group.columns(probabilities)
        if gate is not None:
            for part, scale in zip(columns, group.factors(gate), strict=True):
                part.mul_(scale)
        for part, share, scale in zip(columns, shares, group.factors(offset), strict=True):
            part.addcmul_(share, scale)
        if gate is not None:
            for share, scale in zip(shares, group.factors(gate), strict=True):
                share.mul_(scale)
        if x.seed is not None:
            _drop(probabilities, x, group, block)
    if terms.certain is not None:
        for part, is_certain in zip(columns, group.factors(x.rows(terms.certain, group, block).bool()), strict=True):
            part.masked_fill_(is_certain, 0.0)
    grad_query = product(products, keys, x.scale)
    add_key_product(grad_key, group, products.mT, query, add, x.scale)
    if softmax == "partials":
        pieces = zip(probabilities.split(group.widths, -1), planes, strict=True)
        add_keys(grad_value, group, torch.cat([torch.bmm(share.mT, plane) for share, plane in pieces], 1), add)
    else:
        add_key_product(grad_value, group, probabilities.mT, gradient, add)
    return grad_query, sums


def _starts_from_offset(x: Inputs, softmax: str) -> bool:
    """Whether R alone is needed nowhere, so that its product may start from the offset: dz = P * (R + offset)."""
    return x.gate is None and x.seed is None and softmax != "per_modality"


def _buffer(like: Tensor, is_overwritten: bool, dtype: torch.dtype) -> Tensor:
    return like.new_empty(like.shape, dtype=dtype) if is_overwritten else like.new_zeros(like.shape, dtype=dtype)


def _exponent_and_offset(
    softmax: str,
    log_prior: Tensor | None,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    inner: Tensor,
    mass: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """The first two of `RowTerms`; P = exp(s + prior - lse) * mass, in every softmax."""
    exponent = mass.log2().sub_(lse.clamp_min(NOTHING), alpha=LOG2_E)
    if log_prior is not None:
        exponent.add_(log_prior, alpha=LOG2_E)
    if softmax == "per_modality":
        return exponent, torch.zeros_like(mass)  # it needs sums over keys
    if softmax == "partials":
        return exponent, -inner if grad_lse is None else grad_lse - inner
    if grad_mass is None:
        return exponent, -inner[..., None].expand_as(mass)
    return exponent, grad_mass - (grad_mass * mass).sum(-1).add_(inner)[..., None]


def _certain_rows(x: Inputs, softmax: str, groups: tuple[Group, ...]) -> Tensor | None:
    """[total_q, Hq, M] True where a query sees a single key, of a modality under per_modality: its softmax is constant,
    and dz is exactly 0, not the rounding error of delta; None where there is no such row.
    """
    is_joint = softmax == "joint"
    if softmax == "partials":  # the gradient of lse reaches a single key
        return None
    if x.visible is None and x.active is None and not any(group.has_single_key(is_joint) for group in groups):
        return None
    sample = torch.searchsorted(
        x.cu_seqlens_q[1:].long(), torch.arange(x.query.shape[0], device=x.query.device), right=True
    )
    if x.visible is not None:
        counts = (x.visible[..., 1] - x.visible[..., 0]).clamp_min(0).long()  # [total_q, M]
    else:
        counts = x.cu_seqlens_k.diff().long().view(-1, x.num_modalities)[sample]
    counts = counts[:, None].expand(-1, x.query.shape[1], -1)
    if x.active is not None:
        counts = counts * x.active[sample]
    if is_joint:
        counts = counts.sum(-1, keepdim=True).expand_as(counts)
    certain = counts == 1
    return certain if bool(certain.any()) else None


def _ungrouped(x: Inputs) -> Inputs:
    """A key head for each query head where those of one group differ in what is active and a token holds NaN or inf:
    a head that is off must not read what the next one reads.
    """
    kv_heads = x.key.shape[1]
    if x.active is None or x.query.shape[1] == kv_heads:
        return x
    by_group = x.active.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, M]
    if bool((by_group == by_group[:, :, :1]).all()) or all(bool(t.isfinite().all()) for t in (x.key, x.value)):
        return x
    key, value = (t.repeat_interleave(x.query.shape[1] // kv_heads, 1) for t in (x.key, x.value))
    return x._replace(key=key, value=value)


def _without_unseen(x: Inputs) -> Inputs:
    """Keys and values that no query sees, by time or because their head is switched off, set to 0: NaN there goes
    nowhere. Where all heads agree, `active` has done all it does: groups leave out what is switched off.
    """
    read = None
    active = x.active
    if x.visible is not None:
        first, last = x.visible.long().unbind(-1)  # [total_q, M]
        some = (first < last).to(torch.int32).flatten()
        edges = some.new_zeros(x.key.shape[0] + 1)
        edges.index_add_(0, first.flatten(), some).index_add_(0, last.flatten(), -some)
        read = (edges.cumsum(0)[:-1] > 0)[:, None]
    if active is not None and bool((active == active[:, :1]).all()):
        active = None
    if active is not None:
        by_head = active.unflatten(1, (x.key.shape[1], -1)).any(2).transpose(1, 2).flatten(0, 1)  # [B*M, Hkv]
        on = by_head.repeat_interleave(x.cu_seqlens_k.diff(), 0)
        read = on if read is None else read & on
    if read is None:
        return x if active is x.active else x._replace(active=active)
    key, value = (torch.where(read[..., None], t, 0) for t in (x.key, x.value))
    return x._replace(key=key, value=value, active=active)


def _scores(
    x: Inputs, group: Group, block: Block, query: Tensor, keys: Tensor, exponent: Tensor | None = None
) -> Tensor:
    """[Hkv * c, G * n, k] scaled scores in base 2, with an exponent [Hkv * c, G * n, M] but without prior, -inf where a
    key is not visible.
    """
    scores = query.new_empty((*query.shape[:2], group.size_k))
    hidden = _hidden(x, group, block)
    if hidden is not None:
        scores.view(x.key.shape[1], len(group.samples), -1, block.size, group.size_k).copy_(hidden)
    if exponent is not None:
        for part, start in zip(group.columns(scores), group.factors(exponent), strict=True):
            part.copy_(start) if hidden is None else part.add_(start)
    is_started = hidden is not None or exponent is not None
    return scores.baddbmm_(query, keys.mT, beta=int(is_started), alpha=x.scale * LOG2_E)


def _hidden(x: Inputs, group: Group, block: Block) -> Tensor | None:
    """What hides keys: 0 or -inf, broadcasts to [Hkv, c, G, n, k]; None: nothing does."""
    if group.padding is None and x.visible is None and x.active is None:
        return None
    samples = len(group.samples)
    heads = 1 if x.active is None else x.query.shape[1]
    hidden = x.key.new_zeros(
        (heads, samples, 1 if x.visible is None else block.size, group.size_k), dtype=x.compute_dtype
    )
    if group.padding is not None:
        hidden.masked_fill_(group.padding[:, None], -torch.inf)
    if x.visible is not None:
        first, last = x.visible[block.rows].unflatten(0, (samples, block.size)).unbind(-1)  # [c, n, M]
        index = group.columns(group.key_index.to(first.dtype)[:, None])  # [c, 1, m, w]
        bounds = zip(group.columns(hidden), index, group.factors(first), group.factors(last), strict=True)
        for part, key, start, end in bounds:
            part.masked_fill_((key < start) | (key >= end), -torch.inf)
    if x.active is not None:
        off = ~x.active[[s.batch for s in group.samples]].transpose(0, 1)[:, :, None]  # [Hq, c, 1, M]
        for part, is_off in zip(group.columns(hidden), group.factors(off), strict=True):
            part.masked_fill_(is_off, -torch.inf)
    by_head: Tensor = hidden.unflatten(0, (min(heads, x.key.shape[1]), -1))  # [Hkv or 1, G or 1, c, n, k]
    return by_head.transpose(1, 2)


def _drop(products: Tensor, x: Inputs, group: Group, block: Block) -> None:
    """Multiply by dropout's factor, 0 or 1 / (1 - p), in place."""
    assert x.seed is not None
    samples, kv_heads = len(group.samples), x.key.shape[1]
    rows = block.rows
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=products.device)
    head = torch.arange(x.query.shape[1], device=products.device).view(kv_heads, 1, -1, 1, 1)
    kept = keep_mask(x.seed, rows.view(samples, 1, -1, 1), head, group.key_index[:, None, None], x.dropout_p)
    products.view(kept.shape).mul_(kept).div_(1.0 - x.dropout_p)
