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
    queries = as_matrices(query).contiguous()
    factor = share if gate is None else gate if share is None else share * gate
    factors = None if factor is None else as_matrices(factor)
    hidden = hidden_scores(x, group, block)
    outputs, parts = [], []
    for head, key in enumerate(keys):
        weights = linear(queries[head], key).mul_(x.scale * LOG2_E)  # [G * n, k]; not its factors, to round but once
        if hidden is not None:
            _hide(weights, hidden, head, block)
        columns = group.columns(weights.exp2_())
        parts.append(group.reduce(columns, torch.sum, 0.0))
        if factors is not None:
            for part, each in zip(columns, group.factors(factors[head]), strict=True):
                part.mul_(each)
        outputs.append(linear(weights, values[head].mT))
    block_sums = torch.stack(parts).view(*query.shape[:-1], -1)
    total = (block_sums if share is None else block_sums * share).sum(-1, keepdim=True)
    x.write(sums, group, block, block_sums)
    x.write(output, group, block, torch.stack(outputs), total.clamp_min_(LEAST))


def backward_block(
    x: Inputs,
    group: Group,
    block: Block,
    tokens: tuple[Tensor, Tensor],
    packed: tuple[Tensor, Tensor, Tensor, Tensor],
    token_sums: tuple[Tensor, Tensor, bool],
) -> tuple[Tensor, Tensor | None]:
    """The query's gradient, and by modality the sum of P * R with a gate, else of dz, if anything needs it; writes the
    gradients of keys and values to two buffers [total_k, Hkv, D], or adds them.

    Args:
        packed: gradient of the output, mass, exponent and offset, [total_q, Hq, D or M].
    """
    (keys, values), (grad_key, grad_value, add) = tokens, token_sums
    query = x.rows(x.query, group, block)
    queries, keys = as_matrices(query).contiguous(), keys.contiguous()
    gradient, *terms = (as_matrices(x.rows(t, group, block)) for t in (*packed, x.gate) if t is not None)
    gradients, values = gradient.contiguous(), values.contiguous()
    masses, exponents, offsets, *gates = (t.mT.contiguous().mT for t in terms)  # rows lie together, as in the scores
    hidden, tiny = hidden_scores(x, group, block), torch.finfo(x.compute_dtype).tiny
    grad_queries, grad_keys, grad_values, parts = [], [], [], []
    for head, key in enumerate(keys):
        probabilities = linear(key, queries[head]).mT  # [G * n, k]
        shares = group.columns(probabilities)
        for share, exponent in zip(shares, group.factors(exponents[head]), strict=True):
            torch.add(exponent, share, alpha=x.scale * LOG2_E, out=share)
        if hidden is not None:
            _hide(probabilities, hidden, head, block)
        probabilities.exp2_()
        # Scores are not rounded as those of the forward, so that its lse leaves P no sum of 1.
        held = masses[head] / group.reduce(shares, _sum_transposed, 0.0).clamp_min_(tiny)
        for share, factor in zip(shares, group.factors(held), strict=True):
            share.mul_(factor)
        products = linear(values[head], gradients[head]).mT
        columns = group.columns(products)
        offset = group.factors(offsets[head])
        if not gates:
            for part, start in zip(columns, offset, strict=True):
                part.add_(start)
        products.mul_(probabilities)
        if gates or x.log_prior is not None:
            parts.append(group.reduce(columns, _sum_transposed, 0.0))
        for gate in gates:
            for part, share, scale, start in zip(columns, shares, group.factors(gate[head]), offset, strict=True):
                part.mul_(scale).addcmul_(share, start)
                share.mul_(scale)
        grad_queries.append(linear(key.mT, products).mT)
        grad_keys.append(linear(products.mT, queries[head].mT))
        grad_values.append(linear(probabilities.mT, gradients[head].mT))
    add_keys(grad_key, group, torch.stack(grad_keys).mul_(x.scale), add)
    add_keys(grad_value, group, torch.stack(grad_values), add)
    grad_query = torch.stack(grad_queries).mul_(x.scale)
    return grad_query, torch.stack(parts).view(*query.shape[:-1], -1) if parts else None


def _hide(scores: Tensor, hidden: Tensor, head: int, block: Block) -> None:
    """Add what is `hidden_scores` of a key head to its scores [G * n, k]."""
    scores.unflatten(0, (-1, block.size)).add_(hidden[min(head, len(hidden) - 1), 0])  # [G or 1, n or 1, k]


def _sum_transposed(columns: Tensor, dim: int) -> Tensor:
    """[n, M] of a view [n, M, w] of [M, w, n]: summed along the view, it takes ten times as long."""
    return columns.movedim(0, -1).sum(dim - 1).mT
