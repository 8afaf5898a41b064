"""The converter of MAEC: every fault of the source has a test, both layouts agree, nothing late gets in."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusedmm.train.format import DataFormatError, Dataset, read_dataset
from fusedmm.train.prepare.maec import INTENSITY, clean_audio, prepare_maec
from fusedmm.train.prepare.maec_source import AUDIO_COLUMNS
from tests.public_sources import CALL_BAR, LOUD, PRICES, SHARED, UNDEFINED, needs_data, published_maec, subset, walk

ZERO, EMPTY = "2014-01-02,0,1,1,1,5,0", "2014-01-02,1,1,1,,5,0"


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
def test_no_prepared_token_is_later_than_its_forecast(tmp_path: Path) -> None:
    prepare_maec(SHARED / "maec-raw", tmp_path)
    dataset = read_dataset(tmp_path)
    for table in dataset.tokens.values():
        made = np.repeat(dataset.samples["time"].to_numpy(), np.diff(table.offsets))
        assert (table.time <= made).all()
        assert (made - table.time < 120 * 86_400).all()
