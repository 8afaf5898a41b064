"""Reading MAEC in its two layouts: as published (a folder a call, a text file a ticker), and as four parquet files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from fusedmm.train.dataset import Float32Array, Int64Array
from fusedmm.train.format import DataFormatError
from fusedmm.train.prepare.bars import BarSeries
from fusedmm.train.prepare.tables import read_columns, read_csv

# Published name, name here; the order of the published file.
AUDIO = {
    "Mean pitch": "pitch_mean",
    "Standard deviation": "pitch_sd",
    "Minimum pitch": "pitch_min",
    "Maximum pitch": "pitch_max",
    "Mean intensity": "intensity_mean",
    "Minimum intensity": "intensity_min",
    "Maximum intensity": "intensity_max",
    "Number of pulses": "n_pulses",
    "Number of periods": "n_periods",
    "Mean period": "period_mean",
    "Standard deviation of period": "period_sd",
    "Fraction of unvoiced": "unvoiced_frac",
    "Number of voice breaks": "n_voice_breaks",
    "Degree of voice breaks": "voice_breaks_degree",
    "Jitter local": "jitter_local",
    "Jitter local absolute": "jitter_local_abs",
    "Jitter rap": "jitter_rap",
    "Jitter ppq5": "jitter_ppq5",
    "Jitter ddp": "jitter_ddp",
    "Shimmer local": "shimmer_local",
    "Shimmer local dB": "shimmer_local_db",
    "Shimmer apq3": "shimmer_apq3",
    "Shimmer apq5": "shimmer_apq5",
    "Shimmer apq11": "shimmer_apq11",
    "Shimmer dda": "shimmer_dda",
    "Mean autocorrelation": "autocorr_mean",
    "Mean NHR": "nhr_mean",
    "Mean HNR": "hnr_mean",
    "Audio Length": "audio_length",
}
AUDIO_COLUMNS = tuple(AUDIO.values())


class Source(NamedTuple):
    """What both layouts hold.

    Attributes:
        ticker: [C] strings.
        day: [C] int64, the day of each call.
        offsets: [C+1] int64, the sentences of each call.
        text: the sentences, in order.
        audio: [sentences, 29] float32 in `AUDIO_COLUMNS`.
        series: bars by ticker.
    """

    ticker: list[str]
    day: Int64Array
    offsets: Int64Array
    text: pa.Array
    audio: Float32Array
    series: dict[str, BarSeries]


def read_maec(source: Path) -> Source:
    """Read either layout.

    Raises:
        DataFormatError: naming file, column and row of what is wrong.
        FileNotFoundError: where the directory holds neither layout.
    """
    if (source / "calls.parquet").is_file():
        return _read_parquet(source)
    if (source / "MAEC_Dataset").is_dir():
        return _read_published(source)
    raise FileNotFoundError(f"prepare: SOURCE must hold calls.parquet or MAEC_Dataset/, got neither in {source}.")


def _read_parquet(source: Path) -> Source:
    calls = read_columns(source / "calls.parquet", ("call", "ticker", "date"))
    text = read_columns(source / "text.parquet", ("call", "sent", "text"))
    audio = read_columns(source / "audio.parquet", ("call", "sent", *AUDIO_COLUMNS))
    keys, audio_keys = (
        np.stack([table.column(name).to_numpy().astype(np.int64) for name in ("call", "sent")], axis=1)
        for table in (text, audio)
    )
    if keys.shape != audio_keys.shape:
        raise DataFormatError(
            f"prepare: audio.parquet must have the {len(keys)} rows of text.parquet, got {len(audio_keys)}."
        )
    differs = (keys != audio_keys).any(axis=1)
    if differs.any():
        row = int(differs.argmax())
        rule = (
            f"prepare: audio.parquet columns call, sent, row {row} must be those of text.parquet {keys[row].tolist()}"
        )
        raise DataFormatError(f"{rule}, got {audio_keys[row].tolist()}.")
    order = np.lexsort(keys.T[::-1])
    call = calls.column("call").to_numpy().astype(np.int64)
    if (np.diff(call) <= 0).any():
        row = int((np.diff(call) <= 0).argmax()) + 1
        raise DataFormatError(
            f"prepare: calls.parquet column call, row {row} must be larger than before, got {call[row]}."
        )
    unknown = ~np.isin(keys[:, 0], call)
    if unknown.any():
        row = int(unknown.argmax())
        raise DataFormatError(
            f"prepare: text.parquet column call, row {row} must be in calls.parquet, got {keys[row, 0]}."
        )
    prices = read_columns(
        source / "prices.parquet", ("ticker", "date", "open", "high", "low", "close", "volume")
    ).to_pandas()
    tickers = calls.column("ticker").to_pylist()
    wanted = prices[prices["ticker"].isin(set(tickers))]
    return Source(
        ticker=tickers,
        day=pd.to_datetime(calls.column("date").to_pandas()).to_numpy("datetime64[D]").astype(np.int64),
        offsets=np.searchsorted(keys[order, 0], [*call, call[-1] + 1]).astype(np.int64),
        text=text.column("text").combine_chunks().take(pa.array(order)),
        audio=np.stack([audio.column(name).to_numpy().astype(np.float32) for name in AUDIO_COLUMNS], axis=1)[order],
        series={
            ticker: BarSeries.from_frame(frame, f"prices.parquet ({ticker})")
            for ticker, frame in wanted.groupby("ticker", sort=False)
        },
    )


def _read_published(source: Path) -> Source:
    folders = sorted(path for path in (source / "MAEC_Dataset").iterdir() if path.is_dir())
    if not folders:
        raise DataFormatError(f"prepare: {source / 'MAEC_Dataset'} must hold a folder for each call, got none.")
    tickers: list[str] = []
    days: list[int] = []
    lengths: list[int] = []
    sentences: list[str] = []
    audio: list[Float32Array] = []
    for folder in folders:
        stamp, _, ticker = folder.name.partition("_")
        try:
            days.append(int(np.datetime64(f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:]}", "D").astype(np.int64)))
        except ValueError:
            raise DataFormatError(
                f"prepare: folder {folder.name} must be named <YYYYMMDD>_<ticker>, got another name."
            ) from None
        # A sentence is a line. A byte that is not UTF-8 is replaced: it must not stop the other 300,000 sentences.
        lines = (folder / "text.txt").read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
        features = _read_features(folder / "features.csv")
        if len(lines) != len(features):
            rule = f"prepare: {folder.name}/features.csv must have a row for each of the {len(lines)} lines of text.txt"
            raise DataFormatError(f"{rule}, got {len(features)}.")
        tickers.append(ticker)
        lengths.append(len(lines))
        sentences.extend(line.rstrip("\r") for line in lines)
        audio.append(features)
    return Source(
        ticker=tickers,
        day=np.array(days, np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        text=pa.array(sentences, pa.large_string()),
        audio=np.concatenate(audio),
        series={
            ticker: series
            for ticker in sorted(set(tickers))
            if (series := _read_prices(source / "prices", ticker)) is not None
        },
    )


def _read_features(path: Path) -> Float32Array:
    header, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if [name.strip() for name in header.split(",")] != list(AUDIO):
        raise DataFormatError(
            f"prepare: {path.parent.name}/{path.name}, row 0 must name the 29 published features, got {header!r}."
        )
    values = np.empty((len(lines), len(AUDIO)), np.float32)
    for row, line in enumerate(lines):
        cells = line.split(",")
        try:
            values[row] = [np.nan if "undefined" in cell else float(cell) for cell in cells]
        except ValueError as error:
            rule = f"prepare: {path.parent.name}/{path.name}, row {row + 1} must hold 29 numbers or --undefined--"
            raise DataFormatError(f"{rule}, got {line!r} ({error}).") from None
    return values


def _read_prices(folder: Path, ticker: str) -> BarSeries | None:
    """Bars of a ticker; None where there is no file of it (share classes are written BRK.B in one source and brk-b in
    the other)."""
    path = folder / f"{ticker.lower().replace('.', '-')}.us.txt"
    if not path.is_file():
        return None
    frame = read_csv(path, ("date", "open", "high", "low", "close", "volume"))
    return BarSeries.from_frame(frame, path.name)
