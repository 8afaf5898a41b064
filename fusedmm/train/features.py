"""Every modality as float32 vectors: scales, vocabulary and projections are fitted on train rows and then applied to
all rows.

`Featurizer.fit` never sees a row that is not in ``train``; a test changes all other rows and finds the same featurizer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusedmm.train.dataset import Dataset, Float32Array, Int64Array, TokenTable
from fusedmm.train.text import HashingEncoder, ModelEncoder, model_embeddings

FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]

# Evenly spread over train: more would move a median by less than 0.3 % of the spread, and an SVD's error as little.
FIT_TOKENS = 200_000
FIT_SENTENCES = 40_000
NORMAL_IQR = 1.349  # interquartile range of a standard normal variable


@dataclass(frozen=True)
class FeatureConfig:
    """How tokens become vectors."""

    text_dim: int = 32
    """Size of a sentence's vector."""
    text_buckets: int = 2**14
    """Buckets of the hashed words."""
    text_model: str = ""
    """Name or path of a sentence-transformers model; empty: hashed words, which need none."""
    text_cache: str = ""
    """Directory where a model's embeddings are kept; empty: they are computed every time."""
    clip: float = 5.0
    """Scaled values are cut here: an unadjusted spin-off must not outweigh a year of bars."""
    seed: int = 0
    """Of the randomized projections."""


@dataclass(frozen=True)
class Scaler:
    """``clip((x - center) / scale)``, with 0 for what is undefined.

    Attributes:
        center, scale: [F] float32.
        clip: in scaled units.
    """

    center: Float32Array
    scale: Float32Array
    clip: float

    @classmethod
    def fit_robust(cls, values: FloatArray, clip: float) -> "Scaler":
        """Median and interquartile range of each column [T, F], so that a few outliers move neither; NaN is skipped."""
        center, scale = np.zeros(values.shape[1]), np.ones(values.shape[1])
        for column in range(values.shape[1]):
            defined = values[:, column][~np.isnan(values[:, column])].astype(np.float64)
            if defined.size == 0:
                continue
            low, center[column], high = np.quantile(defined, [0.25, 0.5, 0.75])
            spread = (high - low) / NORMAL_IQR or float(defined.std())
            scale[column] = spread if spread > 1e-12 else 1.0
        return cls(center.astype(np.float32), scale.astype(np.float32), clip)

    @classmethod
    def fit_image(cls, values: FloatArray, clip: float) -> "Scaler":
        """Mean of each pixel, one spread for all: a pixel that is nearly always dark must not be blown up."""
        pixels = np.nan_to_num(values.astype(np.float64))
        center = pixels.mean(axis=0) if len(pixels) else np.zeros(pixels.shape[1])
        spread = float((pixels - center).std()) if len(pixels) else 0.0
        scale = np.full(pixels.shape[1], spread if spread > 1e-12 else 1.0, np.float32)
        return cls(center.astype(np.float32), scale, clip)

    def transform(self, values: FloatArray) -> Float32Array:
        """[T, F] to [T, F] float32, finite."""
        # A copy, changed in place: an image modality has millions of rows.
        scaled: Float32Array = values.astype(np.float32)
        scaled -= self.center
        scaled /= self.scale
        np.clip(scaled, -self.clip, self.clip, out=scaled)
        np.nan_to_num(scaled, copy=False, nan=0.0)
        return scaled


@dataclass(frozen=True)
class FeatureTable:
    """One modality: ``time`` [T] int64, ``values`` [T, F] float32, and ``offsets`` [N+1] int64 by sample row."""

    time: Int64Array
    values: Float32Array
    offsets: Int64Array


@dataclass(frozen=True)
class Features:
    """A data set ready for batches; row i of every array is row i of ``Dataset.samples``.

    Attributes:
        tokens: for each modality its vectors.
        sample, time: [N] int64.
        targets: [N, T] float32 in original units, or [N, 1] int64 classes.
        past: [N, P] float32, scaled on train.
        target_mean, target_std: [T] float32 of the train rows; zeros and ones in a classification.
        classes: number of classes, None in a regression.
    """

    tokens: dict[str, FeatureTable]
    sample: Int64Array
    time: Int64Array
    targets: npt.NDArray[np.float32] | Int64Array
    past: Float32Array
    target_names: tuple[str, ...]
    past_names: tuple[str, ...]
    target_mean: Float32Array
    target_std: Float32Array
    classes: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities in order."""
        return tuple(self.tokens)

    @property
    def widths(self) -> dict[str, int]:
        """Size of a token's vector, for each modality."""
        return {name: table.values.shape[1] for name, table in self.tokens.items()}


@dataclass(frozen=True)
class Featurizer:
    """What was fitted on the train rows."""

    config: FeatureConfig
    scalers: dict[str, Scaler]
    encoders: dict[str, HashingEncoder | ModelEncoder]
    past: Scaler
    target_mean: Float32Array
    target_std: Float32Array

    @classmethod
    def fit(cls, dataset: Dataset, train: Int64Array, config: FeatureConfig = FeatureConfig()) -> "Featurizer":
        """Fit scales, vocabulary weights and projections.

        Args:
            dataset: as `read_dataset` returns it.
            train: [n] int64, row numbers of ``dataset.samples``.
            config: sizes and choices.

        Raises:
            ValueError: without train rows, or where a text modality has no train sentence.
        """
        if len(train) == 0:
            raise ValueError(
                "Featurizer.fit: train must have at least one row, got 0. Move train_end, or shorten the embargo."
            )
        scalers: dict[str, Scaler] = {}
        encoders: dict[str, HashingEncoder | ModelEncoder] = {}
        for name, modality in dataset.info.modalities.items():
            table = dataset.tokens[name]
            rows = token_rows(table.offsets, train)
            if modality.kind == "text":
                encoders[name] = _fit_text(name, table, rows, config)
            else:
                assert table.values is not None
                fit = Scaler.fit_image if modality.kind == "image" else Scaler.fit_robust
                scalers[name] = fit(table.values[spread(rows, FIT_TOKENS)], config.clip)
        targets = dataset.matrix("target_")[train]
        regression = dataset.info.task == "regression"
        mean = targets.mean(axis=0) if regression else np.zeros(targets.shape[1])
        std = np.maximum(targets.std(axis=0), 1e-6) if regression else np.ones(targets.shape[1])
        past = Scaler.fit_robust(dataset.matrix("past_")[train], config.clip)
        return cls(config, scalers, encoders, past, mean.astype(np.float32), std.astype(np.float32))

    def transform(self, dataset: Dataset) -> Features:
        """Every row of the data set as float32 vectors; MAEC (2,800 calls, 285,000 sentences) takes about 3 s."""
        tokens = {}
        for name in dataset.info.modalities:
            table = dataset.tokens[name]
            if name in self.encoders:
                values = self._encode(name, table)
            else:
                assert table.values is not None
                values = self.scalers[name].transform(table.values)
            # Copied: torch wants memory that it may write to, which pandas and pyarrow do not give.
            tokens[name] = FeatureTable(time=table.time.copy(), values=values, offsets=table.offsets)
        classification = dataset.info.task == "classification"
        targets = dataset.matrix("target_")
        return Features(
            tokens=tokens,
            sample=dataset.samples["sample"].to_numpy(np.int64),
            time=dataset.samples["time"].to_numpy(np.int64),
            targets=targets.astype(np.int64) if classification else targets.astype(np.float32),
            past=self.past.transform(dataset.matrix("past_")),
            target_names=tuple(name.removeprefix("target_") for name in dataset.columns("target_")),
            past_names=tuple(name.removeprefix("past_") for name in dataset.columns("past_")),
            target_mean=self.target_mean,
            target_std=self.target_std,
            classes=dataset.info.classes if classification else None,
        )

    def _encode(self, name: str, table: TokenTable) -> Float32Array:
        encoder = self.encoders[name]
        if isinstance(encoder, ModelEncoder):
            encoded = encoder.transform(_embeddings(table, self.config))
        else:
            encoded = encoder.transform(_strings(table))
        return np.clip(encoded, -self.config.clip, self.config.clip)


def token_rows(offsets: Int64Array, rows: Int64Array) -> Int64Array:
    """Token numbers of the given sample rows, in their order: the concatenation of ``arange(offsets[r], offsets[r +
    1])``."""
    lengths = offsets[rows + 1] - offsets[rows]
    starts = np.cumsum(lengths) - lengths
    numbers: Int64Array = np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(offsets[rows] - starts, lengths)
    return numbers


def spread(rows: Int64Array, count: int) -> Int64Array:
    """At most ``count`` of the rows, evenly spread over them."""
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _strings(table: TokenTable) -> list[str]:
    assert table.text is not None
    strings: list[str] = table.text.to_pylist()
    return strings


def _embeddings(table: TokenTable, config: FeatureConfig) -> Float32Array:
    return model_embeddings(_strings(table), config.text_model, Path(config.text_cache) if config.text_cache else None)


def _fit_text(name: str, table: TokenTable, rows: Int64Array, config: FeatureConfig) -> HashingEncoder | ModelEncoder:
    if len(rows) == 0:
        raise ValueError(
            f"Featurizer.fit: modality {name} must have a sentence on the train rows, got none. "
            "Remove it from dataset.json, or move train_end."
        )
    rows = spread(rows, FIT_SENTENCES)
    if config.text_model:
        return ModelEncoder.fit(_embeddings(table, config)[rows], dim=config.text_dim, seed=config.seed)
    assert table.text is not None
    sentences = table.text.take(pa.array(rows)).to_pylist()
    return HashingEncoder.fit(sentences, dim=config.text_dim, buckets=config.text_buckets, seed=config.seed)
