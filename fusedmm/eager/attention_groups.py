"""Which samples the eager attention computes together, and where their queries and keys lie.

Samples of similar size form a group. Within a group every modality has the same columns: each segment is padded to
the longest of its modality, so that a sum over a modality is a sum over a slice, for all samples at once. A sample too
large to share a group is cut into blocks of queries. Samples of one size that lie side by side are read through views;
only others are gathered. The plan is a function of host integers; layers, and forward and backward, share one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 18  # 1 MiB of float32: a block stays in the second-level cache through all passes
BLOCK_QUERIES = 16  # fewest queries of a block; such a block is no larger than the keys of its sample
GROUP_COST = 1 << 14  # what a group costs by itself, in scores
GROUP_SCORES = 1 << 15  # of a head and sample; from there on a head pays for products of its own: 4 MFLOP at 64 dims
GATHER_COST = 4  # what a key and its value cost to gather, in scores: a sample by itself is read through views

Lengths = tuple[int, ...]


class Sample(NamedTuple):
    """Where one sample lies: its queries, and the keys of each modality."""

    batch: int
    start_q: int
    size_q: int
    starts_k: Lengths  # [M]
    sizes_k: Lengths  # [M]; 0 for a segment that nothing reads


class Run(NamedTuple):
    """Neighbouring modalities of one width: their columns are viewed as [modality, width]."""

    modalities: int
    width: int


class KeySlots(NamedTuple):
    """Where rows of packed keys [total_k * H, D] lie among a group's padded ones, heads first, [H * c * k, D]."""

    read: Tensor  # [H * c * k] int32, the packed row of each padded one; padding reads the first key
    blank: Tensor  # [...] int64, the padded rows that are padding
    back: Tensor  # [count_k * H] int32, the padded row of each packed one
    keys: Tensor  # [count_k] int64, the packed keys
    run: slice | None  # the same, where they lie together


@dataclass(frozen=True)
class Block:
    """Some queries of each sample of a group."""

    rows: slice | Tensor  # [c * n] packed rows
    size: int  # n
    padding: Tensor | None  # [c, n] True where a row is no query; None: nowhere


@dataclass(frozen=True)
class Group:
    """c samples, in the order of the batch, padded to the same number of queries and of keys of each modality."""

    samples: list[Sample]
    size_q: int
    widths: Lengths
    heads: int
    device: torch.device

    @cached_property
    def size_k(self) -> int:
        return sum(self.widths)

    @cached_property
    def count_q(self) -> int:
        """Queries, without padding."""
        return sum(s.size_q for s in self.samples)

    @cached_property
    def count_k(self) -> int:
        """Keys, without padding."""
        return sum(sum(s.sizes_k) for s in self.samples)

    @cached_property
    def count_segments(self) -> int:
        """Pairs of a query and a modality of which its sample has keys."""
        return sum(s.size_q * sum(size > 0 for size in s.sizes_k) for s in self.samples)

    @cached_property
    def is_one_shape(self) -> bool:
        """Whether the group is one block of samples that lie side by side, with modalities of one size, of more than
        a single key.
        """
        lies_together = (
            len(self.blocks) == 1 and isinstance(self.blocks[0].rows, slice) and isinstance(self.keys, slice)
        )
        return lies_together and len(self.runs) == 1 and self.size_k > 1

    def has_single_key(self, is_joint: bool) -> bool:
        """Whether a sample, or else a segment, is a single key."""
        return any(sum(s.sizes_k) == 1 if is_joint else 1 in s.sizes_k for s in self.samples)

    @cached_property
    def runs(self) -> list[Run]:
        return [Run(len(list(members)), width) for width, members in groupby(self.widths)]

    def columns(self, scores: Tensor) -> list[Tensor]:
        """Views [..., modality, width] of [..., k], one a run that has columns."""
        if len(self.runs) == 1:
            return [scores.view(*scores.shape[:-1], *self.runs[0])]
        parts = scores.split([run.modalities * run.width for run in self.runs], -1)
        return [
            part.unsqueeze(-2) if run.modalities == 1 else part.unflatten(-1, run)
            for part, run in zip(parts, self.runs, strict=True)
            if run.width
        ]

    def factors(self, rows: Tensor) -> list[Tensor]:
        """Views [..., modality, 1] of [..., M] that broadcast with `columns`."""
        if len(self.runs) == 1:
            return [rows[..., None]]
        parts = rows[..., None].split([run.modalities for run in self.runs], -2)
        return [part for part, run in zip(parts, self.runs, strict=True) if run.width]

    def reduce(
        self, columns: list[Tensor], over: Callable[..., Tensor], nothing: float, out: Tensor | None = None
    ) -> Tensor:
        """`columns` to [..., M], one number a modality."""
        if len(self.runs) == 1:
            return over(columns[0], -1, out=out)
        found = iter(columns)
        empty = columns[0].shape[:-2]
        parts = [
            over(next(found), -1) if run.width else columns[0].new_full((*empty, run.modalities), nothing)
            for run in self.runs
        ]
        return torch.cat(parts, -1, out=out)

    @cached_property
    def keys(self) -> slice | Tensor:
        """[c * k] packed rows of the keys; row 0 stands for padding."""
        start = expected = next(s for s, n in zip(self.samples[0].starts_k, self.widths, strict=True) if n)
        for sample in self.samples:
            for first, size, width in zip(sample.starts_k, sample.sizes_k, self.widths, strict=True):
                if size != width or (size and first != expected):
                    return self._key_table[0].flatten()
                expected += size
        return slice(start, expected)

    @cached_property
    def is_view(self) -> bool:
        """Whether the keys are a view of the packed ones, heads first too: one sample, whose keys lie together."""
        return len(self.samples) == 1 and isinstance(self.keys, slice)

    @cached_property
    def key_index(self) -> Tensor:
        """[c, k] packed row of each column."""
        keys = self.keys
        if isinstance(keys, slice):
            keys = torch.arange(keys.start, keys.stop, device=self.device)
        return keys.view(len(self.samples), -1)

    @cached_property
    def padding(self) -> Tensor | None:
        """[c, k] True where a column is no key; None: nowhere."""
        return None if all(s.sizes_k == self.widths for s in self.samples) else self._key_table[1]

    def key_slots(self, heads: int) -> KeySlots:
        """For H key heads."""
        if heads not in self._key_slots:
            packed = self.key_index.flatten()
            padding = torch.zeros_like(packed, dtype=torch.bool) if self.padding is None else self.padding.flatten()
            blank, real = padding.nonzero()[:, 0], (~padding).nonzero()[:, 0]
            head, keys = torch.arange(heads, device=self.device), packed[real]
            first, last = int(keys[0]), int(keys[-1])
            self._key_slots[heads] = KeySlots(
                read=(packed * heads + head[:, None]).flatten().to(torch.int32),
                blank=(blank + head[:, None] * len(packed)).flatten(),
                back=(real[:, None] + head * len(packed)).flatten().to(torch.int32),
                keys=keys,
                run=slice(first, last + 1) if last - first + 1 == self.count_k else None,
            )
        return self._key_slots[heads]

    @cached_property
    def _key_slots(self) -> dict[int, KeySlots]:
        return {}

    def hidden_padding(self, dtype: torch.dtype) -> Tensor:
        """[c, k] -inf where a column is no key, else 0."""
        if dtype not in self._hidden_padding:
            hidden = torch.zeros(self.key_index.shape, dtype=dtype, device=self.device)
            if self.padding is not None:
                hidden.masked_fill_(self.padding, -torch.inf)
            self._hidden_padding[dtype] = hidden
        return self._hidden_padding[dtype]

    @cached_property
    def _hidden_padding(self) -> dict[torch.dtype, Tensor]:
        return {}

    @cached_property
    def _key_table(self) -> tuple[Tensor, Tensor]:
        starts, sizes = (
            torch.tensor([getattr(s, name) for s in self.samples], device=self.device)
            for name in ("starts_k", "sizes_k")
        )
        widths = torch.tensor(self.widths, device=self.device)
        modality = torch.repeat_interleave(widths)  # [k]
        position = torch.arange(self.size_k, device=self.device) - (widths.cumsum(0) - widths)[modality]
        padding = position >= sizes[:, modality]
        return (starts[:, modality] + position).masked_fill_(padding, 0), padding

    @cached_property
    def block_queries(self) -> int:
        """Queries of a sample in one block; only a group of one sample is cut."""
        if len(self.samples) > 1:
            return self.size_q
        return min(self.size_q, max(BLOCK_QUERIES, BLOCK_SCORES // (self.heads * self.size_k)))

    def cut(self, step: int) -> list[Block]:
        """The queries of a single sample, ``step`` at a time."""
        if step not in self._cuts:
            first = self.samples[0].start_q
            last = first + self.size_q
            starts = range(first, last, step)
            self._cuts[step] = [Block(slice(at, min(at + step, last)), min(step, last - at), None) for at in starts]
        return self._cuts[step]

    @cached_property
    def _cuts(self) -> dict[int, list[Block]]:
        return {}

    @cached_property
    def blocks(self) -> list[Block]:
        """The group's queries."""
        first, count = self.samples[0].start_q, len(self.samples)
        if count == 1:
            return self.cut(self.block_queries)
        if all(s.size_q == self.size_q and s.start_q == first + i * self.size_q for i, s in enumerate(self.samples)):
            return [Block(slice(first, first + count * self.size_q), self.size_q, None)]
        starts, sizes = torch.tensor([(s.start_q, s.size_q) for s in self.samples], device=self.device).T
        position = torch.arange(self.size_q, device=self.device)
        padding = position >= sizes[:, None]
        rows = (starts[:, None] + position).masked_fill_(padding, 0).flatten()
        padded = any(s.size_q != self.size_q for s in self.samples)
        return [Block(rows, self.size_q, padding if padded else None)]


def find_groups(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_modalities: int, active: Tensor | None, heads: int
) -> tuple[Group, ...]:
    """Group the samples that have a query and a key.

    Args:
        cu_seqlens_q, cu_seqlens_k: [B+1] and [B*M+1], of `fusedmm.ModalityLayout`.
        active: [B, Hq, M] bool or None; segments that no head reads count as empty.
        heads: Hq.
    """
    read = None if active is None else tuple(map(tuple, active.any(1).tolist()))
    bounds = tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist())
    return _plan(*bounds, num_modalities, read, heads, cu_seqlens_q.device)


@lru_cache(maxsize=4)
def _plan(
    bounds_q: Lengths,
    bounds_k: Lengths,
    num_modalities: int,
    read: tuple[tuple[bool, ...], ...] | None,
    heads: int,
    device: torch.device,
) -> tuple[Group, ...]:
    samples = []
    for index, (start_q, end_q) in enumerate(pairwise(bounds_q)):
        bounds = bounds_k[index * num_modalities : (index + 1) * num_modalities + 1]
        sizes = tuple(end - start for start, end in pairwise(bounds))
        if read is not None:
            sizes = tuple(size if on else 0 for size, on in zip(sizes, read[index], strict=True))
        if end_q > start_q and any(sizes):
            samples.append(Sample(index, start_q, end_q - start_q, bounds[:-1], sizes))
    samples.sort(key=lambda s: (sum(s.sizes_k), s.sizes_k, s.size_q), reverse=True)
    return tuple(
        Group(sorted(members), size_q, widths, heads, device) for members, size_q, widths in _gather(samples, heads)
    )


def _gather(samples: list[Sample], heads: int) -> Iterator[tuple[list[Sample], int, Lengths]]:
    """Samples to pad together, their most queries and widths: neighbours in size, while they are small, and gathering
    and padding cost less than another group.
    """
    members: list[Sample] = []
    size_q, cost = 0, 0
    widths: Lengths = ()
    for sample in samples:
        alone = heads * sample.size_q * sum(sample.sizes_k)
        next_q, next_widths = max(size_q, sample.size_q), sample.sizes_k
        if members and widths != next_widths:
            next_widths = tuple(map(max, widths, next_widths))
        width = sum(next_widths)
        keys = heads * (len(members) + 1) * width
        joined = (next_q + GATHER_COST) * keys
        is_small = next_q * width < GROUP_SCORES and next_q * keys <= BLOCK_SCORES
        if members and is_small and joined <= cost + alone + GROUP_COST:
            members.append(sample)
            size_q, widths, cost = next_q, next_widths, joined
        else:
            if members:
                yield members, size_q, widths
            members, size_q, widths, cost = [sample], sample.size_q, sample.sizes_k, alone
    if members:
        yield members, size_q, widths
