"""The public sources in miniature, with the faults they have: what the tests of the converters read."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from fusedmm.train.prepare.maec import INTENSITY
from fusedmm.train.prepare.maec_source import AUDIO, AUDIO_COLUMNS

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not in ../shared/data")
CALL_BAR = 70
LOUD = 66.0
PRICES = "ab-c.us.txt"
UNDEFINED = AUDIO_COLUMNS.index("shimmer_apq11")
TWEETS = {
    "2015-04-08": [
        ("Wed Apr 08 23:59:59 +0000 2015", ["$", "xy", "up"]),
        ("Thu Apr 09 00:00:01 +0000 2015", ["too", "late"]),
        ("Wed Apr 08 09:00:00 +0000 2015", ["early"]),
    ],
    "2015-04-02": [("Thu Apr 02 12:00:00 +0000 2015", ["long", "ago"])],
}


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


def published_stocknet(root: Path, prices: pd.DataFrame, tweets: dict[str, list[tuple[str, list[str]]]]) -> None:
    (root / "price" / "raw").mkdir(parents=True)
    frame = prices.rename(columns=str.capitalize).assign(**{"Adj Close": prices["close"] / 2})
    frame.to_csv(root / "price" / "raw" / "XY.csv", index=False)
    folder = root / "tweet" / "preprocessed" / "XY"
    folder.mkdir(parents=True)
    for day, entries in tweets.items():
        lines = [json.dumps({"text": words, "created_at": made, "user_id_str": "1"}) for made, words in entries]
        (folder / day).write_text("\n".join(lines) + "\n")


def subset(source: Path, target: Path, column: str, keep: list[object]) -> None:
    pq.write_table(pq.read_table(source, filters=[(column, "in", keep)]), target / source.name)
