"""Joint attention of a sample whose heads are large, a key head at a time.

oneDNN multiplies single matrices only (`fusedmm.eager.products`): 48 microseconds against MKL's 84 for 256 queries, 256
keys and a head of 64; and the scores of one head stay in the second-level cache through all passes. What is a number a
row is computed for all heads at once, so exponentials meet their sum only after the product with the values. The
backward forms everything transposed, which suits two of its last three products::

    E = exp2(s)                         output = ((E * share[m] * gate[m]) @ v) / sum_m share[m] * sums[m]
    P ~ exp2(s + exponent[m])           dz = P * (gate[m] * R + offset[m])                     R = dO @ v^T

where P is made to sum to the mass that the forward gave. 512 queries of 256 keys, 4 heads of 64, take 1.4 ms, of which
products are 0.8; with gradients 5.2, of which 2.8 (one thread of an AMD EPYC, Zen 5). `fusedmm.eager.attention` alone
takes 1.7 and 6.3, and the first call after other work 0.5 more.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from fusedmm.eager.attention_groups import BLOCK_SCORES, Block, Group
from fusedmm.eager.attention_inputs import LEAST, LOG2_E, Inputs, hidden_scores
from fusedmm.eager.attention_rows import add_keys, as_matrices
from fusedmm.eager.products import ONEDNN_FLOPS, has_onednn, linear

LEAST_ROWS = 64  # of a block, for which each product lays out all keys anew; and fewest keys


def fits(x: Inputs, softmax: str, group: Group) -> bool:
    """Whether the group is one sample, its keys a view, of which a single key head pays for calls of its own: more on
    many threads, which share a call but take a head each of a batch.
    """
    rows = group.size_q * (x.query.shape[1] // x.key.shape[1])
    return (
        softmax == "joint"
        and x.seed is None
        and (x.visible is None or x.active is None)  # what they hide together is as large as the scores of all heads
        and group.is_view
        and min(rows, group.size_k) >= LEAST_ROWS
        and 2 * rows * group.size_k * x.query.shape[2] >= ONEDNN_FLOPS * torch.get_num_threads()
        and has_onednn(x.query.device, x.compute_dtype)
    )


def blocks(x: Inputs, group: Group) -> list[Block]:
    """The group's queries, as many at a time as make one key head's scores a block."""
    shared = x.query.shape[1] // x.key.shape[1]
    return group.cut(max(1, max(LEAST_ROWS, BLOCK_SCORES // group.size_k) // shared))


def forward_block(
    x: Inputs,
    group: Group,
    block: Block,
    tokens: tuple[Tensor, Tensor],
    share: Tensor | None,
    buffers: tuple[Tensor, Tensor],
) -> None:
    """Write a block's output and sums of exponentials to two buffers."""
    output, sums = buffers
    keys, values = (t.contiguous() for t in tokens)
    query, share, gate = (None if t is None else x.rows(t, group, block) for t in (x.query, share, x.gate))
    assert query is not None
    rows = as_matrices(query)
    queries = torch.mul(rows, x.scale * LOG2_E, out=rows.new_empty(rows.shape))
    factor = share if gate is None else gate if share is None else share * gate
    factors = None if factor is None else as_matrices(factor)
    heads = _by_head(len(keys), queries, keys, values, _hidden_by_head(x, group, block), factors)
    outputs, parts = zip(*(_forward_head(group, block, *head) for head in heads), strict=True)
    block_sums = torch.stack(parts).view(*query.shape[:-1], -1)
    total = (block_sums if share is None else block_sums * share).sum(-1, keepdim=True)
    x.write(sums, group, block, block_sums)
    x.write(output, group, block, torch.stack(outputs), total.clamp_min_(LEAST))


def _forward_head(
    group: Group, block: Block, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of a key head, the output [G * n, D] without its divisor and the sums of exponentials [G * n, M]. Its weights
    are gone when the next head's come, which get their memory; so it is in the backward.
    """
    weights = linear(query, key)  # [G * n, k]
    if hidden is not None:
        _hide(weights, hidden, block)
    columns = group.columns(weights.exp2_())
    sums = group.reduce(columns, torch.sum, 0.0)
    if factor is not None:
        for part, each in zip(columns, group.factors(factor), strict=True):
            part.mul_(each)
    return linear(weights, value.mT), sums


def backward_block(
    x: Inputs,
    group: Group,
    block: Block,
    tokens: tuple[Tensor, Tensor],
    packed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    token_sums: tuple[Tensor, Tensor, bool],
) -> tuple[Tensor, Tensor | None]:
    """The query's gradient, and by modality the sum of P * R with a gate, else of dz, if anything needs it; writes the
    gradients of keys and values to two buffers [total_k, Hkv, D], or adds them.

    Args:
        packed: gradient of the output, mass, exponent, offset and which rows see a single key, [total_q, Hq, D or M].
    """
    (keys, values), (grad_key, grad_value, add) = tokens, token_sums
    query = x.rows(x.query, group, block)
    gradient, *terms = (None if t is None else as_matrices(x.rows(t, group, block)) for t in (*packed, x.gate))
    assert gradient is not None
    matrices = (t.contiguous() for t in (as_matrices(query), keys, values, gradient))
    transposed = (None if t is None else t.mT.contiguous().mT for t in terms)  # rows lie together, as in the scores
    heads = _by_head(len(keys), *matrices, _hidden_by_head(x, group, block), *transposed)
    found = [_backward_head(x, group, block, *head) for head in heads]
    grad_queries, grad_keys, grad_values, parts = zip(*found, strict=True)
    add_keys(grad_key, group, torch.stack(grad_keys).mul_(x.scale), add)
    add_keys(grad_value, group, torch.stack(grad_values), add)
    grad_query = torch.stack(grad_queries).mul_(x.scale)
    return grad_query, None if parts[0] is None else torch.stack(parts).view(*query.shape[:-1], -1)


def _backward_head(
    x: Inputs,
    group: Group,
    block: Block,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    hidden: Tensor | None,
    mass: Tensor,
    exponent: Tensor,
    offset: Tensor,
    certain: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of a key head, the gradients of query [G * n, D] and key [k, D] without their scale, of value [k, D], and the
    sums [G * n, M] of `backward_block`.
    """
    probabilities = linear(key, query).mT  # [G * n, k]
    shares = group.columns(probabilities)
    for share, each in zip(shares, group.factors(exponent), strict=True):
        torch.add(each, share, alpha=x.scale * LOG2_E, out=share)
    if hidden is not None:
        _hide(probabilities, hidden, block)
    probabilities.exp2_()
    # Scores are not rounded as those of the forward, so that its lse leaves P no sum of 1.
    held = mass / group.reduce(shares, _sum_transposed, 0.0).clamp_min_(torch.finfo(mass.dtype).tiny)
    for share, each in zip(shares, group.factors(held), strict=True):
        share.mul_(each)
    products = linear(value, gradient).mT
    columns, offsets = group.columns(products), group.factors(offset)
    if gate is None:
        for part, start in zip(columns, offsets, strict=True):
            part.add_(start)
    products.mul_(probabilities)
    sums = None if gate is None and x.log_prior is None else group.reduce(columns, _sum_transposed, 0.0)
    if gate is not None:
        for part, share, scale, start in zip(columns, shares, group.factors(gate), offsets, strict=True):
            part.mul_(scale).addcmul_(share, start)
            share.mul_(scale)
    if certain is not None:  # of all modalities alike
        products.masked_fill_(certain[:, :1].bool(), 0.0)
    grad_query, grad_key = linear(key.mT, products).mT, linear(products.mT, query.mT)
    return grad_query, grad_key, linear(probabilities.mT, gradient.mT), sums


def _by_head(count: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Slices of tensors [count, ...], None for one that is not there."""
    return zip(*(repeat(None, count) if t is None else t for t in tensors), strict=False)


def _hidden_by_head(x: Inputs, group: Group, block: Block) -> Tensor | None:
    """`hidden_scores` [Hkv, G or 1, n or 1, k] of the only sample."""
    hidden = hidden_scores(x, group, block)
    return None if hidden is None else hidden[:, 0].expand(x.key.shape[1], -1, -1, -1)


def _hide(scores: Tensor, hidden: Tensor, block: Block) -> None:
    """Add what hides keys from a key head [G or 1, n or 1, k] to its scores [G * n, k]."""
    scores.unflatten(0, (-1, block.size)).add_(hidden)


def _sum_transposed(columns: Tensor, dim: int) -> Tensor:
    """[n, M] of a view [n, M, w] of [M, w, n]: summed along the view, it takes ten times as long."""
    return columns.movedim(0, -1).sum(dim - 1).mT
