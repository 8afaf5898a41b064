"""Gated multimodal attention composed from PyTorch's own operators: the CPU path.

Works through blocks of scores that stay in cache (`fusedmm.eager.attention_groups`). In a block the columns of modality
m are a slice, each with a maximum of its own, so that its lse is exact however small its share is; prior, normaliser
and gate are numbers a row and modality, and cost one pass together:

    E = exp(s - peak[m])                                   mass[m] = exp(peak[m] + prior[m] - lse) * sum_m E
    output = (E * exp(peak[m] + prior[m] - lse) * gate[m]) @ v

The backward recomputes P = exp(s + prior[m] - lse) and forms ``dz = P * gate[m] * R + P * offset[m]``, R = dO @ v^T.
Heads come first in all of it: [Hkv * c, G * n, k] scores of c samples, n queries each, and G query heads a key head.
What lives at once is a block and its gradient. Accumulation is float32, or float64 for float64 inputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedmm.eager.attention_groups import Block, Group, Run, find_groups
from fusedmm.philox import keep_mask


@dataclass(frozen=True)
class Inputs:
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

    def groups(self) -> list[Group]:
        return find_groups(self.cu_seqlens_q, self.cu_seqlens_k, self.num_modalities, self.active, self.query.shape[1])


def forward(x: Inputs, softmax: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output without output gate ([total_q, Hq, D], or [total_q, Hq, M, D] for partials), mass and lse, in the
    accumulation dtype.
    """
    total_q, heads, dim = x.query.shape
    split = softmax == "partials"
    output = x.query.new_zeros((total_q, heads, x.num_modalities * dim if split else dim), dtype=x.compute_dtype)
    mass = output.new_zeros((total_q, heads, x.num_modalities))
    lse = torch.full_like(mass, -torch.inf)
    x = _without_unseen(x)
    for group in x.groups():
        keys, values = _keys(x, group, x.key), _keys(x, group, x.value)
        for block in group.blocks(heads):
            results = _forward_block(x, softmax, group, block, keys, values)
            for buffer, result in zip((output, mass, lse), results, strict=True):
                _put(buffer, block, result, len(group.samples), x.key.shape[1])
    return output.unflatten(-1, (-1, dim)) if split else output, mass, lse


def _forward_block(
    x: Inputs, softmax: str, group: Group, block: Block, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mass and lse of a block, [Hkv * c, G * n, D (times M for partials) and M]."""
    weights = _scores(x, group, block, keys)
    peak = _reduce(weights, group, torch.amax, -torch.inf)
    shift = peak.masked_fill(torch.isneginf(peak), 0.0)
    for run, columns in _runs(weights, group):
        columns.sub_(shift[..., run.modalities, None])
    sums = _reduce(weights.exp_(), group, torch.sum, 0.0)
    if x.log_prior is not None:
        peak = peak + _rows(x, group, block, x.log_prior)
    lse = peak + sums.log()
    if softmax == "joint":
        top = peak.amax(-1, keepdim=True)
        share = (peak - top.masked_fill_(torch.isneginf(top), 0.0)).exp_()
        mass = share * sums
        total = mass.sum(-1, keepdim=True).clamp_min_(1.0)  # below 1 only where nothing is visible
        mass, factor = mass.div_(total), share.div_(total)
    else:
        factor = sums.clamp_min(1.0).reciprocal_()
        mass = sums * factor
    if x.gate is not None:
        factor = factor * _rows(x, group, block, x.gate)
    for run, columns in _runs(weights, group):
        columns.mul_(factor[..., run.modalities, None])
    if x.seed is not None:
        _drop(weights, x, group, block)
    if softmax != "partials":
        return weights @ values, mass, lse
    pieces = zip(weights.split(group.widths, -1), values.split(group.widths, 1), strict=True)
    return torch.cat([w @ v for w, v in pieces], -1), mass, lse


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
    """Gradients of query, key, value, log_prior and gate in the accumulation dtype.

    Args:
        grad_output: of the output before the output gate, shaped like the forward's.
        grad_mass: [total_q, Hq, M] or None; constant masses (per_modality) have no gradient.
        grad_lse: [total_q, Hq, M] or None, for partials.
        inner: [total_q, Hq] or, for partials, [total_q, Hq, M]: the inner product of grad_output and output.
        mass, lse: [total_q, Hq, M] of the forward.
    """
    compute, kv_heads = x.compute_dtype, x.key.shape[1]
    x = _without_unseen(x)
    groups = x.groups()
    exponent, offset = _row_terms(softmax, x.log_prior, grad_mass, grad_lse, inner, mass, lse)
    certain = _certain_rows(x, groups) if softmax == "joint" else None
    samples = [sample for group in groups for sample in group.samples]
    has_all_rows = sum(s.size_q for s in samples) == x.query.shape[0]
    has_all_keys = sum(sum(s.sizes_k) for s in samples) == x.key.shape[0]
    grad_query, grad_gate = (_buffer(t, has_all_rows, compute) for t in (x.query, mass))
    grad_key, grad_value = (_buffer(t, has_all_keys, compute) for t in (x.key, x.value))
    grad_output = grad_output.to(compute).flatten(2).contiguous()  # an expanded one would be multiplied row by row
    for group in groups:
        keys, values = _keys(x, group, x.key), _keys(x, group, x.value)
        key_sum = value_sum = None
        for block in group.blocks(x.query.shape[1]):
            gradient, exponents, offsets = (_rows(x, group, block, t) for t in (grad_output, exponent, offset))
            probabilities = _scores(x, group, block, keys)
            for run, columns in _runs(probabilities, group):
                columns.add_(exponents[..., run.modalities, None])
            probabilities.exp_()
            if softmax == "partials":
                planes = zip(gradient.split(x.query.shape[2], -1), values.split(group.widths, 1), strict=True)
                products = torch.cat([plane @ v.mT for plane, v in planes], -1)
            else:
                products = gradient @ values.mT
            if x.seed is not None:
                _drop(products, x, group, block)
            products.mul_(probabilities)
            by_modality = _reduce(products, group, torch.sum, 0.0)
            gates = None if x.gate is None else _rows(x, group, block, x.gate)
            if softmax == "per_modality":
                offsets = -by_modality if gates is None else -gates * by_modality
            for (run, columns), (_, shares) in zip(_runs(products, group), _runs(probabilities, group), strict=True):
                if gates is not None:
                    columns.mul_(gates[..., run.modalities, None])
                columns.addcmul_(shares, offsets[..., run.modalities, None])
                if gates is not None:
                    shares.mul_(gates[..., run.modalities, None])
            if certain is not None:
                products.masked_fill_(_rows(x, group, block, certain), 0.0)
            if x.seed is not None:
                _drop(probabilities, x, group, block)
            count = len(group.samples)
            _put(grad_query, block, (products @ keys).mul_(x.scale), count, kv_heads)
            _put(grad_gate, block, by_modality, count, kv_heads)
            block_key = products.mT @ (_rows(x, group, block, x.query) * x.scale)
            if softmax == "partials":
                planes = zip(probabilities.split(group.widths, -1), gradient.split(x.query.shape[2], -1), strict=True)
                block_value = torch.cat([p.mT @ plane for p, plane in planes], 1)
            else:
                block_value = probabilities.mT @ gradient
            key_sum = block_key if key_sum is None else key_sum.add_(block_key)
            value_sum = block_value if value_sum is None else value_sum.add_(block_value)
        for buffer, result in ((grad_key, key_sum), (grad_value, value_sum)):
            assert result is not None
            _put_keys(buffer, group, result)
    grad_prior = (grad_gate if x.gate is None else grad_gate * x.gate) + offset * mass
    return (
        grad_query,
        grad_key,
        grad_value,
        grad_prior if certain is None else grad_prior.masked_fill_(certain, 0.0),
        grad_gate,
    )


def _buffer(like: Tensor, is_overwritten: bool, dtype: torch.dtype) -> Tensor:
    return like.new_empty(like.shape, dtype=dtype) if is_overwritten else like.new_zeros(like.shape, dtype=dtype)


def _row_terms(
    softmax: str,
    log_prior: Tensor | None,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    inner: Tensor,
    mass: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """[total_q, Hq, M] each: what is added to the scores so that exp gives P, and the part of dz that P multiplies."""
    normaliser = lse
    offset = torch.zeros_like(mass)
    if softmax == "joint":
        normaliser = torch.logsumexp(lse, -1, keepdim=True)
        offset = -inner[..., None].expand_as(mass)
        if grad_mass is not None:
            offset = grad_mass.to(mass.dtype) - (inner + (grad_mass * mass).sum(-1))[..., None]
    elif softmax == "partials":
        offset = -inner if grad_lse is None else grad_lse.to(mass.dtype) - inner
    exponent = -normaliser.masked_fill(torch.isneginf(normaliser), torch.inf)
    return exponent.expand_as(lse) if log_prior is None else log_prior + exponent, offset


def _certain_rows(x: Inputs, groups: list[Group]) -> Tensor | None:
    """[total_q, Hq, 1] True where a query sees a single key: its softmax is constant, and dz is exactly 0, not the
    rounding error of delta; None where there is no such row.
    """
    if x.visible is None and x.active is None and all(sum(s.sizes_k) > 1 for g in groups for s in g.samples):
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
    certain = counts.sum(-1, keepdim=True) == 1
    return certain if bool(certain.any()) else None


def _without_unseen(x: Inputs) -> Inputs:
    """Keys and values that no query sees, by time or because their head is switched off, set to 0: NaN there goes
    nowhere.
    """
    read = None
    if x.visible is not None:
        first, last = x.visible.long().unbind(-1)  # [total_q, M]
        some = (first < last).to(torch.int32).flatten()
        edges = some.new_zeros(x.key.shape[0] + 1)
        edges.index_add_(0, first.flatten(), some).index_add_(0, last.flatten(), -some)
        read = (edges.cumsum(0)[:-1] > 0)[:, None]
    if x.active is not None:
        by_head = x.active.unflatten(1, (x.key.shape[1], -1)).any(2).transpose(1, 2).flatten(0, 1)  # [B*M, Hkv]
        if bool((by_head != by_head[:, :1]).any()):
            on = by_head.repeat_interleave(x.cu_seqlens_k.diff(), 0)
            read = on if read is None else read & on
    if read is None:
        return x
    return replace(x, key=torch.where(read[..., None], x.key, 0), value=torch.where(read[..., None], x.value, 0))


def _scores(x: Inputs, group: Group, block: Block, keys: Tensor) -> Tensor:
    """[Hkv * c, G * n, k] scaled scores without prior, -inf where a key is not visible."""
    scores = (_rows(x, group, block, x.query) * x.scale) @ keys.mT
    samples, kv_heads = len(group.samples), x.key.shape[1]
    by_query = scores.view(kv_heads, samples, -1, block.size, group.size_k)
    if group.padding is not None:
        by_query.add_(by_query.new_zeros(group.padding.shape).masked_fill_(group.padding, -torch.inf)[:, None, None])
    if x.visible is not None:
        ranges = x.visible[block.rows].unflatten(0, (samples, block.size))  # [c, n, M, 2]
        for run, columns in _runs(by_query, group):
            index = group.key_index[:, None, run.columns].unflatten(-1, (run.count, run.width))  # [c, 1, m, w]
            first, last = ranges[:, :, run.modalities, None].unbind(-1)
            columns.masked_fill_(((index < first) | (index >= last))[:, None], -torch.inf)
    if x.active is not None:
        off = ~x.active[[s.index for s in group.samples]]  # [c, Hq, M]
        off = off.unflatten(1, (kv_heads, -1)).transpose(0, 1)[..., None, :]  # [Hkv, c, G, 1, M]
        for run, columns in _runs(by_query, group):
            columns.masked_fill_(off[..., run.modalities, None], -torch.inf)
    return scores


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


def _runs(columns: Tensor, group: Group) -> Iterator[tuple[Run, Tensor]]:
    """Views [..., modality, width] of [..., k] for each run of modalities of one width."""
    for run in group.runs:
        if run.width:
            yield run, columns[..., run.columns].unflatten(-1, (run.count, run.width))


def _reduce(columns: Tensor, group: Group, over: Callable[..., Tensor], nothing: float) -> Tensor:
    """[..., k] to [..., M], one number a modality."""
    if len(group.runs) == 1:
        return over(columns.unflatten(-1, (-1, group.widths[0])), dim=-1)
    result = columns.new_full((*columns.shape[:-1], len(group.widths)), nothing)
    for run, view in _runs(columns, group):
        result[..., run.modalities] = over(view, dim=-1)
    return result


def _keys(x: Inputs, group: Group, packed: Tensor) -> Tensor:
    """Keys or values [Hkv * c, k, D], 0 for padding; a view where the group is one sample."""
    padded = _heads_first(packed, group.keys, len(group.samples)).to(x.compute_dtype)  # [Hkv, c, k, D]
    if group.padding is not None:
        padded.flatten(1, 2).index_fill_(1, group.padding.flatten().nonzero().squeeze(1), 0.0)
    return padded.flatten(0, 1)


def _rows(x: Inputs, group: Group, block: Block, packed: Tensor) -> Tensor:
    """Rows of a [total_q, Hq, X] tensor that belong to the block: [Hkv * c, G * n, X], 0 for padding."""
    rows = _heads_first(packed, block.rows, len(group.samples))  # [Hq, c, n, X]
    if rows.dtype != torch.bool:
        rows = rows.to(x.compute_dtype)
    if block.padding is not None:
        rows = rows.masked_fill(block.padding[..., None], 0)
    kv_heads = x.key.shape[1]
    if rows.shape[0] == kv_heads:
        return rows.flatten(0, 1)
    grouped = rows.reshape(kv_heads, -1, *rows.shape[1:]).transpose(1, 2)
    return grouped.reshape(kv_heads * len(group.samples), -1, rows.shape[-1])


def _heads_first(packed: Tensor, index: slice | Tensor, samples: int) -> Tensor:
    """[total, H, X] to [H, c, n, X]."""
    if isinstance(index, slice):
        return packed[index].reshape(samples, -1, *packed.shape[1:]).permute(2, 0, 1, 3)
    heads, width = packed.shape[1:]
    slots = index * heads + torch.arange(heads, device=index.device)[:, None]  # [H, c * n]
    return packed.reshape(-1, width).index_select(0, slots.flatten()).view(heads, samples, -1, width)


def _put(buffer: Tensor, block: Block, result: Tensor, samples: int, kv_heads: int) -> None:
    """Write [Hkv * c, G * n, X] to the block's rows of a [total_q, Hq, X] buffer."""
    rows = result.view(kv_heads, samples, -1, block.size, result.shape[-1]).permute(1, 3, 0, 2, 4)
    if isinstance(block.rows, slice):
        buffer[block.rows].view(rows.shape).copy_(rows)
        return
    rows = rows.reshape(-1, *buffer.shape[1:])
    if block.padding is None:
        buffer.index_copy_(0, block.rows, rows)
    else:
        real = ~block.padding.flatten()
        buffer.index_copy_(0, block.rows[real], rows[real])


def _put_keys(buffer: Tensor, group: Group, result: Tensor) -> None:
    """Write [Hkv * c, k, D] to the group's rows of a [total_k, Hkv, D] buffer."""
    rows = result.view(buffer.shape[1], len(group.samples), -1, buffer.shape[2]).permute(1, 2, 0, 3)
    if isinstance(group.keys, slice):
        buffer[group.keys].view(rows.shape).copy_(rows)
    elif group.padding is None:
        buffer.index_copy_(0, group.keys, rows.flatten(0, 1))
    else:
        real = ~group.padding
        buffer.index_copy_(0, group.key_index[real], rows[real])
