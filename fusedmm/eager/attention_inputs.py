"""What both directions of the eager attention read: its inputs, who sees what, and the scores of a block."""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedmm.eager.attention_groups import Block, Group, find_groups
from fusedmm.eager.attention_rows import read_keys, read_rows, write_rows
from fusedmm.eager.products import LOG2_E, compute_dtype
from fusedmm.philox import keep_mask

# Sums of exponentials of a modality, and of a row, are within 2 ** +-LARGEST, or peaks are taken off. What of a share
# underflows, below 2 ** -149, is then less than a rounding of the mass, and values up to 1e20 do not overflow.
LARGEST = 60.0
LEAST = 2.0**-LARGEST
MODEST = 1e18  # products of two numbers below it, and sums of a few hundred, are finite
NOTHING = -1e30  # stands for the lse of a modality without visible keys: log of its mass stays -inf beside it


class Inputs(NamedTuple):
    """The arguments of the registered operators, in the order of their schemas; the lists of tiles are for kernels
    only.
    """

    query: Tensor  # [total_q, Hq, D]
    key: Tensor  # [total_k, Hkv, D]
    value: Tensor  # [total_k, Hkv, D]
    log_prior: Tensor | None  # [total_q, Hq, M]
    gate: Tensor | None  # [total_q, Hq, M]
    output_gate: Tensor | None  # [total_q, Hq, D]
    cu_seqlens_q: Tensor  # [B+1]
    cu_seqlens_k: Tensor  # [B*M+1]
    query_tiles: Tensor  # [tiles, 2]
    key_tiles: Tensor  # [tiles, 2]
    active: Tensor | None  # [B, Hq, M]
    visible: Tensor | None  # [total_q, M, 2]
    seed: Tensor | None  # [1]
    num_modalities: int
    dropout_p: float
    scale: float
    softmax: str
    impl: str

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.query)

    def groups(self) -> tuple[Group, ...]:
        return find_groups(self.cu_seqlens_q, self.cu_seqlens_k, self.num_modalities, self.active, self.query.shape[1])

    def keys(self, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv * c, k, D]."""
        return read_keys(self.key, group, self.compute_dtype), read_keys(self.value, group, self.compute_dtype)

    def rows(self, packed: Tensor, group: Group, block: Block) -> Tensor:
        """[*shape, X] of [total_q, Hq, X], in the accumulation dtype (see `fusedmm.eager.attention_rows`)."""
        return read_rows(packed, group, block, self.key.shape[1], self.compute_dtype)

    def write(self, buffer: Tensor, group: Group, block: Block, result: Tensor, divisor: Tensor | None = None) -> None:
        """A block's rows to [total_q, Hq, X], divided by [*shape, 1] where given."""
        write_rows(buffer, group, block, self.key.shape[1], result, divisor)


TENSORS = Inputs._fields.index("num_modalities")  # so many of them are tensors or None; settings follow


class Counts:
    """Gives [total_q, Hq, M], the keys that each query sees of each modality: found when first asked for, then kept."""

    def __init__(self, x: Inputs) -> None:
        self._inputs = x
        self._found: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._found is None:
            self._found = _visible_counts(self._inputs)
        return self._found


def ungrouped(x: Inputs) -> Inputs:
    """A key head for each query head where those of one group differ in what is active and a token holds NaN or what
    a product may take to inf: a head that is off must not read what the next one reads.
    """
    kv_heads = x.key.shape[1]
    if x.active is None or x.query.shape[1] == kv_heads:
        return x
    by_group = x.active.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, M]
    if bool((by_group == by_group[:, :, :1]).all()) or all(bool((t.abs() < MODEST).all()) for t in (x.key, x.value)):
        return x
    key, value = (t.repeat_interleave(x.query.shape[1] // kv_heads, 1) for t in (x.key, x.value))
    return x._replace(key=key, value=value)


def without_unseen(x: Inputs, counts: Counts) -> Inputs:
    """Keys and values that no query sees, by time or because their head is switched off, and queries that see nothing,
    set to 0: NaN there goes nowhere. Where all heads agree, `active` has done all it does: groups leave out what is
    switched off.

    Args:
        x: the inputs.
        counts: `Counts` of them.
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
    query = torch.where((counts() == 0).all(-1)[..., None], 0, x.query)
    return x._replace(query=query, key=key, value=value, active=active)


def _visible_counts(x: Inputs) -> Tensor:
    if x.visible is None or x.active is not None:
        rows = torch.arange(x.query.shape[0], device=x.query.device)
        sample = torch.searchsorted(x.cu_seqlens_q[1:].long(), rows, right=True)
    if x.visible is not None:
        counts = (x.visible[..., 1] - x.visible[..., 0]).clamp_min(0).long()  # [total_q, M]
    else:
        counts = x.cu_seqlens_k.diff().long().view(-1, x.num_modalities)[sample]
    counts = counts[:, None].expand(-1, x.query.shape[1], -1)
    return counts if x.active is None else counts * x.active[sample]


def shares(start: Tensor) -> Tensor:
    """``exp2(start)`` [..., M] relative to the largest of a row; a row of -inf gives 0."""
    lowest = torch.finfo(start.dtype).min  # for -inf, of which nothing can be subtracted
    return start.sub(start.amax(-1, keepdim=True).clamp_min_(lowest)).exp2_()


def row_exponent(mass: Tensor, lse: Tensor, log_prior: Tensor | None) -> Tensor:
    """[total_q, Hq, M] added to scores in base 2 so that exp2 gives P = exp(s + prior - lse) * mass of any softmax."""
    exponent = mass.log2().sub_(lse.clamp_min(NOTHING), alpha=LOG2_E)
    return exponent if log_prior is None else exponent.add_(log_prior, alpha=LOG2_E)


def block_scores(
    x: Inputs,
    group: Group,
    block: Block,
    query: Tensor,
    shape: tuple[int, ...],
    keys: Tensor,
    start: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Scaled scores in base 2 of queries [Hkv * c, G * n, D], -inf where a key is not visible: [Hkv * c, G * n, k], and
    as views [*shape, modality, width], one a run of widths. What is in ``start`` [*shape, M] is added.
    """
    scores = query.new_empty((*query.shape[:2], group.size_k))
    columns = group.columns(scores if len(shape) == 2 else scores.view(*shape, group.size_k))
    hidden = hidden_scores(x, group, block)
    if hidden is not None:
        scores.view(x.key.shape[1], len(group.samples), -1, block.size, group.size_k).copy_(hidden)
    if start is not None:
        for part, each in zip(columns, group.factors(start), strict=True):
            part.copy_(each) if hidden is None else part.add_(each)
    is_started = hidden is not None or start is not None
    return scores.baddbmm_(query, keys.mT, beta=int(is_started), alpha=x.scale * LOG2_E), columns


def hidden_scores(x: Inputs, group: Group, block: Block) -> Tensor | None:
    """What hides keys: 0 or -inf, broadcasts to [Hkv, c, G, n, k]; None: nothing does."""
    if group.padding is None and x.visible is None and x.active is None:
        return None
    samples = len(group.samples)
    padding = group.hidden_padding(x.compute_dtype)[:, None]  # [c, 1, k]
    if x.visible is None and x.active is None:
        return padding[None, None].transpose(1, 2)
    heads = 1 if x.active is None else x.query.shape[1]
    hidden = padding.repeat(heads, 1, 1 if x.visible is None else block.size, 1)
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


def drop(products: Tensor, x: Inputs, group: Group, block: Block) -> None:
    """Multiply by dropout's factor, 0 or 1 / (1 - p), in place."""
    assert x.seed is not None
    samples, kv_heads = len(group.samples), x.key.shape[1]
    rows = block.rows
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=products.device)
    head = torch.arange(x.query.shape[1], device=products.device).view(kv_heads, 1, -1, 1, 1)
    kept = keep_mask(x.seed, rows.view(samples, 1, -1, 1), head, group.key_index[:, None, None], x.dropout_p)
    products.view(kept.shape).mul_(kept).div_(1.0 - x.dropout_p)
