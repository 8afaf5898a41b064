"""StockNet (Xu and Cohen, ACL 2018): will the adjusted close of the next trading day be up, from bars and tweets?

The forecast is made at midnight UTC before the target day: the bar of the trading day before is complete, and only
tweets that were sent before then are tokens (by ``created_at``; the source's own ``date`` is that of another time zone
for 7 % of them). The paper keeps the days that moved by less than -0.5 % or above 0.55 %, which nobody knows
beforehand; ``all_days`` keeps every day and asks for the sign.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from fusedmm.train.chart import UNITS as CHART_UNITS
from fusedmm.train.dataset import SECONDS_PER_DAY, DatasetInfo, Float64Array, Int64Array, ModalityInfo
from fusedmm.train.format import DataFormatError, RawTokens, write_dataset
from fusedmm.train.prepare.bars import (
    JUMP,
    MOMENTUM_FEATURES,
    PRICE_UNITS,
    BarSeries,
    BarWindow,
    chart_tokens,
    momentum_table,
    price_tokens,
)
from fusedmm.train.prepare.tables import read_columns, read_csv

DOWN, UP = -0.005, 0.0055  # movement < DOWN: class 0; > UP: class 1; others are dropped (the paper, 5.1)
FIRST_DAY, LAST_DAY = (int(np.datetime64(day, "D").astype(np.int64)) for day in ("2014-01-01", "2015-12-31"))
PRICE_BARS = 30
HISTORY = 33  # bars before the target's: 32 of the chart, and one more for the first return
TWEET_DAYS = 5
COLUMNS = ("date", "open", "high", "low", "close", "volume")


class Tweets(NamedTuple):
    """One stock's tweets in order of time: ``time`` [n] int64 UNIX seconds, ``text`` [n] words joined by spaces."""

    time: Int64Array
    text: list[str]


def prepare_stocknet(source: Path, out: Path, *, all_days: bool = False) -> str:
    """Convert StockNet and return a summary line.

    Args:
        source: a directory with price/raw/<symbol>.csv and tweet/preprocessed/<symbol>/<date> (the published layout),
            or with prices.parquet and tweets.parquet.
        out: directory of the data set.
        all_days: keep the days that the paper's threshold drops.

    Raises:
        DataFormatError: naming file, column and row of what is wrong.
    """
    if (source / "prices.parquet").is_file():
        series, tweets = _read_parquet(source)
    elif (source / "price" / "raw").is_dir():
        series, tweets = _read_published(source)
    else:
        raise FileNotFoundError(f"prepare: SOURCE must hold prices.parquet or price/raw/, got neither in {source}.")
    return _convert(series, tweets, out, all_days)


def _convert(series_of: dict[str, BarSeries], tweets_of: dict[str, Tweets], out: Path, all_days: bool) -> str:
    frames: list[pd.DataFrame] = []
    windows: list[BarWindow] = []
    text_sample: list[Int64Array] = []
    text_time: list[Int64Array] = []
    text: list[str] = []
    count = short = 0
    for symbol, series in sorted(series_of.items()):
        movement = np.round(series.returns(), 6)  # as published: one day of CHL is on the threshold
        chosen = (series.day >= FIRST_DAY) & (series.day <= LAST_DAY) & np.isfinite(movement)
        if not all_days:
            chosen &= (movement < DOWN) | (movement > UP)
        bars = np.flatnonzero(chosen)
        short += int((bars < HISTORY).sum())
        bars = bars[bars >= HISTORY]
        sample = np.arange(count, count + len(bars), dtype=np.int64)
        count += len(bars)
        frame = _samples(symbol, series, bars, sample, movement)
        frames.append(frame)
        windows.extend(BarWindow(int(key), series, int(bar)) for key, bar in zip(sample, bars, strict=True))
        tweets = tweets_of.get(symbol, Tweets(np.zeros(0, np.int64), []))
        made = frame["time"].to_numpy(np.int64)
        first = np.searchsorted(tweets.time, made - TWEET_DAYS * SECONDS_PER_DAY, side="right")
        stop = np.searchsorted(tweets.time, made, side="right")
        for key, low, high in zip(sample, first.tolist(), stop.tolist(), strict=True):
            text_sample.append(np.full(high - low, key))
            text_time.append(tweets.time[low:high])
            text.extend(tweets.text[low:high])
    if count == 0:
        rule = f"prepare: a day of 2014 or 2015 must have {HISTORY} bars before it"
        raise DataFormatError(f"{rule}, got none in {len(series_of)} price series.")
    tokens = {
        "price": price_tokens(windows, PRICE_BARS),
        "text": RawTokens(np.concatenate(text_sample), np.concatenate(text_time), text=text),
        "chart": chart_tokens(windows),
    }
    samples = pd.concat(frames, ignore_index=True)
    write_dataset(out, _info(all_days), samples, tokens)
    skipped = f"{short} have fewer than {HISTORY} bars before"
    return f"{count} days of {len(series_of)} stocks ({skipped}), {len(text)} tweets in {out}"


def _samples(
    symbol: str, series: BarSeries, bars: Int64Array, sample: Int64Array, movement: Float64Array
) -> pd.DataFrame:
    day = series.day[bars]
    past = momentum_table(series)[bars - 1]
    gaps = np.abs(np.nan_to_num(series.gaps())) > JUMP
    frame = {
        "sample": sample,
        "entity": np.full(len(bars), symbol),
        "time": day * SECONDS_PER_DAY,
        "day": day.astype(np.int32),
        "label_end": series.known[bars],
        "target_up": (movement[bars] > 0).astype(np.float64),
    }
    frame |= {f"past_{name}": past[:, column] for column, name in enumerate(MOMENTUM_FEATURES)}
    frame["suspect"] = np.array([gaps[bar - PRICE_BARS : bar + 1].any() for bar in bars], bool)
    return pd.DataFrame(frame)


def _read_parquet(source: Path) -> tuple[dict[str, BarSeries], dict[str, Tweets]]:
    prices = read_columns(source / "prices.parquet", ("symbol", *COLUMNS, "adj_close")).to_pandas()
    series = {
        symbol: _adjusted(frame, f"prices.parquet ({symbol})") for symbol, frame in prices.groupby("symbol", sort=False)
    }
    table = read_columns(source / "tweets.parquet", ("symbol", "created_at", "tokens"))
    time = (
        table.column("created_at")
        .combine_chunks()
        .cast(pa.timestamp("s", "UTC"), safe=False)
        .cast(pa.int64())
        .to_numpy()
    )
    text = [" ".join(words) for words in table.column("tokens").to_pylist()]
    frame = pd.DataFrame({"symbol": table.column("symbol").to_pylist(), "time": time, "text": text}).sort_values(
        "time", kind="stable"
    )
    tweets = {
        symbol: Tweets(rows["time"].to_numpy(np.int64), rows["text"].to_list())
        for symbol, rows in frame.groupby("symbol", sort=False)
    }
    return series, tweets


def _read_published(source: Path) -> tuple[dict[str, BarSeries], dict[str, Tweets]]:
    series, tweets = {}, {}
    for path in sorted((source / "price" / "raw").glob("*.csv")):
        frame = read_csv(path, (*COLUMNS, "adj close")).rename(columns={"adj close": "adj_close"})
        series[path.stem] = _adjusted(frame, path.name)
        rows = [
            row
            for file in sorted((source / "tweet" / "preprocessed" / path.stem).glob("*"))
            for row in _read_tweets(file)
        ]
        rows.sort(key=lambda row: row[0])
        tweets[path.stem] = Tweets(np.array([time for time, _ in rows], np.int64), [text for _, text in rows])
    return series, tweets


def _read_tweets(path: Path) -> list[tuple[int, str]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            tweet = json.loads(line)
            made = datetime.strptime(tweet["created_at"], "%a %b %d %H:%M:%S +0000 %Y").replace(tzinfo=UTC)
            rows.append((int(made.timestamp()), " ".join(tweet["text"])))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            rule = f"prepare: {path.parent.name}/{path.name}, row {number} must be a tweet with text and created_at"
            raise DataFormatError(f"{rule}, got {line[:80]!r} ({error!r}).") from None
    return rows


def _adjusted(frame: pd.DataFrame, file: str) -> BarSeries:
    """Prices times adjusted close over close, so that dividends and splits are no returns; days without prices
    dropped."""
    frame = (
        frame.dropna(subset=["open", "high", "low", "close", "adj_close"])
        .sort_values("date", kind="stable")
        .reset_index(drop=True)
    )
    factor = frame["adj_close"].to_numpy(np.float64) / frame["close"].to_numpy(np.float64)
    prices = {name: frame[name].to_numpy(np.float64) * factor for name in ("open", "high", "low")}
    return BarSeries.from_frame(frame.assign(**prices, close=frame["adj_close"].to_numpy(np.float64)), file)


def _info(all_days: bool) -> DatasetInfo:
    return DatasetInfo(
        name="stocknet-all-days" if all_days else "stocknet",
        task="classification",
        classes=2,
        source="StockNet (Xu and Cohen, ACL 2018)",
        licence="MIT",
        modalities={
            "price": ModalityInfo(
                "numeric", PRICE_UNITS, f"{PRICE_BARS} adjusted daily bars, the last of the trading day before"
            ),
            "text": ModalityInfo("text", (), f"tweets of the {TWEET_DAYS} days before midnight UTC of the target day"),
            "chart": ModalityInfo("image", CHART_UNITS, "candles of the last 32 bars, in patches of 8 x 8 pixels"),
        },
    )
