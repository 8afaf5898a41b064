"""Fewer, longer tokens: runs of consecutive tokens become one before anything is fitted.

A sentence says little about a quarter; 32 of them, as one text, are weighted and projected together, and what is common
to them stands out. Numbers are averaged. The token of a run is knowable when its last member is.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusedmm.train.dataset import Dataset, Float32Array, Int64Array, TokenTable


def pool_dataset(dataset: Dataset, names: Sequence[str], run: int) -> Dataset:
    """The data set with every ``run`` consecutive tokens of a sample merged, in the named modalities.

    Args:
        dataset: as `read_dataset` returns it.
        names: modalities to pool.
        run: tokens that become one, the last run of a sample may be shorter.

    Raises:
        ValueError: for an unknown modality.
    """
    for name in names:
        if name not in dataset.tokens:
            raise ValueError(f"pool_dataset: names must be among {', '.join(dataset.tokens)}, got {name!r}.")
    return replace(dataset, tokens=dataset.tokens | {name: _pooled(dataset.tokens[name], run) for name in names})


def _pooled(table: TokenTable, run: int) -> TokenTable:
    lengths = np.diff(table.offsets)
    runs = -(-lengths // run)  # of each sample
    offsets = np.concatenate([[0], np.cumsum(runs)]).astype(np.int64)
    number = np.arange(offsets[-1]) - np.repeat(offsets[:-1], runs)  # of each run within its sample
    starts = np.repeat(table.offsets[:-1], runs) + number * run
    stops = np.minimum(starts + run, np.repeat(table.offsets[1:], runs))
    return TokenTable(
        time=table.time[stops - 1],
        values=None if table.values is None else _means(table.values, starts, stops),
        text=None if table.text is None else _joined(table.text, starts, stops),
        offsets=offsets,
    )


def _means(values: Float32Array, starts: Int64Array, stops: Int64Array) -> Float32Array:
    """Mean of what is defined in each run [starts, stops) of rows [T, F]; NaN where nothing is."""
    defined: npt.NDArray[np.bool_] = ~np.isnan(values)
    total = _prefix(np.where(defined, values, 0.0).astype(np.float64))
    count = _prefix(defined.astype(np.float64))
    with np.errstate(invalid="ignore"):
        mean = (total[stops] - total[starts]) / (count[stops] - count[starts])
    return mean.astype(np.float32)


def _prefix(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])


def _joined(text: pa.Array, starts: Int64Array, stops: Int64Array) -> pa.Array:
    strings = text.to_pylist()
    return pa.array([" ".join(strings[a:b]) for a, b in zip(starts, stops, strict=True)], pa.large_string())
