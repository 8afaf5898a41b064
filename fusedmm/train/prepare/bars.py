"""Daily bars as model inputs: price tokens, past features, charts. Row j of every table uses bars up to j and nothing
later."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view

from fusedmm.train.chart import BARS, cut_patches, draw_candles
from fusedmm.train.dataset import SECONDS_PER_DAY, Float32Array, Float64Array, Int64Array
from fusedmm.train.format import DataFormatError, RawTokens

CLOSE_SECONDS = 21 * 3600  # New York closes at 20:00 or 21:00 UTC: the later one, whatever the season
RETURN_FLOOR = 0.005  # log(|r| + floor): moves under half a percent are all small
VOLATILITY_FLOOR = 1e-4
PRICE_UNITS = (
    "log return",
    "log open / previous close",
    "log high / low",
    "log close / open",
    "log(|return| + .005)",
    "log volume / previous volume",
    "log volatility of 5 days",
    "log volatility of 20 days",
)
VOLATILITY_DAYS = (3, 7, 15, 30, 60)
VOLATILITY_FEATURES = (*(f"logvol_{days}" for days in VOLATILITY_DAYS), "logabs_1", "logabs_2", "logmax_60")
MOMENTUM_DAYS = (1, 2, 3, 5, 10, 20)
MOMENTUM_FEATURES = (*(f"return_{days}" for days in MOMENTUM_DAYS), "logvol_5", "logvol_20")
JUMP = 0.35  # overnight: the size of an unadjusted split or spin-off, rarely of news
CHART_CHUNK = 512  # samples drawn at once: bounds the drawing's memory to tens of MB


@dataclass(frozen=True)
class BarSeries:
    """One entity's daily bars in order: ``day`` [n] int64 since 1970-01-01; prices (adjusted) and volume [n]
    float64."""

    day: Int64Array
    open: Float64Array
    high: Float64Array
    low: Float64Array
    close: Float64Array
    volume: Float64Array

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, file: str) -> "BarSeries":
        """From columns date, open, high, low, close, volume, in the file's order.

        Raises:
            DataFormatError: for days out of order or twice, or prices that are not positive numbers; names ``file`` and
                the row.
        """
        day = pd.to_datetime(frame["date"]).to_numpy("datetime64[D]").astype(np.int64)
        columns = {
            name: frame[name].to_numpy(np.float64, na_value=np.nan)
            for name in ("open", "high", "low", "close", "volume")
        }
        if len(day) > 1 and (np.diff(day) <= 0).any():
            row = int((np.diff(day) <= 0).argmax()) + 1
            rule = f"prepare: {file} column date, row {row} must be after the day before it"
            raise DataFormatError(f"{rule}, got {frame['date'].iloc[row]}.")
        for name, values in columns.items():
            bad = ~(values >= 0) if name == "volume" else ~((values > 0) & np.isfinite(values))
            if bad.any():
                row = int(bad.argmax())
                rule = f"prepare: {file} column {name}, row {row} must be a positive number"
                raise DataFormatError(f"{rule}, got {values[row]}. Drop the row.")
        return cls(day, **columns)

    @property
    def known(self) -> Int64Array:
        """[n] int64, when each bar is complete."""
        return self.day * SECONDS_PER_DAY + CLOSE_SECONDS

    def returns(self) -> Float64Array:
        """[n] simple returns close to close; NaN for the first bar."""
        return np.concatenate([[np.nan], self.close[1:] / self.close[:-1] - 1])

    def gaps(self) -> Float64Array:
        """[n] log of the open over the previous close; NaN for the first bar."""
        return np.concatenate([[np.nan], np.log(self.open[1:] / self.close[:-1])])


def trailing_log_volatility(returns: Float64Array, days: int) -> Float64Array:
    """[n] log of the population standard deviation of the last ``days`` returns, this one included; NaN where there are
    fewer."""
    volatility = np.full(len(returns), np.nan)
    if len(returns) > days:
        volatility[days:] = sliding_window_view(returns[1:], days).std(axis=1)
    logs: Float64Array = np.log(np.maximum(volatility, VOLATILITY_FLOOR))
    return logs


def price_table(series: BarSeries) -> Float32Array:
    """[n, 8] float32 in `PRICE_UNITS`; NaN where a column looks back before the first bar."""
    returns = series.returns()
    volume = np.log(series.volume + 1)
    columns = [
        np.log1p(returns),
        series.gaps(),
        np.log(series.high / series.low),
        np.log(series.close / series.open),
        np.log(np.abs(returns) + RETURN_FLOOR),
        np.concatenate([[np.nan], np.diff(volume)]),
        trailing_log_volatility(returns, 5),
        trailing_log_volatility(returns, 20),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def volatility_table(series: BarSeries) -> Float64Array:
    """[n, 8] in `VOLATILITY_FEATURES`: volatilities, the last two absolute returns, the largest of 60 days."""
    returns = series.returns()
    size = np.log(np.abs(returns) + RETURN_FLOOR)
    largest = np.full(len(returns), np.nan)
    if len(returns) > 60:
        largest[60:] = sliding_window_view(size[1:], 60).max(axis=1)
    before = np.concatenate([[np.nan], size[:-1]])
    return np.stack(
        [*(trailing_log_volatility(returns, days) for days in VOLATILITY_DAYS), size, before, largest], axis=1
    )


def momentum_table(series: BarSeries) -> Float64Array:
    """[n, 8] in `MOMENTUM_FEATURES`: log returns over some days, and log volatilities."""
    price = np.log(series.close)
    columns = []
    for days in MOMENTUM_DAYS:
        column = np.full(len(price), np.nan)
        column[days:] = price[days:] - price[:-days]
        columns.append(column)
    returns = series.returns()
    return np.stack([*columns, trailing_log_volatility(returns, 5), trailing_log_volatility(returns, 20)], axis=1)


class BarWindow(NamedTuple):
    """The bars that sample ``sample`` may see: those of ``series`` before bar ``stop``."""

    sample: int
    series: BarSeries
    stop: int


def price_tokens(windows: Sequence[BarWindow], bars: int) -> RawTokens:
    """The last ``bars`` bars of each window as tokens, knowable at their close."""
    tables: dict[int, Float32Array] = {}
    values, times = [], []
    for window in windows:
        key = id(window.series)
        if key not in tables:
            tables[key] = price_table(window.series)
        table = tables[key]
        values.append(table[window.stop - bars : window.stop])
        times.append(window.series.known[window.stop - bars : window.stop])
    sample = np.repeat(np.array([window.sample for window in windows], np.int64), bars)
    return RawTokens(sample, np.concatenate(times), np.concatenate(values))


def chart_tokens(windows: Sequence[BarWindow]) -> RawTokens:
    """A chart of the last `fusedmm.train.chart.BARS` bars as patches, knowable when the last bar is: it sets the scale
    of all."""
    patches = []
    for start in range(0, len(windows), CHART_CHUNK):
        chunk = windows[start : start + CHART_CHUNK]
        drawn = draw_candles(
            *(
                np.stack([getattr(w.series, name)[w.stop - BARS : w.stop] for w in chunk])
                for name in ("open", "high", "low", "close", "volume")
            )
        )
        patches.append(cut_patches(drawn))
    values = np.concatenate(patches)
    sample = np.array([window.sample for window in windows], np.int64)
    time = np.array([window.series.known[window.stop - 1] for window in windows], np.int64)
    return RawTokens(
        np.repeat(sample, values.shape[1]), np.repeat(time, values.shape[1]), values.reshape(-1, values.shape[2])
    )
