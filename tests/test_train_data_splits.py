"""Splits by date: parts in order, no label of one part known only in the next, and never by row."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmm.train.splits import Split, split_by_date, walk_forward

FIRST = 18_000  # 2019-04-14
SECONDS = 86_400


def market(days: int = 100, entities: int = 3, label_days: int = 5, seed: int = 0) -> pd.DataFrame:
    """Samples of every day in a random order."""
    day = np.repeat(FIRST + np.arange(days), entities)
    day = np.random.default_rng(seed).permutation(day)
    time = day * SECONDS  # midnight: a label that ends as the next part starts is on the edge
    return pd.DataFrame(
        {"sample": np.arange(len(day)), "day": day, "time": time, "label_end": time + label_days * SECONDS}
    )


def iso(offset: int) -> str:
    return str(np.datetime64(FIRST + offset, "D"))


@settings(max_examples=40, deadline=None)
@given(
    label_days=st.integers(0, 12),
    embargo=st.integers(0, 6),
    gap=st.integers(0, 5),
    train=st.integers(30, 50),
    seed=st.integers(0, 9),
)
def test_no_label_reaches_the_next_part(label_days: int, embargo: int, gap: int, train: int, seed: int) -> None:
    samples = market(label_days=label_days, seed=seed)
    bounds = {"train_end": train, "dev_start": train + 1 + gap, "dev_end": train + 25, "test_start": train + 26 + gap}
    split = split_by_date(samples, embargo_days=embargo, **{name: iso(day) for name, day in bounds.items()})  # type: ignore[arg-type]
    day, label_end = samples["day"].to_numpy() - FIRST, samples["label_end"].to_numpy()
    for rows, later in ((split.train, "dev_start"), (split.dev, "test_start")):
        start = (FIRST + bounds[later] - embargo) * SECONDS
        assert (label_end[rows] < start).all()
    assert day[split.train].max() <= bounds["train_end"]
    assert bounds["dev_start"] <= day[split.dev].min()
    assert day[split.dev].max() <= bounds["dev_end"]
    assert day[split.test].min() == bounds["test_start"]
    # Nothing is dropped without a reason.
    kept = (day <= bounds["train_end"]) & (label_end < (FIRST + bounds["dev_start"] - embargo) * SECONDS)
    assert sorted(split.train) == np.flatnonzero(kept).tolist()
    assert sorted(split.test) == np.flatnonzero(day >= bounds["test_start"]).tolist()


def test_rows_are_in_order_of_time_and_in_one_part_only() -> None:
    samples = market()
    split = split_by_date(samples)
    for rows in split:
        assert (np.diff(samples["time"].to_numpy()[rows]) >= 0).all()
    joined = np.concatenate(split)
    assert len(np.unique(joined)) == len(joined)


def test_shares_of_the_days_where_no_date_is_given() -> None:
    samples = market(label_days=0)
    day = samples["day"].to_numpy() - FIRST
    split = split_by_date(samples)
    assert (day[split.train].max(), day[split.dev].min(), day[split.dev].max()) == (69, 70, 79)
    assert (day[split.test].min(), day[split.test].max()) == (80, 99)


def test_without_label_end_the_label_is_known_at_once() -> None:
    samples = market().drop(columns="label_end")
    split = split_by_date(samples, train_end=iso(49), dev_end=iso(59))
    assert (len(split.train), len(split.dev), len(split.test)) == (150, 30, 120)


def test_shuffled_rows_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"shuffle must be False, got True.*77\.6 % shuffled, 51\.9 % walk-forward"):
        split_by_date(market(), shuffle=True)
    with pytest.raises(ValueError, match=r"shuffle must be False, got True"):
        next(walk_forward(market(), train_days=50, dev_days=10, test_days=10, shuffle=True))


ENDS = {"train_end": iso(40), "dev_end": iso(60)}


@pytest.mark.parametrize(
    ("dates", "says"),
    [
        ({"train_end": "2019-4-1x"}, "train_end must be a date YYYY-MM-DD, got '2019-4-1x'"),
        ({"dev_end": iso(60)}, "train_end must be given with dev_end, got None"),
        ({"train_end": iso(40)}, "dev_end or test_start must be given with train_end"),
        ({**ENDS, "dev_start": iso(40)}, f"dev_start must be after train_end={iso(40)}, got {iso(40)}"),
        ({**ENDS, "test_start": iso(60)}, f"test_start must be after dev_end={iso(60)}, got {iso(60)}"),
        ({**ENDS, "test_end": iso(50)}, f"test_end must be on or after test_start={iso(61)}, got {iso(50)}"),
        ({"train_end": iso(-5), "dev_end": iso(60)}, "train must have samples, got none of 0"),
        ({"train_end": iso(40), "dev_end": iso(43)}, "dev must have samples, got none of 9"),
    ],
)
def test_dates_out_of_order_or_empty_parts(dates: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match="split_by_date: ") as error:
        split_by_date(market(), **dates)  # type: ignore[arg-type]
    assert says in str(error.value)


def test_negative_embargo() -> None:
    with pytest.raises(ValueError, match="embargo_days must be at least 0, got -1"):
        split_by_date(market(), embargo_days=-1)


def test_walk_forward_tests_every_later_day_once_and_trains_on_a_growing_past() -> None:
    samples = market(label_days=4)
    folds = list(walk_forward(samples, train_days=40, dev_days=15, test_days=10, embargo_days=1))
    day, label_end = samples["day"].to_numpy(), samples["label_end"].to_numpy()
    tested = np.concatenate([fold.test for fold in folds])
    assert sorted(tested) == np.flatnonzero(day >= FIRST + 55).tolist()
    sizes = [len(fold.train) for fold in folds]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    for fold in folds:
        assert isinstance(fold, Split)
        assert label_end[fold.train].max() < (day[fold.dev].min() - 1) * SECONDS
        assert label_end[fold.dev].max() < (day[fold.test].min() - 1) * SECONDS


def test_walk_forward_skips_stretches_without_samples() -> None:
    samples = market(label_days=0)
    samples = samples[(samples["day"] < FIRST + 65) | (samples["day"] >= FIRST + 75)].reset_index(drop=True)
    starts = [
        samples["day"].to_numpy()[fold.test].min() - FIRST
        for fold in walk_forward(samples, train_days=45, dev_days=15, test_days=5)
    ]
    assert starts[0] == 60
    assert not any(65 <= start < 75 for start in starts)


def test_walk_forward_refuses_what_leaves_nothing() -> None:
    with pytest.raises(ValueError, match="test_days must be at least 1, got 0"):
        next(walk_forward(market(), train_days=5, dev_days=5, test_days=0))
    with pytest.raises(ValueError, match=r"train_days \+ dev_days must leave days to test, got 200 of 100 days"):
        next(walk_forward(market(), train_days=150, dev_days=50, test_days=5))
