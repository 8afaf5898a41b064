"""Runs of tokens become one: nothing is lost, nothing crosses a sample, nothing is known too early."""

import numpy as np
import pyarrow as pa
import pytest

from fusedmm.train.format import Dataset, TokenTable
from fusedmm.train.pool import pool_dataset
from fusedmm.train.simulate import MarketConfig, simulate

OFFSETS = np.array([0, 5, 5, 7], np.int64)  # five tokens, none, two
TIME = np.array([1, 2, 3, 4, 5, 1, 9], np.int64)


def dataset(table: TokenTable) -> Dataset:
    info, samples, _ = simulate(MarketConfig(days=3, entities=1))
    return Dataset(info, samples, {"text": table, "other": table})


def test_numbers_are_averaged_over_what_is_defined() -> None:
    values = np.array([[1, 9], [3, np.nan], [5, np.nan], [7, np.nan], [8, 2], [1, 1], [2, 5]], np.float32)
    table = TokenTable(time=TIME, values=values, text=None, offsets=OFFSETS)
    pooled = pool_dataset(dataset(table), ["text"], 2)
    found = pooled.tokens["text"]
    assert found.values is not None
    np.testing.assert_array_equal(found.offsets, [0, 3, 3, 4])
    np.testing.assert_array_equal(found.time, [2, 4, 5, 9])
    np.testing.assert_array_equal(found.values, np.array([[2, 9], [6, np.nan], [8, 2], [1.5, 3]], np.float32))
    assert pooled.tokens["other"] is table


def test_sentences_are_joined() -> None:
    text = pa.array(["a", "b", "c", "d", "e", "f", "g"], pa.large_string())
    table = TokenTable(time=TIME, values=None, text=text, offsets=OFFSETS)
    found = pool_dataset(dataset(table), ["text"], 3).tokens["text"]
    assert found.text is not None
    assert found.text.to_pylist() == ["a b c", "d e", "f g"]
    np.testing.assert_array_equal(found.time, [3, 5, 9])


def test_unknown_modality_is_refused() -> None:
    table = TokenTable(time=TIME, values=np.zeros((7, 1), np.float32), text=None, offsets=OFFSETS)
    with pytest.raises(ValueError, match=r"names must be among text, other, got 'texts'"):
        pool_dataset(dataset(table), ["texts"], 2)
