"""A data set in memory: one row a sample, and for each modality tokens that a sample's offsets slice."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

FORMAT_VERSION = 1
SECONDS_PER_DAY = 86_400

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ModalityInfo:
    """What one modality's tokens are."""

    kind: str
    units: tuple[str, ...] = ()
    notes: str = ""


@dataclass(frozen=True)
class DatasetInfo:
    """What ``dataset.json`` says; the order of ``modalities`` is their order everywhere.

    ``persistence`` names the ``past_`` column that, unchanged, is a forecast of every target.
    """

    name: str
    task: str
    source: str
    licence: str
    modalities: dict[str, ModalityInfo]
    classes: int | None = None
    persistence: str | None = None
    time_unit: str = "second"
    format: int = FORMAT_VERSION


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one modality, sorted by sample row, then by time.

    Attributes:
        time: [T] int64, when each token was knowable.
        values: [T, F] float32, NaN where undefined; None for text.
        text: the sentences; None unless the kind is text.
        offsets: [N+1] int64: the tokens of sample row i are ``offsets[i]:offsets[i + 1]``.
    """

    time: Int64Array
    values: Float32Array | None
    text: pa.Array | None
    offsets: Int64Array


@dataclass(frozen=True)
class Dataset:
    """A checked data set: row i of ``samples`` has the tokens ``tokens[m].offsets[i]:tokens[m].offsets[i + 1]``."""

    info: DatasetInfo
    samples: pd.DataFrame
    tokens: dict[str, TokenTable]

    def columns(self, prefix: str) -> list[str]:
        """Names of the sample columns that start with ``prefix``, in the file's order."""
        return [name for name in self.samples.columns if name.startswith(prefix)]

    def matrix(self, prefix: str) -> Float64Array:
        """The columns that start with ``prefix`` as one array [N, number of columns]."""
        values: Float64Array = self.samples[self.columns(prefix)].to_numpy(np.float64)
        return values
