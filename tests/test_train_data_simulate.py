"""The simulated market: what it says of itself is true, so a report can be checked against it."""

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from fusedmm.train.features import Features, Featurizer
from fusedmm.train.format import Dataset, read_dataset, write_dataset
from fusedmm.train.simulate import (
    GRADED,
    INFORMATIVE,
    NOISE,
    REGIMES,
    TARGET_NOISE,
    WEIGHTS,
    MarketConfig,
    main,
    simulate,
)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("market")
    write_dataset(directory, *simulate(MarketConfig()))
    return read_dataset(directory)


@pytest.fixture(scope="module")
def features(market: Dataset) -> Features:
    return Featurizer.fit(market, np.arange(2800)).transform(market)


def pooled(features: Features, name: str) -> np.ndarray:
    """[N, F] mean of a modality's tokens, 0 where it is missing."""
    table = features.tokens[name]
    sums = np.concatenate([np.zeros((1, table.values.shape[1])), np.cumsum(table.values, axis=0, dtype=np.float64)])
    length = np.maximum(np.diff(table.offsets), 1)
    return (sums[table.offsets[1:]] - sums[table.offsets[:-1]]) / length[:, None]


def error_of(inputs: np.ndarray, targets: np.ndarray) -> float:
    """Test MSE of a linear model trained on the first 2,800 of 4,000 samples."""
    model = Ridge(30).fit(inputs[:2800], targets[:2800])
    return float(((model.predict(inputs[3200:]) - targets[3200:]) ** 2).mean())


def test_same_seed_same_market() -> None:
    config = MarketConfig(days=40, entities=2, seed=5)
    first, second = simulate(config), simulate(config)
    assert first[0] == second[0]
    assert first[1].equals(second[1])
    for name, tokens in first[2].items():
        np.testing.assert_array_equal(tokens.time, second[2][name].time)
        if tokens.values is not None:
            np.testing.assert_array_equal(tokens.values, second[2][name].values)
        else:
            assert list(tokens.text) == list(second[2][name].text)
    assert not first[1].equals(simulate(MarketConfig(days=40, entities=2, seed=6))[1])


def test_oracle_error_is_noise_plus_what_tokens_do_not_tell(market: Dataset) -> None:
    """E[(y - oracle)^2] = noise^2 + sum_m w_m^2 Var[s_m | tokens], the last from the importances' definition."""
    error = (market.matrix("target_") - market.matrix("oracle_")) ** 2
    assert (error.mean(axis=0) > TARGET_NOISE**2).all()
    assert (error.mean(axis=0) < 0.5).all()
    # The oracle is calibrated: regressing the target on it gives slope 1.
    for column in range(2):
        target, oracle = market.matrix("target_")[:, column], market.matrix("oracle_")[:, column]
        assert np.polyfit(oracle, target, 1)[0] == pytest.approx(1, abs=0.04)


def test_importance_is_a_share_that_follows_the_regime(market: Dataset) -> None:
    samples = market.samples
    importance = samples[[f"importance_{name}" for name in INFORMATIVE]]
    np.testing.assert_allclose(importance.sum(axis=1), 1, rtol=1e-9)
    assert (samples[[f"importance_{name}" for name in NOISE]] == 0).all(axis=None)
    leading = dict(zip(REGIMES, INFORMATIVE, strict=True))
    for regime, rows in samples.groupby("regime"):
        present = rows[rows[f"importance_{leading[regime]}"] > 0]
        assert present[f"importance_{leading[regime]}"].min() > 0.5, regime
        assert len(rows) > 400
    for name in ("text", "audio", "chart"):
        missing = np.diff(market.tokens[name].offsets) == 0
        assert 0.05 < missing.mean() < 0.2
        assert (samples[f"importance_{name}"][missing] == 0).all()
        assert (samples[f"importance_{name}"][~missing] > 0).all()


def test_weights_are_shares_of_one() -> None:
    for weights in WEIGHTS.values():
        np.testing.assert_allclose((weights**2).sum(axis=1), 1)


def test_every_regime_is_in_every_tenth_of_the_days(market: Dataset) -> None:
    samples = market.samples
    order = samples["day"] - samples["day"].min()
    for start in range(0, 400, 80):
        assert set(samples[(order >= start) & (order < start + 80)]["regime"]) == set(REGIMES)


def test_streams_are_asynchronous_and_knowable(market: Dataset) -> None:
    made = market.samples["time"].to_numpy()
    rates = {}
    for name, table in market.tokens.items():
        age = np.repeat(made, np.diff(table.offsets)) - table.time
        assert (age >= 0).all()
        rates[name] = float(np.median(age))
    assert len(set(rates.values())) == len(rates)


def test_truth_shows_in_linear_models(market: Dataset, features: Features) -> None:
    """Price alone is mediocre; knowing the regime is what pays; noise does not help; the oracle is far ahead."""
    targets = market.matrix("target_")
    pools = {name: pooled(features, name) for name in features.names}
    informative = np.concatenate([pools[name] for name in INFORMATIVE], axis=1)
    regime = np.asarray(market.samples["regime"])[:, None] == np.array(REGIMES)
    gated = (informative[:, :, None] * regime[:, None, :]).reshape(len(regime), -1)
    price, every = error_of(pools["price"], targets), error_of(np.concatenate(list(pools.values()), axis=1), targets)
    plain, aware = error_of(informative, targets), error_of(gated, targets)
    oracle = float(((market.matrix("oracle_") - targets)[3200:] ** 2).mean())
    variance = float(targets[3200:].var(axis=0).mean())
    assert oracle < aware - 0.05 < plain - 0.25
    assert plain < price < variance
    assert every > plain - 0.01


def test_regime_can_be_read_off_the_price_tokens(market: Dataset, features: Features) -> None:
    state = pooled(features, "price")[:, 2:]
    read = np.array(REGIMES)[state.argmax(axis=1)]
    assert (read == np.asarray(market.samples["regime"])).mean() > 0.97


def test_text_holds_at_most_one_graded_verb_a_sentence(market: Dataset) -> None:
    words = [sum(word in GRADED for word in text.split()) for text in market.tokens["text"].text.to_pylist()[:2000]]
    assert set(words) == {0, 1}


def test_config_must_have_a_day_and_an_entity() -> None:
    with pytest.raises(ValueError, match="days and entities must be at least 1, got 0 and 3"):
        MarketConfig(days=0, entities=3)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", str(tmp_path), "--days", "30", "--entities", "2"])
    main()
    assert "60 samples" in capsys.readouterr().out
    assert len(read_dataset(tmp_path).samples) == 60
