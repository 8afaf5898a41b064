"""Converters: every fault of the public sources has a test, both layouts agree, nothing after the forecast gets in."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from fusedmm.train.chart import BARS, PRICE_ROWS, cut_patches, draw_candles
from fusedmm.train.format import DataFormatError, Dataset, read_dataset
from fusedmm.train.prepare.__main__ import main
from fusedmm.train.prepare.bars import BarSeries, momentum_table, price_table, trailing_log_volatility, volatility_table
from fusedmm.train.prepare.maec import INTENSITY, clean_audio, prepare_maec
from fusedmm.train.prepare.maec_source import AUDIO, AUDIO_COLUMNS
from fusedmm.train.prepare.stocknet import prepare_stocknet

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not in ../shared/data")
CALL_BAR = 70
LOUD = 66.0
PRICES, ZERO, EMPTY = "ab-c.us.txt", "2014-01-02,0,1,1,1,5,0", "2014-01-02,1,1,1,,5,0"
UNDEFINED = AUDIO_COLUMNS.index("shimmer_apq11")


def walk(days: int = 120, seed: int = 0) -> pd.DataFrame:
    """A random walk with a bar on each weekday from 2015-01-01."""
    rng = np.random.default_rng(seed)
    close = 50 * np.exp(np.cumsum(0.02 * rng.standard_normal(days)))
    open_ = close * np.exp(0.005 * rng.standard_normal(days))
    high, low = np.maximum(open_, close) * 1.01, np.minimum(open_, close) * 0.99
    dates = pd.bdate_range("2015-01-01", periods=days).strftime("%Y-%m-%d")
    volume = rng.integers(1000, 9000, days)
    return pd.DataFrame({"date": dates, "open": open_, "high": high, "low": low, "close": close, "volume": volume})


def published_maec(root: Path, prices: pd.DataFrame, sentences: int = 3) -> Path:
    """One call of AB.C on bar `CALL_BAR`, as MAEC publishes it, with its faults."""
    stamp = prices["date"][CALL_BAR].replace("-", "")
    folder = root / "MAEC_Dataset" / f"{stamp}_AB.C"
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("".join(f"Sentence {number}.\n" for number in range(sentences)))
    row = [f"{number + 1}.5 " for number in range(len(AUDIO))]
    row[INTENSITY[1]], row[INTENSITY[2]], row[-1] = str(LOUD), "12.5", "10.0"  # the minimum is the larger one
    rows = [row.copy() for _ in range(sentences)]
    rows[-1][INTENSITY[2]] = "-300.0"
    rows[0][UNDEFINED] = "--undefined--"
    (folder / "features.csv").write_text("\n".join([",".join(AUDIO), *(",".join(row) for row in rows)]) + "\n")
    (root / "prices").mkdir()
    prices.assign(OpenInt=0).rename(columns=str.capitalize).to_csv(root / "prices" / "ab-c.us.txt", index=False)
    return folder


@pytest.fixture
def maec(tmp_path: Path) -> Dataset:
    published_maec(tmp_path / "source", walk())
    assert prepare_maec(tmp_path / "source", tmp_path / "out").startswith("1 of 1 calls (none dropped), 3 sentences")
    return read_dataset(tmp_path / "out")


def test_maec_target_starts_at_the_close_of_the_call_day(maec: Dataset) -> None:
    close = walk()["close"].to_numpy()
    returns = close[1:] / close[:-1] - 1
    for days in (3, 7, 15, 30):
        expected = np.log(np.std(returns[CALL_BAR : CALL_BAR + days]))
        assert maec.samples[f"target_logvol_{days}"][0] == pytest.approx(expected, rel=1e-12)
        before = np.log(np.std(returns[CALL_BAR - 1 - days : CALL_BAR - 1]))  # ends with the bar of the day before
        with_call_day = np.log(np.std(returns[CALL_BAR - days : CALL_BAR]))
        assert maec.samples[f"past_logvol_{days}"][0] == pytest.approx(before, rel=1e-12)
        assert maec.samples[f"callday_logvol_{days}"][0] == pytest.approx(with_call_day, rel=1e-12)
    assert maec.samples["past_logabs_1"][0] == pytest.approx(np.log(abs(returns[CALL_BAR - 2]) + 0.005))
    assert maec.samples["callday_logabs_1"][0] == pytest.approx(np.log(abs(returns[CALL_BAR - 1]) + 0.005))


def test_maec_inputs_end_with_the_day_before(maec: Dataset) -> None:
    call_day = np.datetime64(walk()["date"][CALL_BAR]).astype(np.int64)
    for name in ("price", "chart"):
        assert maec.tokens[name].time.max() == (call_day - 1) * 86_400 + 21 * 3600
    assert maec.samples["day"][0] == call_day
    last = np.datetime64(walk()["date"][CALL_BAR + 30]).astype(np.int64)
    assert maec.samples["label_end"][0] == last * 86_400 + 21 * 3600


@pytest.mark.parametrize("changed", ["the call day's bar and all later ones", "the day before"])
def test_maec_later_bars_change_no_input(tmp_path: Path, maec: Dataset, changed: str) -> None:
    start = CALL_BAR if changed.startswith("the call day") else CALL_BAR - 1
    prices = walk()
    prices.loc[start:, ["open", "high", "low", "close"]] *= 1.37
    prices.loc[start:, "volume"] += 77
    published_maec(tmp_path / "other", prices)
    prepare_maec(tmp_path / "other", tmp_path / "other_out")
    other = read_dataset(tmp_path / "other_out")
    same = start == CALL_BAR
    for name in ("price", "chart"):
        assert np.array_equal(maec.tokens[name].values, other.tokens[name].values, equal_nan=True) == same
    assert np.array_equal(maec.matrix("past_"), other.matrix("past_")) == same
    assert not np.array_equal(maec.matrix("callday_"), other.matrix("callday_"))


def test_maec_audio_faults(maec: Dataset) -> None:
    audio = maec.tokens["audio"].values
    _, low, high = INTENSITY
    np.testing.assert_array_equal(audio[:2, low], 12.5)  # swapped back
    np.testing.assert_array_equal(audio[:, high], LOUD)
    assert np.isnan(audio[2, low])  # digital silence
    assert np.isnan(audio[0, UNDEFINED])  # --undefined--
    assert np.isnan(audio).sum() == 2


def test_silence_and_swap_keep_what_was_right() -> None:
    audio = np.zeros((3, len(AUDIO_COLUMNS)), np.float32)
    mean, low, high = INTENSITY
    audio[:, mean], audio[:, low], audio[:, high] = [-232, 40, np.nan], [-300, 30, np.nan], [-300, 70, np.nan]
    before = audio.copy()
    cleaned = clean_audio(audio)
    np.testing.assert_array_equal(cleaned[:, INTENSITY], [[np.nan] * 3, [40, 30, 70], [np.nan] * 3])
    np.testing.assert_array_equal(audio, before)


def test_maec_sentences_end_when_the_forecast_is_made(maec: Dataset) -> None:
    made = maec.samples["time"][0]
    assert maec.tokens["text"].time.tolist() == [made - 20, made - 10, made]
    assert maec.tokens["audio"].time.tolist() == maec.tokens["text"].time.tolist()
    assert maec.tokens["text"].text.to_pylist() == ["Sentence 0.", "Sentence 1.", "Sentence 2."]


def test_maec_call_of_one_sentence(tmp_path: Path) -> None:
    published_maec(tmp_path / "source", walk(), sentences=1)
    prepare_maec(tmp_path / "source", tmp_path / "out")
    dataset = read_dataset(tmp_path / "out")
    assert dataset.tokens["text"].offsets.tolist() == [0, 1]
    assert dataset.tokens["text"].time[0] == dataset.samples["time"][0]


def test_maec_unadjusted_split_is_marked(tmp_path: Path, maec: Dataset) -> None:
    prices = walk()
    prices.loc[CALL_BAR + 9 :, ["open", "high", "low", "close"]] /= 2
    published_maec(tmp_path / "split", prices)
    prepare_maec(tmp_path / "split", tmp_path / "split_out")
    assert read_dataset(tmp_path / "split_out").samples["suspect"].tolist() == [True]
    assert maec.samples["suspect"].tolist() == [False]


@pytest.mark.parametrize(
    ("prices", "reason"),
    [
        (lambda: walk().drop(index=CALL_BAR), "1 with no bar on its day"),
        (lambda: walk().iloc[CALL_BAR - 60 :], "1 with fewer than 61 bars before"),
        (lambda: walk().iloc[: CALL_BAR + 30], "1 with a label that ends after the prices"),
    ],
)
def test_maec_calls_without_enough_prices_are_counted(
    tmp_path: Path, prices: Callable[[], pd.DataFrame], reason: str
) -> None:
    published_maec(tmp_path / "source", walk())
    kept, dropped = tmp_path / "source" / "prices" / "ab-c.us.txt", tmp_path / "source" / "prices" / "xy.us.txt"
    shutil.copy(kept, dropped)
    prices().assign(OpenInt=0).rename(columns=str.capitalize).to_csv(dropped, index=False)
    folder = next((tmp_path / "source" / "MAEC_Dataset").iterdir())
    shutil.copytree(folder, folder.with_name(folder.name.replace("AB.C", "XY")))
    summary = prepare_maec(tmp_path / "source", tmp_path / "out")
    assert summary.startswith(f"1 of 2 calls ({reason})")
    dropped.unlink()
    assert "1 of 2 calls (1 with no bar on its day)" in prepare_maec(tmp_path / "source", tmp_path / "out")
    kept.unlink()
    with pytest.raises(DataFormatError, match="calls must have bars of their tickers and days, got none among 2"):
        prepare_maec(tmp_path / "source", tmp_path / "out")


Change = Callable[[list[str]], list[str]]


def rewrite(path: Path, change: Change) -> None:
    path.write_text("\n".join(change(path.read_text().split("\n"))))


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("features.csv", lambda rows: rows[1:], "features.csv, row 0 must name the 29 published features"),
        (
            "features.csv",
            lambda rows: [*rows[:3], *rows[4:]],
            "must have a row for each of the 3 lines of text.txt, got 2",
        ),
        (
            "features.csv",
            lambda rows: [rows[0], "two" + rows[1], *rows[2:]],
            "features.csv, row 1 must hold 29 numbers",
        ),
        ("features.csv", lambda rows: [rows[0], rows[1] + ",1", *rows[2:]], "features.csv, row 1 must hold 29 numbers"),
        (PRICES, lambda rows: [rows[0].replace("Close", "Last"), *rows[1:]], f"{PRICES} column close is missing"),
        (
            PRICES,
            lambda rows: [*rows[:3], rows[2], *rows[3:]],
            f"{PRICES} column date, row 2 must be after the day before",
        ),
        (PRICES, lambda rows: [rows[0], ZERO, *rows[1:]], "column open, row 0 must be a positive number, got 0.0"),
        (PRICES, lambda rows: [rows[0], EMPTY, *rows[1:]], "column close, row 0 must be a positive number, got nan"),
    ],
)
def test_maec_what_is_wrong_is_named(tmp_path: Path, file: str, change: Change, says: str) -> None:
    folder = published_maec(tmp_path / "source", walk())
    rewrite(folder / file if file != PRICES else tmp_path / "source" / "prices" / file, change)
    with pytest.raises(DataFormatError, match="prepare: ") as error:
        prepare_maec(tmp_path / "source", tmp_path / "out")
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_maec_folder_name_and_empty_source(tmp_path: Path) -> None:
    folder = published_maec(tmp_path / "source", walk())
    folder.rename(folder.with_name("call_1"))
    with pytest.raises(DataFormatError, match="folder call_1 must be named <YYYYMMDD>_<ticker>"):
        prepare_maec(tmp_path / "source", tmp_path / "out")
    shutil.rmtree(folder.with_name("call_1"))
    with pytest.raises(DataFormatError, match="must hold a folder for each call, got none"):
        prepare_maec(tmp_path / "source", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"SOURCE must hold calls\.parquet or MAEC_Dataset/"):
        prepare_maec(tmp_path, tmp_path / "out")


def published_stocknet(root: Path, prices: pd.DataFrame, tweets: dict[str, list[tuple[str, list[str]]]]) -> None:
    (root / "price" / "raw").mkdir(parents=True)
    frame = prices.rename(columns=str.capitalize).assign(**{"Adj Close": prices["close"] / 2})
    frame.to_csv(root / "price" / "raw" / "XY.csv", index=False)
    folder = root / "tweet" / "preprocessed" / "XY"
    folder.mkdir(parents=True)
    for day, entries in tweets.items():
        lines = [json.dumps({"text": words, "created_at": made, "user_id_str": "1"}) for made, words in entries]
        (folder / day).write_text("\n".join(lines) + "\n")


TWEETS = {
    "2015-04-08": [
        ("Wed Apr 08 23:59:59 +0000 2015", ["$", "xy", "up"]),
        ("Thu Apr 09 00:00:01 +0000 2015", ["too", "late"]),
        ("Wed Apr 08 09:00:00 +0000 2015", ["early"]),
    ],
    "2015-04-02": [("Thu Apr 02 12:00:00 +0000 2015", ["long", "ago"])],
}


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


def subset(source: Path, target: Path, column: str, keep: list[object]) -> None:
    pq.write_table(pq.read_table(source, filters=[(column, "in", keep)]), target / source.name)


@needs_data
def test_published_and_parquet_maec_agree(tmp_path: Path) -> None:
    prepare_maec(SHARED / "maec-raw", tmp_path / "published")
    small = tmp_path / "source"
    small.mkdir()
    names = {path.name for path in (SHARED / "maec-raw" / "MAEC_Dataset").iterdir()}
    calls = pd.read_parquet(SHARED / "maec" / "calls.parquet")
    calls = calls[calls["call_id"].isin(names)]
    calls.to_parquet(small / "calls.parquet")
    for name in ("text", "audio"):
        subset(SHARED / "maec" / f"{name}.parquet", small, "call", calls["call"].tolist())
    subset(SHARED / "maec" / "prices.parquet", small, "ticker", calls["ticker"].tolist())
    prepare_maec(small, tmp_path / "parquet")
    published, parquet = read_dataset(tmp_path / "published"), read_dataset(tmp_path / "parquet")
    assert len(published.samples) == len(calls) == 24
    for column in ("entity", "time", "day", "label_end"):
        assert published.samples[column].tolist() == parquet.samples[column].tolist()
    for prefix in ("target_", "past_", "callday_"):
        np.testing.assert_allclose(published.matrix(prefix), parquet.matrix(prefix), rtol=1e-5, atol=1e-5)
    assert published.tokens["text"].text.equals(parquet.tokens["text"].text)
    np.testing.assert_allclose(published.tokens["audio"].values, parquet.tokens["audio"].values, rtol=1e-5, atol=6e-5)
    np.testing.assert_allclose(published.tokens["price"].values, parquet.tokens["price"].values, rtol=1e-4, atol=1e-4)
    # The source's own labels, and its past volatilities, which hold the call day's bar.
    for prefix, name in (("target_", "logvol"), ("callday_", "past_logvol")):
        labels = calls[[f"{name}_{days}" for days in (3, 7, 15, 30)]].to_numpy()
        np.testing.assert_allclose(parquet.matrix(prefix)[:, :4], labels, atol=1e-5)


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


@needs_data
def test_no_prepared_token_is_later_than_its_forecast(tmp_path: Path) -> None:
    prepare_maec(SHARED / "maec-raw", tmp_path)
    dataset = read_dataset(tmp_path)
    for table in dataset.tokens.values():
        made = np.repeat(dataset.samples["time"].to_numpy(), np.diff(table.offsets))
        assert (table.time <= made).all()
        assert (made - table.time < 120 * 86_400).all()


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
