"""Splits by date, purged and with an embargo; never by row.

A label that looks h days ahead overlaps the next part of the data: rows whose ``label_end`` reaches into it are dropped
(the purge), and an embargo leaves out further days for what labels do not show (slow news, autocorrelation). Rows of
one day share the market's move, so rows shuffled between train and test leak it: on StockNet the same boosting model
scores 77.6 % when rows are shuffled and 51.9 % walk-forward.
"""

from collections.abc import Iterator
from datetime import date
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from fusedmm.train.dataset import SECONDS_PER_DAY, Int64Array

EPOCH = date(1970, 1, 1).toordinal()
TRAIN_SHARE, DEV_SHARE = 0.7, 0.1


class Split(NamedTuple):
    """Row numbers [n] int64 of the samples in each part, in order of time."""

    train: Int64Array
    dev: Int64Array
    test: Int64Array


def split_by_date(
    samples: pd.DataFrame,
    *,
    train_end: str | None = None,
    dev_start: str | None = None,
    dev_end: str | None = None,
    test_start: str | None = None,
    test_end: str | None = None,
    embargo_days: int = 0,
    shuffle: bool = False,
) -> Split:
    """Split into train, dev and test by the day of the forecast.

    Args:
        samples: columns ``day``, ``time`` and, where labels look ahead, ``label_end``.
        train_end, dev_start, dev_end, test_start, test_end: days as YYYY-MM-DD, inclusive. None: dev starts on the day
            after ``train_end``, dev and test touch, and the test ends with the data. Without ``train_end`` (then
            without any of them) the first 70 % of the days are train, the next 10 % dev, the others test.
        embargo_days: a label of train must end more than so many days before dev starts, and one of dev before the test
            starts. With 0 it must have ended.
        shuffle: refused.

    Raises:
        ValueError: for shuffled rows, a date that is none or out of order, or a part without rows.
    """
    if shuffle:
        raise ValueError(
            "split_by_date: shuffle must be False, got True: rows of one day share the market's move: shuffled rows "
            "leak it into the test (StockNet, one model: 77.6 % shuffled, 51.9 % walk-forward). Split by date."
        )
    if embargo_days < 0:
        raise ValueError(f"split_by_date: embargo_days must be at least 0, got {embargo_days}.")
    given = {
        "train_end": train_end,
        "dev_start": dev_start,
        "dev_end": dev_end,
        "test_start": test_start,
        "test_end": test_end,
    }
    days = {name: _day("split_by_date", name, text) for name, text in given.items() if text is not None}
    if not days:
        unique = np.unique(samples["day"].to_numpy(np.int64))
        ends = [
            unique[min(int(len(unique) * share), len(unique)) - 1] for share in (TRAIN_SHARE, TRAIN_SHARE + DEV_SHARE)
        ]
        days = {"train_end": int(ends[0]), "dev_end": int(ends[1])}
    elif "train_end" not in days:
        raise ValueError(f"split_by_date: train_end must be given with {', '.join(days)}, got None.")
    elif "dev_end" not in days and "test_start" not in days:
        raise ValueError("split_by_date: dev_end or test_start must be given with train_end, got neither.")
    days.setdefault("dev_start", days["train_end"] + 1)
    days.setdefault("dev_end", days.get("test_start", 0) - 1)
    days.setdefault("test_start", days["dev_end"] + 1)
    days.setdefault("test_end", int(samples["day"].max()))
    return _purged(samples, days, embargo_days, "split_by_date")


def walk_forward(
    samples: pd.DataFrame,
    *,
    train_days: int,
    dev_days: int,
    test_days: int,
    embargo_days: int = 0,
    shuffle: bool = False,
) -> Iterator[Split]:
    """Folds whose train part grows: each tests the next ``test_days`` and tunes on the ``dev_days`` before them.

    Args:
        samples: as for `split_by_date`.
        train_days: calendar days before the first dev part.
        dev_days: calendar days of each dev part; more than a label's reach, or the purge leaves nothing.
        test_days: calendar days of each test part.
        embargo_days, shuffle: as for `split_by_date`.

    Yields:
        A split for each stretch of days that has samples to test.
    """
    for name, value in (("train_days", train_days), ("dev_days", dev_days), ("test_days", test_days)):
        if value < 1:
            raise ValueError(f"walk_forward: {name} must be at least 1, got {value}.")
    if shuffle:
        split_by_date(samples, shuffle=True)
    day = samples["day"].to_numpy(np.int64)
    first_test = int(day.min()) + train_days + dev_days
    if first_test > day.max():
        rule = "walk_forward: train_days + dev_days must leave days to test"
        raise ValueError(f"{rule}, got {train_days + dev_days} of {int(np.ptp(day)) + 1} days.")
    for start in range(first_test, int(day.max()) + 1, test_days):
        stop = start + test_days - 1
        if not ((day >= start) & (day <= stop)).any():
            continue
        bounds = {
            "train_end": start - dev_days - 1,
            "dev_start": start - dev_days,
            "dev_end": start - 1,
            "test_start": start,
            "test_end": stop,
        }
        yield _purged(samples, bounds, embargo_days, "walk_forward")


def _day(op: str, name: str, text: str) -> int:
    try:
        return date.fromisoformat(text).toordinal() - EPOCH
    except ValueError:
        raise ValueError(f"{op}: {name} must be a date YYYY-MM-DD, got {text!r}.") from None


def _iso(day: int) -> str:
    return date.fromordinal(day + EPOCH).isoformat()


def _purged(samples: pd.DataFrame, days: dict[str, int], embargo_days: int, op: str) -> Split:
    order = ("train_end", "dev_start", "dev_end", "test_start", "test_end")
    for earlier, later in pairwise(order):
        apart = 0 if later.endswith("_end") else 1
        if days[later] < days[earlier] + apart:
            rule = f"{op}: {later} must be {'after' if apart else 'on or after'} {earlier}={_iso(days[earlier])}"
            raise ValueError(f"{rule}, got {_iso(days[later])}.")
    day = samples["day"].to_numpy(np.int64)
    known = samples["label_end" if "label_end" in samples.columns else "time"].to_numpy(np.int64)
    by_time = np.argsort(samples["time"].to_numpy(np.int64), kind="stable")
    parts = {}
    for part, first, last, until in (
        ("train", int(day.min()), days["train_end"], days["dev_start"]),
        ("dev", days["dev_start"], days["dev_end"], days["test_start"]),
        ("test", days["test_start"], days["test_end"], None),
    ):
        inside = (day >= first) & (day <= last)
        kept = inside if until is None else inside & (known < (until - embargo_days) * SECONDS_PER_DAY)
        if not kept.any():
            raise ValueError(
                f"{op}: {part} must have samples, got none of {int(inside.sum())} from {_iso(first)} to {_iso(last)} "
                "after the purge. Move the dates, or shorten the embargo."
            )
        parts[part] = by_time[kept[by_time]].astype(np.int64)
    return Split(**parts)
