"""Which samples the eager attention computes together, and where their queries and keys lie.

Samples of similar size form a group. Within a group every modality has the same columns: each segment is padded to
the longest of its modality, so that a sum over a modality is a sum over a slice, for all samples at once. A sample too
large to share a group is cut into blocks of queries. Samples of one size that lie side by side are read through views;
only others are gathered. The plan is made from host integers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 18  # 1 MiB of float32: a block stays in the second-level cache through all passes
BLOCK_QUERIES = 16  # fewest queries of a block; such a block is no larger than the keys of its sample
GROUP_COST = 1 << 14  # what a group costs by itself, in scores

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Where one sample lies: its queries, and the keys of each modality."""

    index: int
    start_q: int
    size_q: int
    starts_k: Lengths  # [M]
    sizes_k: Lengths  # [M]; 0 for a segment that nothing reads


@dataclass(frozen=True)
class Run:
    """Neighbouring modalities of one width: their columns are viewed as [modality, width]."""

    modalities: slice
    columns: slice
    width: int

    @property
    def count(self) -> int:
        return int(self.modalities.stop - self.modalities.start)


@dataclass(frozen=True)
class Block:
    """Some queries of each sample of a group."""

    rows: slice | Tensor  # [c * n] packed rows
    size: int  # n
    padding: Tensor | None  # [c, n] True where a row is no query; None: nowhere


@dataclass(frozen=True)
class Group:
    """c samples padded to the same number of queries and of keys of each modality."""

    samples: list[Sample]
    size_q: int
    widths: Lengths
    device: torch.device

    @property
    def size_k(self) -> int:
        return sum(self.widths)

    @cached_property
    def runs(self) -> list[Run]:
        runs, column = [], 0
        for width, members in groupby(range(len(self.widths)), key=self.widths.__getitem__):
            modalities = list(members)
            end = column + width * len(modalities)
            runs.append(Run(slice(modalities[0], modalities[-1] + 1), slice(column, end), width))
            column = end
        return runs

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

    def blocks(self, heads: int) -> Iterator[Block]:
        """The group's queries; only a group of one sample is cut."""
        first = self.samples[0].start_q
        if len(self.samples) == 1:
            step = max(BLOCK_QUERIES, BLOCK_SCORES // (heads * self.size_k))
            for start in range(0, self.size_q, step):
                size = min(step, self.size_q - start)
                yield Block(slice(first + start, first + start + size), size, None)
        elif all(s.size_q == self.size_q and s.start_q == first + i * self.size_q for i, s in enumerate(self.samples)):
            yield Block(slice(first, first + len(self.samples) * self.size_q), self.size_q, None)
        else:
            starts, sizes = torch.tensor([(s.start_q, s.size_q) for s in self.samples], device=self.device).T
            position = torch.arange(self.size_q, device=self.device)
            padding = position >= sizes[:, None]
            rows = (starts[:, None] + position).masked_fill_(padding, 0).flatten()
            padded = any(s.size_q != self.size_q for s in self.samples)
            yield Block(rows, self.size_q, padding if padded else None)


def find_groups(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_modalities: int, active: Tensor | None, heads: int
) -> list[Group]:
    """Group the samples that have a query and a key.

    Args:
        cu_seqlens_q, cu_seqlens_k: [B+1] and [B*M+1], of `fusedmm.ModalityLayout`.
        active: [B, Hq, M] bool or None; segments that no head reads count as empty.
        heads: Hq.
    """
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    read = None if active is None else active.any(1).tolist()
    samples = []
    for index in range(len(bounds_q) - 1):
        bounds = bounds_k[index * num_modalities : (index + 1) * num_modalities + 1]
        sizes = [end - start for start, end in pairwise(bounds)]
        if read is not None:
            sizes = [size if on else 0 for size, on in zip(sizes, read[index], strict=True)]
        size_q = bounds_q[index + 1] - bounds_q[index]
        if size_q and any(sizes):
            samples.append(Sample(index, bounds_q[index], size_q, tuple(bounds[:-1]), tuple(sizes)))
    samples.sort(key=lambda s: (sum(s.sizes_k), s.sizes_k, s.size_q), reverse=True)
    return [Group(*group, cu_seqlens_q.device) for group in _gather(samples, heads)]


def _gather(samples: list[Sample], heads: int) -> Iterator[tuple[list[Sample], int, Lengths]]:
    """Samples to pad together, their most queries and widths: neighbours in size, while padding costs less than another
    group.
    """
    members: list[Sample] = []
    size_q, cost = 0, 0
    widths: Lengths = ()
    for sample in samples:
        alone = heads * sample.size_q * sum(sample.sizes_k)
        next_q, next_widths = max(size_q, sample.size_q), sample.sizes_k
        if members and widths != next_widths:
            next_widths = tuple(map(max, widths, next_widths))
        joined = heads * (len(members) + 1) * next_q * sum(next_widths)
        if members and joined <= min(BLOCK_SCORES, cost + alone + GROUP_COST):
            members.append(sample)
            size_q, widths, cost = next_q, next_widths, joined
        else:
            if members:
                yield members, size_q, widths
            members, size_q, widths, cost = [sample], sample.size_q, sample.sizes_k, alone
    if members:
        yield members, size_q, widths
