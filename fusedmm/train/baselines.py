"""What simple models reach, in the same table as the networks: a fusion that does not beat ridge on past volatility has
learned nothing from text.

Regression: the train mean; persistence (a past column as it is); ridge on the ``past_`` columns, and on the
``callday_`` columns, which hold the bar of the day itself. Simulated data: the oracle, which nothing can beat.
Classification: the majority; logistic regression. All are fitted on train rows, tuned on dev rows and scored on test
rows.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fusedmm.train.bootstrap import Bootstrap, Interval
from fusedmm.train.dataset import Dataset, Float64Array
from fusedmm.train.format import read_dataset
from fusedmm.train.splits import Split, split_by_date

# Against collinear columns. A hundred times more shrinks to the train mean, which a short dev part can take for skill:
# MAEC's 206 dev calls choose 1,000, and ridge falls from .296 to .32 on the test. This grid is the stronger baseline.
PENALTIES = (0.01, 0.1, 1.0, 10.0)


class Forecast(NamedTuple):
    """A model's answer on the test rows: [n, T] float64 values, or [n, 1] classes."""

    name: str
    prediction: Float64Array


class Score(NamedTuple):
    """A row of the table.

    Attributes:
        name: of the model.
        parts: MSE of each target; in a classification the accuracy.
        headline: mean MSE over the targets, or accuracy.
        correlation: Matthews correlation, in a classification.
        paired: mean difference of losses to the reference, below 0 is better; None for the reference itself.
    """

    name: str
    parts: tuple[float, ...]
    headline: Interval
    correlation: Interval | None
    paired: Interval | None


def baseline_forecasts(dataset: Dataset, split: Split) -> list[Forecast]:
    """Every baseline that the data's columns allow; "ridge" (or "logistic") is there whenever there are ``past_``
    columns.

    Args:
        dataset: as `read_dataset` returns it.
        split: rows to fit on, to tune on and to forecast.
    """
    targets = dataset.matrix("target_")
    past_sets = {"": dataset.matrix("past_"), ", call day too": dataset.matrix("callday_")}
    if dataset.info.task == "classification":
        counts = np.bincount(targets[split.train, 0].astype(np.int64), minlength=dataset.info.classes or 0)
        forecasts = [Forecast("majority", np.full((len(split.test), 1), float(counts.argmax())))]
        fits = [
            (f"logistic{suffix}", _logistic(past, targets, split))
            for suffix, past in past_sets.items()
            if past.shape[1]
        ]
        return forecasts + [Forecast(name, prediction) for name, prediction in fits]
    forecasts = [
        Forecast("train mean", np.broadcast_to(targets[split.train].mean(axis=0), (len(split.test), targets.shape[1])))
    ]
    if dataset.info.persistence is not None:
        columns = {
            "": dataset.info.persistence,
            ", call day too": dataset.info.persistence.replace("past_", "callday_", 1),
        }
        for suffix, column in columns.items():
            if column in dataset.samples:
                last = dataset.samples[column].to_numpy(np.float64)[split.test, None]
                forecasts.append(
                    Forecast(f"persistence{suffix}", np.broadcast_to(last, (len(split.test), targets.shape[1])))
                )
    forecasts += [
        Forecast(f"ridge{suffix}", _ridge(past, targets, split)) for suffix, past in past_sets.items() if past.shape[1]
    ]
    oracle = dataset.matrix("oracle_")
    if oracle.shape[1]:
        forecasts.append(Forecast("oracle", oracle[split.test]))
    return forecasts


def score_forecasts(
    dataset: Dataset,
    split: Split,
    forecasts: Sequence[Forecast],
    reference: str,
    bootstrap: Bootstrap,
) -> list[Score]:
    """Score forecasts on the test rows, with day-block intervals, each paired against ``reference``.

    Args:
        dataset, split: what was forecast.
        forecasts: baselines and models, rows as in ``split.test``.
        reference: name of one of them, with which the others are paired.
        bootstrap: of the intervals.

    Raises:
        ValueError: for an unknown reference or a forecast of another shape.
    """
    names = [forecast.name for forecast in forecasts]
    if reference not in names:
        raise ValueError(f"score_forecasts: reference must be one of {', '.join(names)}, got {reference!r}.")
    targets = dataset.matrix("target_")[split.test]
    day = dataset.samples["day"].to_numpy(np.int64)[split.test]
    classification = dataset.info.task == "classification"
    losses = {}
    for forecast in forecasts:
        if forecast.prediction.shape != targets.shape:
            rule = f"score_forecasts: prediction of {forecast.name!r} must have shape {targets.shape}"
            raise ValueError(f"{rule}, got {forecast.prediction.shape}.")
        error = forecast.prediction - targets
        losses[forecast.name] = (error != 0).astype(np.float64) if classification else error**2
    scores = []
    for forecast in forecasts:
        loss = losses[forecast.name]
        measured = 1 - loss if classification else loss
        correlation = None
        if classification:
            classes = dataset.info.classes or 0
            correlation = bootstrap.correlation(forecast.prediction[:, 0], targets[:, 0], day, classes=classes)
        paired = None
        if forecast.name != reference:
            paired = bootstrap.paired(loss, losses[reference], day)
        headline = bootstrap.mean(measured, day)
        scores.append(Score(forecast.name, tuple(map(float, measured.mean(axis=0))), headline, correlation, paired))
    return scores


def format_table(dataset: Dataset, scores: Sequence[Score], reference: str) -> str:
    """The scores as a Markdown table."""
    classification = dataset.info.task == "classification"
    parts = [] if classification else [name.removeprefix("target_") for name in dataset.columns("target_")]
    measure = (
        ["accuracy [95 %]", "MCC [95 %]", f"error - {reference}'s [95 %]"]
        if classification
        else ["mean MSE [95 %]", f"minus {reference}'s [95 %]"]
    )
    lines = ["| model | " + " | ".join([*parts, *measure]) + " |", "|---" * (1 + len(parts) + len(measure)) + "|"]
    for score in scores:
        cells = [] if classification else [f"{value:.3f}" for value in score.parts]
        cells.append(str(score.headline))
        if classification:
            cells.append(str(score.correlation))
        cells.append("" if score.paired is None else str(score.paired))
        lines.append(f"| {score.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ridge(past: Float64Array, targets: Float64Array, split: Split) -> Float64Array:
    models = [
        make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit(past[split.train], targets[split.train])
        for alpha in PENALTIES
    ]
    errors = [
        float(((model.predict(past[split.dev]).reshape(-1, targets.shape[1]) - targets[split.dev]) ** 2).mean())
        for model in models
    ]
    prediction: Float64Array = models[int(np.argmin(errors))].predict(past[split.test])
    return prediction.reshape(-1, targets.shape[1])


def _logistic(past: Float64Array, targets: Float64Array, split: Split) -> Float64Array:
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=1 / alpha, max_iter=1000)).fit(
            past[split.train], targets[split.train, 0]
        )
        for alpha in PENALTIES
    ]
    hits = [float((model.predict(past[split.dev]) == targets[split.dev, 0]).mean()) for model in models]
    prediction: Float64Array = models[int(np.argmax(hits))].predict(past[split.test])
    return prediction[:, None]


def main() -> None:
    """``python -m fusedmm.train.baselines DATASET``: print the table of simple models."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedmm.train.baselines", description="What simple models reach on a prepared data set."
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument(
        "--train-end", metavar="DATE", help="last day of train, YYYY-MM-DD; without it: 70, 10 and 20 %% of the days"
    )
    parser.add_argument("--dev", nargs=2, metavar="DATE", default=(None, None), help="first and last day of dev")
    parser.add_argument("--test", nargs=2, metavar="DATE", default=(None, None), help="first and last day of the test")
    parser.add_argument("--embargo-days", type=int, default=0)
    parser.add_argument("--block-days", type=int, default=1, help="expected length of a resampled run of days")
    arguments = parser.parse_args()
    dataset = read_dataset(arguments.dataset)
    split = split_by_date(
        dataset.samples,
        train_end=arguments.train_end,
        dev_start=arguments.dev[0],
        dev_end=arguments.dev[1],
        test_start=arguments.test[0],
        test_end=arguments.test[1],
        embargo_days=arguments.embargo_days,
    )
    forecasts = baseline_forecasts(dataset, split)
    fitted = [forecast.name for forecast in forecasts if forecast.name in ("ridge", "logistic")]
    reference = fitted[0] if fitted else forecasts[0].name
    days = dataset.samples["day"].to_numpy()[split.test]
    print(
        f"train {len(split.train)}, dev {len(split.dev)}, test {len(split.test)} samples on {len(np.unique(days))} days"
    )
    scores = score_forecasts(dataset, split, forecasts, reference, Bootstrap(arguments.block_days))
    print(format_table(dataset, scores, reference))


if __name__ == "__main__":
    main()
