"""Intervals that respect days: whole days are resampled, because the samples of a day share its news.

Every statistic here is a function of sums over days, so a resample costs one sum over days, whatever the number of
samples. Library: ``arch``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from arch.bootstrap import StationaryBootstrap

from fusedmm.train.dataset import Float64Array


class Interval(NamedTuple):
    """A statistic with its percentile interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Bootstrap:
    """The stationary bootstrap over days.

    Attributes:
        block_days: expected length of a resampled run of days; 1 resamples single days. Use more where labels of
            neighbouring days overlap.
        resamples: bootstrap samples.
        level: share of them that an interval covers.
        seed: the same seed gives the same interval.
    """

    block_days: int = 1
    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def mean(self, values: npt.ArrayLike, day: npt.ArrayLike) -> Interval:
        """Mean of per-sample values with its interval: a loss, a hit, or a difference of two models' losses.

        Args:
            values: [N], or [N, T] averaged over T.
            day: [N] integers.

        Raises:
            ValueError: for no samples, or lengths that disagree.
        """
        values = np.asarray(values, np.float64)
        per_sample = values.reshape(len(values), -1).mean(axis=1) if len(values) else values
        sums = _day_sums(np.stack([per_sample, np.ones(len(per_sample))], axis=1), day, "Bootstrap.mean")
        return self._interval(sums, lambda total: float(total[0] / total[1]))

    def paired(self, loss: npt.ArrayLike, reference_loss: npt.ArrayLike, day: npt.ArrayLike) -> Interval:
        """Mean of ``loss - reference_loss``, sample by sample: an interval below 0 says that the model is better than
        the reference.

        Args and errors as for `mean`.
        """
        loss, reference_loss = np.asarray(loss, np.float64), np.asarray(reference_loss, np.float64)
        if loss.shape != reference_loss.shape:
            raise ValueError(
                f"Bootstrap.paired: reference_loss must have the shape of loss {loss.shape}, got "
                f"{reference_loss.shape}."
            )
        return self.mean(loss - reference_loss, day)

    def correlation(
        self, predicted: npt.ArrayLike, truth: npt.ArrayLike, day: npt.ArrayLike, *, classes: int
    ) -> Interval:
        """Matthews correlation of classes [N] with its interval, from each day's confusion counts; errors as for
        `mean`.
        """
        predicted, truth = np.asarray(predicted, np.int64), np.asarray(truth, np.int64)
        one_hot = np.eye(classes * classes)[truth * classes + predicted]
        sums = _day_sums(one_hot, day, "Bootstrap.correlation")
        return self._interval(sums, lambda total: matthews_correlation(total.reshape(classes, classes)))

    def _interval(self, sums: Float64Array, statistic: Callable[[Float64Array], float]) -> Interval:
        """The statistic of sums [days, K] over all days, and its percentiles over resampled days."""
        bootstrap = StationaryBootstrap(self.block_days, sums, seed=np.random.default_rng(self.seed))
        bounds = bootstrap.conf_int(
            lambda days: np.array([statistic(days.sum(axis=0))]), self.resamples, method="percentile", size=self.level
        )
        return Interval(statistic(sums.sum(axis=0)), float(bounds[0, 0]), float(bounds[1, 0]))


def matthews_correlation(confusion: Float64Array) -> float:
    """Of a confusion matrix [truth, predicted]; 0 where either side has one class only (Gorodkin 2004)."""
    total, hits = confusion.sum(), np.trace(confusion)
    truth, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    spread = (total**2 - (truth**2).sum()) * (total**2 - (predicted**2).sum())
    return float((hits * total - truth @ predicted) / np.sqrt(spread)) if spread > 0 else 0.0


def _day_sums(rows: Float64Array, day: npt.ArrayLike, op: str) -> Float64Array:
    """Sums [days, K] of rows [N, K], days in order."""
    days = np.asarray(day)
    if len(days) != len(rows):
        raise ValueError(f"{op}: day must have one entry a sample ({len(rows)}), got {len(days)}.")
    if len(rows) == 0:
        raise ValueError(f"{op}: values must hold at least one sample, got none.")
    unique, index = np.unique(days, return_inverse=True)
    sums = np.zeros((len(unique), rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums
