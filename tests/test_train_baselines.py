"""Baselines and intervals: numbers that can be worked out by hand, and those known for MAEC."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import matthews_corrcoef

from fusedmm.train.baselines import Forecast, baseline_forecasts, format_table, main, score_forecasts
from fusedmm.train.bootstrap import Bootstrap, matthews_correlation
from fusedmm.train.format import Dataset, DatasetInfo, write_dataset
from fusedmm.train.prepare.maec import prepare_maec
from fusedmm.train.simulate import MarketConfig, simulate
from fusedmm.train.splits import Split, split_by_date

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"


def small(task: str = "regression") -> tuple[Dataset, Split]:
    """400 samples on 100 days; the target is linear in the past up to noise."""
    rng = np.random.default_rng(0)
    day = np.repeat(np.arange(100), 4)
    past = rng.standard_normal((400, 2))
    signal = past @ [1.0, -0.5] + 0.3 * rng.standard_normal(400)
    samples = pd.DataFrame({"sample": np.arange(400), "entity": "A", "time": day * 86_400, "day": day})
    samples["past_a"], samples["past_b"] = past.T
    samples["callday_a"] = past[:, 0]
    if task == "classification":
        samples["target_up"] = (signal > 0.4).astype(float)
    else:
        samples["target_y"], samples["target_z"] = signal, -signal + 3
    info = DatasetInfo("small", task, "", "", {}, classes=2 if task == "classification" else None, persistence="past_a")
    return Dataset(info, samples, {}), split_by_date(samples)


def test_regression_baselines() -> None:
    dataset, split = small()
    forecasts = {forecast.name: forecast.prediction for forecast in baseline_forecasts(dataset, split)}
    assert list(forecasts) == ["train mean", "persistence", "persistence, call day too", "ridge", "ridge, call day too"]
    targets = dataset.matrix("target_")
    for prediction in forecasts.values():
        assert prediction.shape == (len(split.test), 2)
    np.testing.assert_allclose(forecasts["train mean"][5], targets[split.train].mean(axis=0))
    np.testing.assert_array_equal(forecasts["persistence"][:, 1], dataset.samples["past_a"].to_numpy()[split.test])
    errors = {name: ((prediction - targets[split.test]) ** 2).mean() for name, prediction in forecasts.items()}
    assert errors["ridge"] < 0.12 < errors["ridge, call day too"] < errors["train mean"]


def test_baselines_never_see_the_test_targets() -> None:
    dataset, split = small()
    before = [forecast.prediction.copy() for forecast in baseline_forecasts(dataset, split)]
    dataset.samples.loc[split.test, ["target_y", "target_z"]] = 1e9
    for old, forecast in zip(before, baseline_forecasts(dataset, split), strict=True):
        np.testing.assert_array_equal(old, forecast.prediction)


def test_classification_baselines() -> None:
    dataset, split = small("classification")
    forecasts = baseline_forecasts(dataset, split)
    assert [forecast.name for forecast in forecasts] == ["majority", "logistic", "logistic, call day too"]
    scores = score_forecasts(dataset, split, forecasts, "logistic", Bootstrap(resamples=200))
    majority, logistic = scores[0], scores[1]
    truth = dataset.matrix("target_")[split.test, 0]
    assert majority.headline.value == pytest.approx((truth == 0).mean())
    assert majority.correlation is not None
    assert majority.correlation.value == 0
    assert logistic.correlation is not None
    assert logistic.correlation.value == pytest.approx(matthews_corrcoef(truth, forecasts[1].prediction[:, 0]))
    assert logistic.headline.value > 0.85
    assert majority.paired is not None
    assert majority.paired.low > 0  # more errors than logistic regression
    assert logistic.paired is None
    table = format_table(dataset, scores, "logistic")
    assert table.splitlines()[0].startswith("| model | accuracy [95 %] | MCC [95 %] | error - logistic's")
    assert len(table.splitlines()) == 5


def test_simulated_data_has_its_oracle_in_the_table() -> None:
    info, samples, _ = simulate(MarketConfig(days=120, entities=5))
    dataset, split = Dataset(info, samples, {}), split_by_date(samples)
    forecasts = baseline_forecasts(dataset, split)
    assert [forecast.name for forecast in forecasts] == ["train mean", "ridge", "oracle"]
    scores = score_forecasts(dataset, split, forecasts, "ridge", Bootstrap(resamples=200))
    assert scores[2].paired is not None
    assert scores[2].paired.high < 0
    assert scores[1].parts == pytest.approx(
        ((forecasts[1].prediction - dataset.matrix("target_")[split.test]) ** 2).mean(axis=0)
    )
    assert (
        format_table(dataset, scores, "ridge").splitlines()[0]
        == "| model | near | far | mean MSE [95 %] | minus ridge's [95 %] |"
    )


def test_scores_refuse_other_shapes_and_names() -> None:
    dataset, split = small()
    with pytest.raises(ValueError, match="reference must be one of a, got 'ridge'"):
        score_forecasts(dataset, split, [Forecast("a", np.zeros((len(split.test), 2)))], "ridge", Bootstrap())
    with pytest.raises(ValueError, match=r"prediction of 'a' must have shape \(80, 2\), got \(80, 1\)"):
        score_forecasts(dataset, split, [Forecast("a", np.zeros((80, 1)))], "a", Bootstrap())


def test_mean_interval_covers_and_knows_that_a_days_samples_are_one_piece_of_news() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        day = np.repeat(np.arange(60), 10)
        values = np.repeat(rng.standard_normal(60), 10) + 0.1 * rng.standard_normal(600)
        interval = Bootstrap(resamples=300, seed=seed).mean(values, day)
        assert interval.low < interval.value < interval.high
        assert interval.value == pytest.approx(values.mean())
        covered += interval.low <= 0 <= interval.high
    assert covered >= 86  # rows resampled one by one would cover about 45 times
    by_row = Bootstrap(resamples=300).mean(values, np.arange(600))
    assert interval.high - interval.low > 2.5 * (by_row.high - by_row.low)


def test_intervals_are_seeded_and_blocks_widen_them_where_days_hang_together() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.standard_normal(20), 10)  # runs of ten days
    day = np.arange(200)
    single, again = Bootstrap(seed=1).mean(values, day), Bootstrap(seed=1).mean(values, day)
    assert single == again
    assert single != Bootstrap(seed=2).mean(values, day)
    runs = Bootstrap(block_days=10, seed=1).mean(values, day)
    assert runs.high - runs.low > 1.8 * (single.high - single.low)
    assert str(runs).startswith(f"{runs.value:.4f} [")


def test_paired_interval_is_narrow_where_losses_move_together() -> None:
    rng = np.random.default_rng(0)
    day = np.repeat(np.arange(80), 5)
    hard = rng.standard_normal(400) ** 2
    better = Bootstrap().paired(hard - 0.05 + 0.01 * rng.standard_normal(400), hard, day)
    assert better.value == pytest.approx(-0.05, abs=0.003)
    assert better.high < -0.04
    assert Bootstrap().mean(hard, day).high - Bootstrap().mean(hard, day).low > 0.2
    with pytest.raises(ValueError, match=r"reference_loss must have the shape of loss \(400,\), got \(3,\)"):
        Bootstrap().paired(hard, hard[:3], day)


def test_matthews_correlation_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 200)
    predicted = np.where(rng.random(200) < 0.5, truth, rng.integers(0, 3, 200))
    interval = Bootstrap(resamples=200).correlation(predicted, truth, np.repeat(np.arange(40), 5), classes=3)
    assert interval.value == pytest.approx(matthews_corrcoef(truth, predicted))
    assert interval.low < interval.value < interval.high
    assert matthews_correlation(np.array([[5.0, 0.0], [7.0, 0.0]])) == 0


def test_intervals_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"day must have one entry a sample \(3\), got 2"):
        Bootstrap().mean([1.0, 2.0, 3.0], [0, 1])
    with pytest.raises(ValueError, match="values must hold at least one sample, got none"):
        Bootstrap().mean([], [])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path, *simulate(MarketConfig(days=60, entities=3)))
    dates = ["--train-end", "2020-02-05", "--dev", "2020-02-06", "2020-02-12", "--test", "2020-02-13", "2020-02-29"]
    monkeypatch.setattr(sys, "argv", ["baselines", str(tmp_path), *dates])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train 99, dev 12, test 51 samples on 17 days")
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["train mean", "ridge", "oracle"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not in ../shared/data")
def test_maec_gives_the_known_numbers(tmp_path: Path) -> None:
    """Measured elsewhere on the same copy and split: what simple models reach, to three decimals."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("calls", "text", "audio", "prices"):
        (source / f"{name}.parquet").symlink_to((SHARED / "maec" / f"{name}.parquet").resolve())
    prepare_maec(source, tmp_path / "out")
    samples = pd.read_parquet(tmp_path / "out" / "samples.parquet")
    info = DatasetInfo("maec", "regression", "", "", {}, persistence="past_logvol_30")
    dataset = Dataset(info, samples, {})
    split = split_by_date(
        samples,
        train_end="2016-08-31",
        dev_start="2016-10-17",
        dev_end="2016-11-30",
        test_start="2017-01-17",
        test_end="2017-06-29",
    )
    assert [len(rows) for rows in split] == [1916, 206, 643]
    assert samples["day"].to_numpy()[split.test].size - 643 == 0
    assert len(np.unique(samples["day"].to_numpy()[split.test])) == 84
    forecasts = baseline_forecasts(dataset, split)
    scores = {
        score.name: score for score in score_forecasts(dataset, split, forecasts, "ridge", Bootstrap(resamples=500))
    }
    assert scores["train mean"].parts == pytest.approx((0.816, 0.462, 0.321, 0.278), abs=6e-4)
    assert scores["persistence, call day too"].headline.value == pytest.approx(0.363, abs=6e-4)
    assert scores["ridge, call day too"].parts == pytest.approx((0.631, 0.280, 0.162, 0.112), abs=2e-3)
    assert scores["ridge, call day too"].headline.value == pytest.approx(0.296, abs=1e-3)
    assert scores["ridge"].headline.value == pytest.approx(0.296, abs=1e-3)
    assert scores["ridge"].headline.low == pytest.approx(0.268, abs=0.01)
    assert scores["ridge"].headline.high == pytest.approx(0.334, abs=0.01)
