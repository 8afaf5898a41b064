"""Converters: StockNet's, the tables and charts that both make of bars, and the command."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusedmm.train.chart import BARS, PRICE_ROWS, cut_patches, draw_candles
from fusedmm.train.format import DataFormatError, read_dataset
from fusedmm.train.prepare.__main__ import main
from fusedmm.train.prepare.bars import BarSeries, momentum_table, price_table, trailing_log_volatility, volatility_table
from fusedmm.train.prepare.stocknet import prepare_stocknet
from tests.public_sources import PRICES, SHARED, TWEETS, needs_data, published_maec, published_stocknet, subset, walk


def test_stocknet_movement_threshold_and_tweets(tmp_path: Path) -> None:
    prices = walk()
    published_stocknet(tmp_path / "source", prices, TWEETS)
    prepare_stocknet(tmp_path / "source", tmp_path / "all", all_days=True)
    prepare_stocknet(tmp_path / "source", tmp_path / "paper")
    every, paper = read_dataset(tmp_path / "all"), read_dataset(tmp_path / "paper")
    movement = prices["close"].pct_change().to_numpy()[33:]
    assert every.samples["target_up"].tolist() == (movement > 0).astype(float).tolist()
    kept = (movement < -0.005) | (movement > 0.0055)
    assert not kept.all()
    assert paper.samples["day"].tolist() == every.samples["day"].to_numpy()[kept].tolist()
    assert paper.samples["target_up"].tolist() == (movement[kept] > 0).astype(float).tolist()

    thursday = int(np.datetime64("2015-04-09").astype(np.int64))
    row = every.samples.index[every.samples["day"] == thursday][0]
    text = every.tokens["text"]
    assert text.text[text.offsets[row] : text.offsets[row + 1]].to_pylist() == ["early", "$ xy up"]
    assert every.samples["time"][row] == thursday * 86_400
    price = every.tokens["price"]
    assert price.time[price.offsets[row + 1] - 1] == (thursday - 1) * 86_400 + 21 * 3600
    after = text.text[text.offsets[row + 1] : text.offsets[row + 2]].to_pylist()
    assert after == ["early", "$ xy up", "too late"]


def test_stocknet_later_bars_change_no_input(tmp_path: Path) -> None:
    """From bar 70 on all prices are others: samples up to that day keep their inputs, and its own label changes."""
    prices = walk()
    published_stocknet(tmp_path / "one", prices, TWEETS)
    prices.loc[70:, ["open", "high", "low", "close"]] *= 1.37
    prices.loc[70:, "volume"] += 77
    published_stocknet(tmp_path / "two", prices, TWEETS)
    both = []
    for name in ("one", "two"):
        prepare_stocknet(tmp_path / name, tmp_path / f"{name}_out", all_days=True)
        both.append(read_dataset(tmp_path / f"{name}_out"))
    one, two = both
    row = 70 - 33  # the sample whose target is bar 70
    np.testing.assert_array_equal(one.matrix("past_")[: row + 1], two.matrix("past_")[: row + 1])
    assert (one.matrix("past_")[row + 1] != two.matrix("past_")[row + 1]).any()
    for name in ("price", "chart"):
        stop = one.tokens[name].offsets[row + 1]
        np.testing.assert_array_equal(one.tokens[name].values[:stop], two.tokens[name].values[:stop])
        assert not np.array_equal(one.tokens[name].values[stop:], two.tokens[name].values[stop:])
    assert two.samples["target_up"][row] == 1


def test_stocknet_returns_come_from_adjusted_prices(tmp_path: Path) -> None:
    prices = walk()
    published_stocknet(tmp_path / "source", prices, TWEETS)
    frame = pd.read_csv(tmp_path / "source" / "price" / "raw" / "XY.csv")
    frame.loc[60:, ["Open", "High", "Low", "Close"]] /= 2  # a split, which the adjusted close does not show
    frame.to_csv(tmp_path / "source" / "price" / "raw" / "XY.csv", index=False)
    prepare_stocknet(tmp_path / "source", tmp_path / "out", all_days=True)
    dataset = read_dataset(tmp_path / "out")
    assert not dataset.samples["suspect"].any()
    assert np.abs(dataset.tokens["price"].values[:, 0]).max() < 0.2


def test_stocknet_bad_tweet_is_named(tmp_path: Path) -> None:
    published_stocknet(tmp_path / "source", walk(), TWEETS)
    with (tmp_path / "source" / "tweet" / "preprocessed" / "XY" / "2015-04-08").open("a") as file:
        file.write('{"text": ["x"]}\n')
    with pytest.raises(DataFormatError, match=r"XY/2015-04-08, row 3 must be a tweet with text and created_at"):
        prepare_stocknet(tmp_path / "source", tmp_path / "out")


def test_stocknet_without_samples(tmp_path: Path) -> None:
    published_stocknet(tmp_path / "source", walk(days=20), TWEETS)
    with pytest.raises(DataFormatError, match="a day of 2014 or 2015 must have 33 bars before it, got none in 1 price"):
        prepare_stocknet(tmp_path / "source", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"SOURCE must hold prices\.parquet or price/raw/"):
        prepare_stocknet(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("table", [price_table, volatility_table, momentum_table])
def test_row_j_of_a_table_uses_bars_up_to_j_only(table: Callable[[BarSeries], np.ndarray]) -> None:
    prices = walk()
    whole = table(BarSeries.from_frame(prices, "walk"))
    for stop in (1, 2, 5, 61, 62, 119):
        np.testing.assert_array_equal(table(BarSeries.from_frame(prices.iloc[:stop], "walk")), whole[:stop])


def test_volatility_of_a_flat_price_is_finite() -> None:
    assert np.isfinite(trailing_log_volatility(np.concatenate([[np.nan], np.zeros(9)]), 5)[5:]).all()


def test_candles_are_drawn_where_the_prices_are() -> None:
    rising = np.linspace(10, 20, BARS)[None]
    image = draw_candles(rising, rising + 0.5, rising - 0.5, rising + 0.3, np.arange(1, BARS + 1.0)[None])[0]
    body = image[:PRICE_ROWS] == 1.0  # the close is above the open
    heights = body.argmax(axis=0)
    assert (np.diff(heights) <= 0).all()
    assert heights[0] > heights[-1]
    volume = (image[PRICE_ROWS:] > 0).sum(axis=0)
    assert (np.diff(volume) >= 0).all()
    assert volume[-1] == 8
    falling = draw_candles(rising, rising + 0.5, rising - 0.5, rising - 0.3, rising)[0]
    assert not (falling == 1.0).any()
    assert (falling == 0.7).any()


def test_patches_hold_every_pixel_and_their_place() -> None:
    image = np.random.default_rng(0).random((2, 16, 24)).astype(np.float32)
    patches = cut_patches(image)
    assert patches.shape == (2, 6, 66)
    np.testing.assert_array_equal(patches[1, 4, :64].reshape(8, 8), image[1, 8:, 8:16])
    assert patches[0, 4, 64:].tolist() == [1.0, 0.5]


@needs_data
def test_stocknet_labels_are_the_papers(tmp_path: Path) -> None:
    small = tmp_path / "source"
    small.mkdir()
    # One on the threshold, two listed in 2014, one with a day without prices.
    symbols: list[object] = ["CHL", "AGFS", "BABA", "REX"]
    for name in ("prices", "tweets"):
        subset(SHARED / "stocknet" / f"{name}.parquet", small, "symbol", symbols)
    prepare_stocknet(small, tmp_path / "out")
    samples = read_dataset(tmp_path / "out").samples
    targets = pd.read_parquet(SHARED / "stocknet" / "targets.parquet", filters=[("symbol", "in", symbols)])
    targets = targets.dropna(subset=["label"])
    targets["day"] = pd.to_datetime(targets["date"]).to_numpy("datetime64[D]").astype(np.int64)
    merged = samples.merge(targets, how="outer", left_on=["entity", "day"], right_on=["symbol", "day"], indicator=True)
    assert (merged["_merge"] != "left_only").all()
    assert (merged["_merge"] == "right_only").sum() < 60  # the first 33 bars of what was listed in 2014
    both = merged[merged["_merge"] == "both"]
    assert len(both) > 900
    assert (both["target_up"] == both["label"].astype(float)).all()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    main()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    published_maec(tmp_path / "maec", walk())
    published_stocknet(tmp_path / "stocknet", walk(), TWEETS)
    run(monkeypatch, "maec", tmp_path / "maec", tmp_path / "out")
    assert capsys.readouterr().out.startswith("1 of 1 calls")
    run(monkeypatch, "stocknet", tmp_path / "stocknet", tmp_path / "out", "--all-days")
    assert capsys.readouterr().out.startswith("87 days of 1 stocks (32 have fewer than 33 bars before)")
    assert read_dataset(tmp_path / "out").info.name == "stocknet-all-days"


def test_command_says_in_one_line_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published_maec(tmp_path / "source", walk())
    (tmp_path / "source" / "prices" / PRICES).unlink()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "maec", tmp_path / "source", tmp_path / "out")
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("prepare: calls must have bars")
    assert "\n" not in stop.value.code
    with pytest.raises(SystemExit):
        run(monkeypatch, "maec", tmp_path / "source", tmp_path / "out", "--all-days")
    assert "--all-days is for stocknet, got it with maec." in capsys.readouterr().err
