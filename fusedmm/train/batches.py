"""Samples to padded batches, and samplers without state: what a step sees depends on (seed, step) alone.

The global batch of a step is the same whatever the number of ranks, so a run that resumes on twice the GPUs sees the
same data; the only data state of a checkpoint is the step number.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedmm.train.dataset import Int64Array
from fusedmm.train.features import Features


class Sample(NamedTuple):
    """One forecast: for each modality ``tokens`` [L, F] float32 and ``times`` [L] int64 in time order; ``targets`` [T],
    ``past`` [P]; ints."""

    tokens: dict[str, Tensor]
    times: dict[str, Tensor]
    time: int
    targets: Tensor
    past: Tensor
    sample: int


class Batch(NamedTuple):
    """B samples, padded; the fields' shapes stand in ``docs/data-format.md``."""

    tokens: dict[str, Tensor]  # [B, L_m, F_m] float32
    masks: dict[str, Tensor]  # [B, L_m] bool
    times: dict[str, Tensor]  # [B, L_m] int64
    time: Tensor  # [B] int64
    targets: Tensor  # [B, T] float32, or [B, 1] int64
    past: Tensor  # [B, P] float32
    sample: Tensor  # [B] int64

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``; copies do not wait where the memory is pinned."""

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        dense = (tensor.to(device, non_blocking=True) for tensor in self[3:])
        return Batch(move(self.tokens), move(self.masks), move(self.times), *dense)


class MultimodalDataset(torch.utils.data.Dataset[Sample]):
    """The rows of one split.

    Args:
        features: as `Featurizer.transform` returns them; shared between splits, not copied.
        rows: [n] int64, row numbers.
        max_tokens: for a modality the most tokens of a sample; the latest are kept. Modalities not named keep all.

    Raises:
        ValueError: for an unknown modality, a cap below 1, or rows outside the features.
    """

    def __init__(self, features: Features, rows: Int64Array, max_tokens: Mapping[str, int] | None = None) -> None:
        self.features = features
        self.rows = np.asarray(rows, np.int64)
        self.max_tokens = dict(max_tokens or {})
        for name, cap in self.max_tokens.items():
            if name not in features.tokens:
                known = ", ".join(features.names)
                raise ValueError(
                    f"MultimodalDataset: max_tokens must name modalities of the data ({known}), got {name!r}."
                )
            if cap < 1:
                raise ValueError(f"MultimodalDataset: max_tokens[{name!r}] must be at least 1, got {cap}.")
        if len(self.rows) and (self.rows.min() < 0 or self.rows.max() >= len(features.sample)):
            raise ValueError(
                f"MultimodalDataset: rows must be from 0 to {len(features.sample) - 1}, "
                f"got {self.rows.min()} to {self.rows.max()}."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        tokens, times = {}, {}
        for name, table in self.features.tokens.items():
            start, stop = int(table.offsets[row]), int(table.offsets[row + 1])
            start = max(start, stop - self.max_tokens.get(name, stop - start))
            tokens[name] = torch.from_numpy(table.values[start:stop])
            times[name] = torch.from_numpy(table.time[start:stop])
        return Sample(
            tokens=tokens,
            times=times,
            time=int(self.features.time[row]),
            targets=torch.from_numpy(self.features.targets[row]),
            past=torch.from_numpy(self.features.past[row]),
            sample=int(self.features.sample[row]),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad to the longest of each modality: tokens with 0, times with the sample's own time; a modality that nobody has
    is [B, 0, F].

    Raises:
        ValueError: for no samples.
    """
    if not samples:
        raise ValueError("collate: samples must hold at least one sample, got none.")
    tokens, masks, times = {}, {}, {}
    time = torch.tensor([sample.time for sample in samples], dtype=torch.int64)
    for name, first in samples[0].tokens.items():
        lengths = torch.tensor([len(sample.tokens[name]) for sample in samples])
        longest = int(lengths.max())
        masks[name] = torch.arange(longest) < lengths[:, None]
        tokens[name] = first.new_zeros(len(samples), longest, first.shape[1])
        times[name] = time[:, None].repeat(1, longest)
        for row, sample in enumerate(samples):
            tokens[name][row, : lengths[row]] = sample.tokens[name]
            times[name][row, : lengths[row]] = sample.times[name]
    return Batch(
        tokens=tokens,
        masks=masks,
        times=times,
        time=time,
        targets=torch.stack([sample.targets for sample in samples]),
        past=torch.stack([sample.past for sample in samples]),
        sample=torch.tensor([sample.sample for sample in samples], dtype=torch.int64),
    )


class BatchSampler:
    """Which rows a step trains on: epochs of seeded permutations, the ragged rest of an epoch dropped.

    Args:
        num_rows: rows of the train split.
        batch_size: of all ranks together.
        seed: of the permutations.
        rank, world_size: this process, and how many share a batch.

    Raises:
        ValueError: where the batch does not divide by the ranks, or is larger than the split.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or batch_size % world_size != 0:
            raise ValueError(
                f"BatchSampler: batch_size must be a positive multiple of world_size={world_size}, got {batch_size}."
            )
        if num_rows < batch_size:
            raise ValueError(
                f"BatchSampler: num_rows must be at least batch_size={batch_size}, got {num_rows}. Use a smaller batch."
            )
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = num_rows // batch_size

    def global_indices(self, step: int) -> Int64Array:
        """The whole batch of a step: [batch_size] int64, from 0 to num_rows - 1."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def indices(self, step: int) -> Int64Array:
        """This rank's share of a step's batch: [batch_size / world_size] int64."""
        return self.global_indices(step)[self.rank :: self.world_size]


def evaluation_batches(num_rows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Int64Array]:
    """All rows in order, in equally many batches for each rank (collectives must match); the tail repeats the last row.

    Args:
        num_rows: rows of the split.
        batch_size: of one rank, at most.
        rank, world_size: this process, and how many share the work.

    Returns:
        Row numbers; gather predictions by ``Batch.sample``, which makes the repeats harmless. Empty for no rows.
    """
    if num_rows == 0:
        return []
    rounds = -(-num_rows // (batch_size * world_size))
    size = -(-num_rows // (rounds * world_size))
    padded = np.minimum(np.arange(rounds * world_size * size, dtype=np.int64), num_rows - 1)
    return list(padded.reshape(rounds, world_size, size)[:, rank])
