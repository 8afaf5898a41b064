"""Modality dropout: random, yet the same for a sample and a step on whatever rank they meet."""

from torch import Tensor

from fusedmm.train.batches import Batch


def hide_modalities(batch: Batch, rate: float, seed: int, step: int) -> Batch:
    """The batch with each modality of each sample hidden with probability ``rate``, independently."""
    if rate == 0.0:
        return batch
    masks = {}
    for number, (name, mask) in enumerate(batch.masks.items()):
        masks[name] = mask & (uniform_hash(batch.sample, seed, step, number) >= rate)[:, None]
    return batch._replace(masks=masks)


def uniform_hash(sample: Tensor, seed: int, step: int, number: int) -> Tensor:
    """A uniform number in [0, 1) for each sample key, [B] float64: the same on whatever rank the sample lands
    (splitmix64).
    """
    key = (seed * 1_000_003 + step) * 0x3C6EF372FE94F82A + number * 0x9E3779B97F4A7C15
    state = sample * -7046029254386353131 + ((key + 2**63) % 2**64 - 2**63)
    state = (state ^ _shifted(state, 30)) * -4658895280553007687
    state = (state ^ _shifted(state, 27)) * -7723592293110705685
    return _shifted(state ^ _shifted(state, 31), 11).double() / 2**53


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; int64's own shift fills with the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
