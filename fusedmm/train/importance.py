"""Which modality earned what: the loss without it, the attention it got, and, where the data is simulated, the truth.

Attention mass says where a model looks, not what it needs; hiding a modality says what it needs. Both are in the
report, and both are checked against the known importances of a simulated market.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from fusedmm.train.dataset import Float64Array
from fusedmm.train.task import Task

NOISE_SHARE = 0.01
"""Known importance under which a modality counts as noise."""
RANK_CORRELATION = 0.6
"""A regime's rank correlation of measured with known importance that passes."""
RESOLUTION = 0.05
"""Shares of importance are compared in steps of this size: a few hundred rows cannot rank 2 % above 0."""
NOISE_LIMIT = 0.05
"""Share of the measured importance that noise modalities may have together."""


class ModalityUse(NamedTuple):
    """How a model uses its M modalities on a group of test rows: all of them, or a regime."""

    group: str
    rows: int
    names: tuple[str, ...]
    mass: Float64Array
    """[M] mean attention mass."""
    importance: Float64Array
    """[M] rise of the mean loss when the modality is hidden: squared error, or negative log-likelihood."""
    known: Float64Array | None
    """[M] mean known importance; None where the data is real."""


class Check(NamedTuple):
    """One line of the report that can fail."""

    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.text}"


def sample_loss(task: Task, prediction: npt.NDArray[np.floating[Any]]) -> Float64Array:
    """Loss of each test row [n] from predicted values [n, T], or from class probabilities."""
    targets = task.features.targets[task.rows.test]
    if task.classes:
        picked = np.take_along_axis(prediction, targets.astype(np.int64), axis=1)[:, 0].astype(np.float64)
        return -np.log(np.maximum(picked, 1e-12))
    loss: Float64Array = np.square(prediction.astype(np.float64) - targets).mean(axis=1)
    return loss


def modality_use(
    task: Task,
    names: Sequence[str],
    prediction: npt.NDArray[np.floating[Any]],
    mass: npt.NDArray[np.floating[Any]],
    hidden: npt.NDArray[np.floating[Any]],
) -> list[ModalityUse]:
    """Use of each modality over all test rows, then by the column ``regime`` if the samples have one.

    Args:
        task: data and split.
        names: M modalities of the model.
        prediction: [n, T] on the test rows (probabilities where the targets are classes).
        mass: [n, M].
        hidden: [M, n, T], predictions with one modality hidden.
    """
    samples = task.dataset.samples.iloc[task.rows.test]
    rise = np.stack([sample_loss(task, without) for without in hidden], axis=1) - sample_loss(task, prediction)[:, None]
    columns = [f"importance_{name}" for name in names]
    known = samples[columns].to_numpy(np.float64) if set(columns) <= set(samples.columns) else None
    groups: dict[str, npt.NDArray[np.bool_]] = {"all": np.ones(len(samples), bool)}
    if "regime" in samples.columns:
        regime = samples["regime"].astype(str).to_numpy()
        groups |= {str(value): regime == value for value in np.unique(regime)}
    return [
        ModalityUse(
            group,
            int(rows.sum()),
            tuple(names),
            mass[rows].astype(np.float64).mean(axis=0),
            rise[rows].mean(axis=0),
            None if known is None else known[rows].mean(axis=0),
        )
        for group, rows in groups.items()
    ]


def checks_against_truth(uses: Sequence[ModalityUse]) -> list[Check]:
    """Compare measured with known importance by regime; nothing to check without a truth."""
    checks = []
    regimes = [use for use in uses if use.group != "all"] or list(uses)
    for use in regimes:
        if use.known is None:
            return []
        rank = rank_correlation(use.importance, use.known)
        leader, truth = use.names[int(use.importance.argmax())], use.names[int(use.known.argmax())]
        text = f"regime {use.group}: most important is {leader} (truth: {truth}), rank correlation {rank:.2f}"
        checks.append(Check(leader == truth and rank >= RANK_CORRELATION, f"{text} (at least {RANK_CORRELATION})"))
    known = uses[0].known
    assert known is not None
    noise = [name for name, share in zip(uses[0].names, known, strict=True) if share < NOISE_SHARE]
    if noise:
        positive = uses[0].importance.clip(min=0.0)
        share = sum(positive[uses[0].names.index(name)] for name in noise) / max(positive.sum(), 1e-12)
        text = f"noise modalities {', '.join(noise)} have {share:.1%} of the importance (at most {NOISE_LIMIT:.0%})"
        checks.append(Check(bool(share <= NOISE_LIMIT), text))
    return checks + _mass_checks(regimes)


def check_filter(use: ModalityUse, switched_off: Mapping[str, int], runs: int) -> Check:
    """The filter switched off the noise in every run, and nothing else in any."""
    assert use.known is not None
    noise = {name for name, share in zip(use.names, use.known, strict=True) if share < NOISE_SHARE}
    passed = all(count == (runs if name in noise else 0) for name, count in switched_off.items())
    gone = ", ".join(name for name, count in switched_off.items() if count)
    return Check(
        passed, f"the filter switched off {gone or 'nothing'} (truth: {', '.join(sorted(noise)) or 'nothing'})"
    )


def rank_correlation(measured: Float64Array, known: Float64Array) -> float:
    """Spearman's, over modalities, of shares in steps of `RESOLUTION`; 0 where all measured shares are alike."""
    ranks = []
    for values in (measured, known):
        positive = values.clip(min=0.0)
        ranks.append(rankdata(np.rint(positive / max(positive.sum(), 1e-12) / RESOLUTION)))
    if np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _mass_checks(regimes: Sequence[ModalityUse]) -> list[Check]:
    """A modality that leads one regime gets more attention there than elsewhere."""
    checks = []
    for use in regimes if len(regimes) > 1 else []:
        assert use.known is not None
        leader = int(use.known.argmax())
        elsewhere = float(np.mean([other.mass[leader] for other in regimes if other.group != use.group]))
        here, name = float(use.mass[leader]), use.names[leader]
        text = f"regime {use.group}: attention to {name} is {here:.3f}, elsewhere {elsewhere:.3f}"
        checks.append(Check(here > elsewhere, text))
    return checks
