"""Joint attention of a sample whose heads are large, a key head at a time.

oneDNN multiplies single matrices only (`fusedmm.eager.products`): 48 microseconds against MKL's 84 for 256 queries, 256
keys and a head of 64; and the scores of one head stay in the second-level cache through all passes. What is a number a
row is computed for all heads at once, so exponentials meet their sum only after the product with the values. The
backward forms everything transposed, which suits two of its last three products::

    E = exp2(s)                         output = ((E * share[m] * gate[m]) @ v) / sum_m share[m] * sums[m]
    P ~ exp2(s + exponent[m])           dz = P * (gate[m] * R + offset[m])                     R = dO @ v^T

where P is made to sum to the mass that the forward gave, if exponents are far from 0. 512 queries of 256 keys, 4 heads
of 64, take 1.4 ms, of which products are 0.8; with gradients 5.2, of which 2.8 (one thread of an AMD EPYC, Zen 5).
`fusedmm.eager.attention` alone takes 1.7 and 6.3; a first call after other work 0.6 more, of which oneDNN's code, come
into the caches, is 0.1.

Moderate priors without gates are M more columns of the queries, of which a key meets that of its modality: then E and
its sums hold them and nothing multiplies E: a tenth less of a first call (`python -m benchmarks attention/dense-prior`:
2.4 to 2.7 ms before, 2.1 with it, beside 2.2 to 2.4 of PyTorch's fused attention).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedmm.eager.attention_groups import BLOCK_SCORES, Block, Group, Lengths
from fusedmm.eager.attention_inputs import LEAST, Inputs, hidden_scores
from fusedmm.eager.attention_rows import as_matrices, key_view
from fusedmm.eager.products import LOG2_E, ONEDNN_FLOPS, cast, has_onednn, linear

# Elements of queries and keys that are laid out at once: 1 MiB, with a prior's columns a quarter more at most; and as
# much of values and outputs.
STAGED = 1 << 18
MODERATE = 10.0  # size of priors that scores may hold: sums of exponentials are to stay near 1 as they would without
LEAST_ROWS = 64  # of a block, for which each product lays out all keys anew; and fewest keys


def fits(x: Inputs, groups: Sequence[Group]) -> list[bool]:
    """Which groups are one sample, its keys a view, of which a single key head pays for calls of its own: more on many
    threads, which share a call but take a head each of a batch.
    """
    is_plain = (
        x.softmax == "joint"
        and x.seed is None
        and (x.visible is None or x.active is None)  # what they hide together is as large as the scores of all heads
        and has_onednn(x.query, x.compute_dtype)
    )
    if not is_plain:
        return [False] * len(groups)
    shared, dim = x.query.shape[1] // x.key.shape[1], x.query.shape[2]
    least = ONEDNN_FLOPS * torch.get_num_threads() / (2 * shared * dim)  # scores of a query head
    return [
        min(shared * group.size_q, group.size_k) >= LEAST_ROWS
        and group.size_q * group.size_k >= least
        and group.is_view
        for group in groups
    ]


def takes_prior(x: Inputs) -> bool:
    """Whether priors may be columns of the products, which saves a pass over the weights: nothing else multiplies them,
    and no prior is far from 0.
    """
    if x.log_prior is None or x.gate is not None or x.num_modalities > x.query.shape[2] // 4:
        return False
    low, high = x.log_prior.aminmax()
    return bool(low.item() >= -MODERATE and high.item() <= MODERATE)


def blocks(x: Inputs, group: Group) -> list[Block]:
    """The group's queries, as many at a time as make one key head's scores a block."""
    shared = x.query.shape[1] // x.key.shape[1]
    return group.cut(max(1, max(LEAST_ROWS, BLOCK_SCORES // group.size_k) // shared))


class Piece(NamedTuple):
    """A block of a group, and which packed rows its queries and keys are."""

    group: Group
    block: Block
    rows: slice
    keys: slice


class _Forward(NamedTuple):
    """What the forward reads and writes: of all key heads [Hkv, ...], or of one."""

    query: Tensor  # [G * n, D], scaled; or, keys being so, [G * n, D + M] with the prior
    key: Tensor  # [k, D or D + M]
    value: Tensor  # [k, D]
    hidden: Tensor | None  # [G or 1, n or 1, k]
    factor: Tensor | None  # [G * n, M] of weights
    output: Tensor  # [G * n, D] without its divisor
    sums: Tensor  # [G * n, M] of exponentials


class _Backward(NamedTuple):
    """What the backward reads and writes; rows of M numbers lie beside each other, as in the transposed scores."""

    query: Tensor  # [G * n, D]
    key: Tensor  # [k, D]
    value: Tensor  # [k, D]
    gradient: Tensor  # [G * n, D] of the output
    hidden: Tensor | None  # [G or 1, n or 1, k]
    mass: Tensor | None  # [G * n, M] what P is made to sum to
    exponent: Tensor  # [G * n, M]
    offset: Tensor  # [G * n, M]
    certain: Tensor | None  # [G * n, M] which rows see a single key
    gate: Tensor | None  # [G * n, M]
    grad_query: Tensor  # [G * n, D]
    grad_key: Tensor  # [k, D]
    grad_value: Tensor  # [k, D]
    sums: Tensor | None  # [G * n, M] of P * R with a gate, else of dz


def spans(x: Inputs, groups: Iterable[Group]) -> list[list[Piece]]:
    """Blocks of groups that `fits`: those side by side together, as many as are laid out at once. A first call brings
    less code into the caches then: 3 to 5 % for two samples of 256 queries and keys.
    """
    (_, heads, dim), kv_heads = x.query.shape, x.key.shape[1]
    found: list[list[Piece]] = []
    size, last_q, last_k = 0, -1, slice(-1, -1)
    for group in groups:
        for block in blocks(x, group):
            rows, keys = block.rows, group.keys
            assert isinstance(rows, slice)
            assert isinstance(keys, slice)
            of_queries, of_keys = dim * heads * block.size, dim * kv_heads * group.size_k
            follows = heads == kv_heads and rows.start == last_q and (keys == last_k or keys.start == last_k.stop)
            size += of_queries + (0 if keys == last_k else of_keys)
            if not follows or size > STAGED:
                found.append([])
                size = of_queries + of_keys
            found[-1].append(Piece(group, block, rows, keys))
            last_q, last_k = rows.stop, keys
    return found


def forward(x: Inputs, span: list[Piece], share: Tensor | None, buffers: tuple[Tensor, Tensor]) -> None:
    """Write the output and sums of exponentials of a span to two buffers. Of scores with priors, where there is one but
    no ``share``, the factor that stands for it.
    """
    rows = slice(span[0].rows.start, span[-1].rows.stop)
    keys = slice(span[0].keys.start, span[-1].keys.stop)
    query, key, value = (_heads_first(x, t) for t in (x.query[rows], x.key[keys], x.value[keys]))
    if x.log_prior is None or share is not None:
        query = torch.mul(query, x.scale * LOG2_E, out=query.new_empty(query.shape))
        key = key.contiguous()
    else:
        query = torch.cat((query, _heads_first(x, x.log_prior[rows])), -1)
        key = _with_modalities(x, span, key)
    query, value = query.view(len(key), -1, query.shape[2]), value.contiguous()
    share, gate = (None if t is None else t[rows] for t in (share, x.gate))
    factor = share if gate is None else gate if share is None else share * gate
    if factor is not None:
        factor = _heads_first(x, factor).contiguous().view(*query.shape[:2], -1)
    result, found = (query.new_empty((*query.shape[:2], size)) for size in (value.shape[2], x.num_modalities))
    end = 0
    for piece in span:
        begin, end = end, end + piece.block.size * x.query.shape[1] // x.key.shape[1]
        first, last = piece.keys.start - keys.start, piece.keys.stop - keys.start
        heads = _Forward(
            query=query[:, begin:end],
            key=key[:, first:last],
            value=value[:, first:last],
            hidden=_hidden_by_head(x, piece.group, piece.block),
            factor=None if factor is None else factor[:, begin:end],
            output=result[:, begin:end],
            sums=found[:, begin:end],
        )
        for head in _each(heads):
            _forward_head(piece, _Forward(*head))
    output, sums = (t[rows] for t in buffers)
    sums.copy_(_packed(found, rows))
    total = (sums if share is None else sums * share).sum(-1, keepdim=True)
    torch.div(_packed(result, rows), total.clamp_min_(LEAST), out=output)


def _with_modalities(x: Inputs, span: list[Piece], key: Tensor) -> Tensor:
    """Scaled keys [Hkv, k, D + M] whose last columns pick the prior of their modality from a query's."""
    dim, unit = key.shape[2], x.scale * LOG2_E
    wide = key.new_empty((*key.shape[:2], dim + x.num_modalities))
    torch.mul(key, unit, out=wide[..., :dim])
    for piece in span:
        first = piece.keys.start - span[0].keys.start
        wide[:, first : first + piece.group.size_k, dim:] = _modalities(piece.group.widths)
    return wide


@lru_cache(maxsize=8)
def _modalities(widths: Lengths) -> Tensor:
    """[k, M] log2(e) in the column of a key's modality, else 0."""
    modality = torch.repeat_interleave(torch.tensor(widths, device="cpu"))
    return torch.nn.functional.one_hot(modality, len(widths)).to(torch.float32).mul_(LOG2_E)


def _forward_head(piece: Piece, x: _Forward) -> None:
    """Of a key head. Nothing that it makes is left, so that the next head's weights get the memory of these, which is
    in cache; so it is in the backward.
    """
    weights = linear(x.query, x.key)  # [G * n, k]
    if x.hidden is not None:
        _hide(weights, x.hidden, piece.block)
    columns = piece.group.columns(weights.exp2_())
    piece.group.reduce(columns, torch.sum, 0.0, out=x.sums)
    if x.factor is not None:
        for part, each in zip(columns, piece.group.factors(x.factor), strict=True):
            part.mul_(each)
    x.output.copy_(linear(weights, x.value.mT))


def backward_block(
    x: Inputs,
    group: Group,
    block: Block,
    tokens: tuple[Tensor, Tensor],
    packed: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None],
    token_sums: tuple[Tensor, Tensor, bool],
) -> tuple[Tensor, Tensor | None]:
    """The query's gradient, and by modality the sum of P * R with a gate, else of dz, if anything needs it; writes the
    gradients of keys and values to two buffers [total_k, Hkv, D], or adds them.

    Args:
        packed: gradient of the output, and of `attention_sums.RowTerms` mass, exponent, offset and certain,
            [total_q, Hq, D or M].
    """
    grad_key, grad_value, add = token_sums
    query = x.rows(x.query, group, block)
    gradient, *terms = (None if t is None else as_matrices(x.rows(t, group, block)) for t in (*packed, x.gate))
    assert gradient is not None
    rows, key, value, gradient = (t.contiguous() for t in (as_matrices(query), *tokens, gradient))
    transposed: list[Any] = [None if t is None else t.mT.contiguous().mT for t in terms]
    mass, exponent, offset, certain, gate = transposed
    needs_sums = x.gate is not None or x.log_prior is not None
    sums = query.new_empty((*query.shape[:-1], x.num_modalities)) if needs_sums else None
    heads = _Backward(
        query=rows,
        key=key,
        value=value,
        gradient=gradient,
        hidden=_hidden_by_head(x, group, block),
        mass=mass,
        exponent=exponent,
        offset=offset,
        certain=certain,
        gate=gate,
        grad_query=torch.empty_like(rows),
        grad_key=key_view(grad_key, group),
        grad_value=key_view(grad_value, group),
        sums=None if sums is None else as_matrices(sums),
    )
    for head in _each(heads):
        _backward_head(group, block, x.scale, _Backward(*head), add=add)
    return heads.grad_query, sums


def _backward_head(group: Group, block: Block, scale: float, x: _Backward, *, add: bool) -> None:
    """Of a key head; the gradients of keys and values are added where ``add`` says so."""
    probabilities = linear(x.key, x.query).mT  # [G * n, k]
    shares = group.columns(probabilities)
    for share, each in zip(shares, group.factors(x.exponent), strict=True):
        torch.add(each, share, alpha=scale * LOG2_E, out=share)
    if x.hidden is not None:
        _hide(probabilities, x.hidden, block)
    probabilities.exp2_()
    if x.mass is not None:
        held = x.mass / group.reduce(shares, _sum_transposed, 0.0).clamp_min_(torch.finfo(x.mass.dtype).tiny)
        for share, each in zip(shares, group.factors(held), strict=True):
            share.mul_(each)
    products = linear(x.value, x.gradient).mT
    columns, offsets = group.columns(products), group.factors(x.offset)
    if x.gate is None:
        for part, start in zip(columns, offsets, strict=True):
            part.add_(start)
    products.mul_(probabilities)
    if x.sums is not None:
        group.reduce(columns, _sum_transposed, 0.0, out=x.sums)
    if x.gate is not None:
        for part, share, gate, start in zip(columns, shares, group.factors(x.gate), offsets, strict=True):
            part.mul_(gate).addcmul_(share, start)
            share.mul_(gate)
    if x.certain is not None:  # of all modalities alike
        products.masked_fill_(x.certain[:, :1].bool(), 0.0)
    torch.mul(linear(x.key.mT, products).mT, scale, out=x.grad_query)
    if add:
        x.grad_key.add_(linear(products.mT, x.query.mT), alpha=scale)
        x.grad_value.add_(linear(probabilities.mT, x.gradient.mT))
    else:
        torch.mul(linear(products.mT, x.query.mT), scale, out=x.grad_key)
        x.grad_value.copy_(linear(probabilities.mT, x.gradient.mT))


def _each(heads: _Forward | _Backward) -> Iterator[tuple[Any, ...]]:
    """What is there of every key head, of each head in turn; None stays."""
    count = len(heads.key)
    return zip(*(repeat(None, count) if t is None else t.unbind() for t in heads), strict=True)


def _heads_first(x: Inputs, packed: Tensor) -> Tensor:
    """[n, H, X] as a view [H, n, X], in the compute dtype."""
    return cast(packed, x.compute_dtype).transpose(0, 1)


def _packed(by_key_head: Tensor, rows: slice) -> Tensor:
    """A view [n, Hq, X] of [Hkv, G * n, X]."""
    return by_key_head.view(-1, rows.stop - rows.start, by_key_head.shape[2]).transpose(0, 1)


def _hidden_by_head(x: Inputs, group: Group, block: Block) -> Tensor | None:
    """`hidden_scores` [Hkv, G or 1, n or 1, k] of the only sample."""
    hidden = hidden_scores(x, group, block)
    return None if hidden is None else hidden[:, 0].expand(x.key.shape[1], -1, -1, -1)


def _hide(scores: Tensor, hidden: Tensor, block: Block) -> None:
    """Add what hides keys from a key head [G or 1, n or 1, k] to its scores [G * n, k]."""
    scores.unflatten(0, (-1, block.size)).add_(hidden)


def _sum_transposed(columns: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """[n, M] of a view [n, M, w] of [M, w, n]: summed along the view, it takes ten times as long."""
    sums = columns.movedim(0, -1).sum(dim - 1).mT
    return sums if out is None else out.copy_(sums)
