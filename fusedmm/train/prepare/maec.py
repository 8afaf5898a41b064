"""MAEC (Li, Yang, Smyth, Dong, CIKM 2020): earnings calls with text, audio features and prices; the target is the
volatility after the call.

The hour of a call is not published, so the bar of its day may hold the reaction: bars and past features end with the
day before, the forecast is made at the end of the day (when the call is over), and the target starts at that day's
close. The ``callday_`` columns add the bar of the day, for one baseline.

Known faults of the source and what becomes of them: minimum and maximum intensity are swapped in most rows (the smaller
one is the minimum); -300 dB is digital silence (undefined); ``--undefined--`` is undefined; calls of one sentence stay;
a few spin-offs are not adjusted in the prices (``suspect`` marks samples with an overnight move of more than 35 % log
in their inputs or label; scaled inputs are clipped later).
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from fusedmm.train.chart import UNITS as CHART_UNITS
from fusedmm.train.dataset import SECONDS_PER_DAY, DatasetInfo, Float32Array, Float64Array, Int64Array, ModalityInfo
from fusedmm.train.format import DataFormatError, RawTokens, write_dataset
from fusedmm.train.prepare.bars import (
    JUMP,
    PRICE_UNITS,
    VOLATILITY_FEATURES,
    BarSeries,
    BarWindow,
    chart_tokens,
    price_tokens,
    volatility_table,
)
from fusedmm.train.prepare.maec_source import AUDIO_COLUMNS, Source, read_maec

HORIZONS = (3, 7, 15, 30)
PRICE_BARS = 60
HISTORY = 61  # bars before the call's: 60 returns end with the day before
SILENCE_DB = -100.0  # Praat writes -300 for digital silence; the quietest recorded sentence is far above
INTENSITY = tuple(AUDIO_COLUMNS.index(f"intensity_{name}") for name in ("mean", "min", "max"))
DURATION = AUDIO_COLUMNS.index("audio_length")


def prepare_maec(source: Path, out: Path) -> str:
    """Convert MAEC and return a summary line.

    Args:
        source: a directory with ``MAEC_Dataset/<date>_<ticker>/{text.txt,features.csv}`` and ``prices/<ticker>.us.txt``
            (the published layouts of MAEC and of the Huge Stock Market Dataset), or with calls.parquet, text.parquet,
            audio.parquet and prices.parquet.
        out: directory of the data set.

    Raises:
        DataFormatError: naming file, column and row of what is wrong.
    """
    return _convert(read_maec(source), out)


def clean_audio(audio: Float32Array) -> Float32Array:
    """Put the smaller intensity first and make digital silence undefined: [sentences, 29] to the same."""
    audio = audio.copy()
    _, low, high = INTENSITY
    swapped = audio[:, [low, high]]
    audio[:, low], audio[:, high] = np.fmin(*swapped.T), np.fmax(*swapped.T)
    for column in INTENSITY:
        audio[audio[:, column] < SILENCE_DB, column] = np.nan
    return audio


def _convert(calls: Source, out: Path) -> str:
    rows: list[dict[str, object]] = []
    windows: list[BarWindow] = []
    dropped: Counter[str] = Counter()
    tables = {ticker: volatility_table(series) for ticker, series in calls.series.items()}
    for call, (ticker, day) in enumerate(zip(calls.ticker, calls.day.tolist(), strict=True)):
        series = calls.series.get(ticker)
        bar = int(np.searchsorted(series.day, day)) if series is not None else 0
        if series is None or bar >= len(series.day) or series.day[bar] != day:
            dropped["no bar on its day"] += 1
        elif bar < HISTORY:
            dropped[f"fewer than {HISTORY} bars before"] += 1
        elif bar + max(HORIZONS) >= len(series.day):
            dropped["a label that ends after the prices"] += 1
        elif series.returns()[bar + 1 : bar + 1 + min(HORIZONS)].std() == 0:
            dropped["a price that stands still"] += 1
        else:
            windows.append(BarWindow(call, series, bar))
            rows.append(_sample(call, ticker, series, bar, tables[ticker]))
    if not rows:
        rule = f"prepare: calls must have bars of their tickers and days, got none among {len(calls.ticker)}"
        raise DataFormatError(f"{rule} ({_reasons(dropped)}). Are the prices those of the calls' years?")
    samples = pd.DataFrame(rows)
    sample, time, sentences = _sentences(
        calls, samples["sample"].to_numpy(np.int64), samples["time"].to_numpy(np.int64)
    )
    tokens = {
        "price": price_tokens(windows, PRICE_BARS),
        "text": RawTokens(sample, time, text=calls.text.take(pa.array(sentences))),
        "audio": RawTokens(sample, time, clean_audio(calls.audio[sentences])),
        "chart": chart_tokens(windows),
    }
    write_dataset(out, _info(), samples, tokens)
    return f"{len(samples)} of {len(calls.ticker)} calls ({_reasons(dropped)}), {len(sample)} sentences in {out}"


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in dropped.items()) or "none dropped"


def _sample(call: int, ticker: str, series: BarSeries, bar: int, table: Float64Array) -> dict[str, object]:
    returns, last = series.returns(), bar + max(HORIZONS)
    day = int(series.day[bar])
    row: dict[str, object] = {"sample": call, "entity": ticker, "time": (day + 1) * SECONDS_PER_DAY - 1}
    row |= {"day": np.int32(day), "label_end": int(series.known[last])}
    row |= {f"target_logvol_{days}": float(np.log(returns[bar + 1 : bar + 1 + days].std())) for days in HORIZONS}
    row |= dict(zip([f"past_{name}" for name in VOLATILITY_FEATURES], table[bar - 1].tolist(), strict=True))
    row |= dict(zip([f"callday_{name}" for name in VOLATILITY_FEATURES], table[bar].tolist(), strict=True))
    row["suspect"] = bool((np.abs(series.gaps()[bar - PRICE_BARS : last + 1]) > JUMP).any())
    return row


def _sentences(calls: Source, kept: Int64Array, end: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Sample, time and row of the sentences of the kept calls, whose forecasts are made at ``end``.

    A call ends when the forecast is made; a sentence is known when it has been spoken.
    """
    rows, times = [], []
    seconds = np.nan_to_num(calls.audio[:, DURATION].astype(np.float64))
    for call, made in zip(kept.tolist(), end.tolist(), strict=True):
        row = np.arange(calls.offsets[call], calls.offsets[call + 1])
        after = seconds[row][::-1].cumsum()[::-1] - seconds[row]
        rows.append(row)
        times.append(made - np.rint(after).astype(np.int64))
    lengths = calls.offsets[kept + 1] - calls.offsets[kept]
    return np.repeat(kept, lengths), np.concatenate(times), np.concatenate(rows)


def _info() -> DatasetInfo:
    return DatasetInfo(
        name="maec",
        task="regression",
        source="MAEC (Li, Yang, Smyth, Dong, CIKM 2020); prices: Huge Stock Market Dataset",
        licence="CC BY-SA 4.0; prices CC0 at second hand",
        persistence="past_logvol_30",
        modalities={
            "price": ModalityInfo(
                "numeric", PRICE_UNITS, f"{PRICE_BARS} daily bars, the last of the day before the call"
            ),
            "text": ModalityInfo("text", (), "sentences of the call; it ends when the forecast is made"),
            "audio": ModalityInfo("numeric", AUDIO_COLUMNS, "Praat features of each sentence"),
            "chart": ModalityInfo("image", CHART_UNITS, "candles of the last 32 bars, in patches of 8 x 8 pixels"),
        },
    )
