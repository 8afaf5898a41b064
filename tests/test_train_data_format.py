"""The data format: what is written is read again; what is wrong gets one error naming file, column and row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusedmm.train.format import DataFormatError, DatasetInfo, ModalityInfo, RawTokens, read_dataset, write_dataset

DAY = 18_000
NOON = DAY * 86_400 + 43_200


def write_small(directory: Path, *, task: str = "regression") -> None:
    """Three samples, the last without text; tokens out of order on purpose."""
    table = pd.DataFrame(
        {
            "sample": np.array([7, 3, 9]),
            "entity": ["A", "B", "A"],
            "time": np.array([NOON, NOON + 10, NOON + 86_400]),
            "day": np.array([DAY, DAY, DAY + 1], np.int32),
            "label_end": np.array([NOON, NOON + 20, NOON + 86_400]),
            "target_up" if task == "classification" else "target_a": [1.0, 0.0, 1.0],
            "past_x": [0.5, -0.5, 1.5],
        }
    )
    described = DatasetInfo(
        name="small",
        task=task,
        classes=2 if task == "classification" else None,
        source="a test",
        licence="Apache-2.0",
        modalities={"price": ModalityInfo("numeric", ("open", "close")), "text": ModalityInfo("text")},
    )
    bars = RawTokens(
        np.array([9, 7, 7]), np.array([NOON, NOON, NOON - 5]), np.array([[5, 6], [3, np.nan], [1, 2]], np.float32)
    )
    words = RawTokens(np.array([3, 7]), np.array([NOON + 10, NOON - 1]), text=["beta", "alpha"])
    write_dataset(directory, described, table, {"price": bars, "text": words})


def replace(directory: Path, file: str, column: str, values: pa.Array | list[object] | None) -> None:
    """Put another column, or none, in the place of a column."""
    table = pq.read_table(directory / file)
    index = table.schema.get_field_index(column)
    table = table.drop_columns([column]) if values is None else table.set_column(index, column, pa.array(values))
    pq.write_table(table, directory / file)


def edit_info(directory: Path, **changes: object) -> None:
    path = directory / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_reads_what_was_written_sorted_by_sample_and_time(tmp_path: Path) -> None:
    write_small(tmp_path)
    dataset = read_dataset(tmp_path)
    assert dataset.samples["sample"].tolist() == [7, 3, 9]
    assert list(dataset.info.modalities) == ["price", "text"]
    bars, words = dataset.tokens["price"], dataset.tokens["text"]
    assert bars.offsets.tolist() == [0, 2, 2, 3]
    assert bars.time.tolist() == [NOON - 5, NOON, NOON]
    np.testing.assert_array_equal(bars.values, np.array([[1, 2], [3, np.nan], [5, 6]], np.float32))
    assert words.offsets.tolist() == [0, 1, 2, 2]
    assert words.text.to_pylist() == ["alpha", "beta"]
    assert dataset.matrix("past_").tolist() == [[0.5], [-0.5], [1.5]]


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    write_small(tmp_path / "a")
    write_small(tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_tokens_of_one_time_keep_their_order(tmp_path: Path) -> None:
    write_small(tmp_path)
    tokens = pa.table({"sample": [3, 7, 7, 7], "time": [NOON, NOON, NOON, NOON - 9], "text": ["d", "b", "c", "a"]})
    pq.write_table(tokens, tmp_path / "tokens_text.parquet")
    assert read_dataset(tmp_path).tokens["text"].text.to_pylist() == ["a", "b", "c", "d"]


Breaks = Callable[[Path], None]


def samples(column: str, values: list[object] | None) -> Breaks:
    return lambda directory: replace(directory, "samples.parquet", column, values)


def price(column: str, values: pa.Array | list[object] | None) -> Breaks:
    return lambda directory: replace(directory, "tokens_price.parquet", column, values)


def text(column: str, values: list[object] | None) -> Breaks:
    return lambda directory: replace(directory, "tokens_text.parquet", column, values)


def info(**changes: object) -> Breaks:
    return lambda directory: edit_info(directory, **changes)


def classes(target: list[object]) -> Breaks:
    def change(directory: Path) -> None:
        edit_info(directory, task="classification", classes=2)
        replace(directory, "samples.parquet", "target_a", target)

    return change


def second_class(directory: Path) -> None:
    edit_info(directory, task="classification", classes=2)
    path = directory / "samples.parquet"
    pq.write_table(pq.read_table(path).rename_columns({"past_x": "target_b"}), path)


def no_rows(directory: Path) -> None:
    path = directory / "samples.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def no_parquet(directory: Path) -> None:
    (directory / "tokens_text.parquet").write_bytes(b"PAR")


def no_json(directory: Path) -> None:
    (directory / "dataset.json").write_text("{")


THREE = pa.array([[1, 2, 3]] * 3, pa.list_(pa.float32(), 3))
INFINITE = pa.array([[1, 2], [1, np.inf], [1, 2]], pa.list_(pa.float32(), 2))
NAN = float("nan")


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (samples("time", None), "samples.parquet column time is missing"),
        (samples("time", [1.5e9, 1.5e9, 1.5e9]), "samples.parquet column time must be an integer, got double"),
        (samples("target_a", [0.0, NAN, 1.0]), "samples.parquet column target_a, row 1 must be finite, got nan"),
        (samples("target_a", [0.0, 1.0, None]), "samples.parquet column target_a, row 2 must be finite"),
        (samples("target_a", ["x", "y", "z"]), "samples.parquet column target_a must be a number"),
        (samples("target_a", None), "samples.parquet column target_<name> is missing"),
        (samples("past_x", [0.0, float("inf"), 1.0]), "samples.parquet column past_x, row 1 must be finite, got inf"),
        (samples("sample", [7, 3, 7]), "samples.parquet column sample, row 2 must be unique, got 7 again"),
        (samples("entity", ["A", None, "B"]), "samples.parquet column entity, row 1 is null"),
        (samples("time", [NOON * 1000] * 3), "samples.parquet column day, row 0 must be the day of time"),
        (samples("label_end", [NOON] * 3), "samples.parquet column label_end, row 1 must not be before time"),
        (samples("label_end", [1.0, 2.0, 3.0]), "samples.parquet column label_end must be an integer, got double"),
        (no_rows, "samples.parquet has no rows: the data set is empty"),
        (price("time", [NOON, NOON + 1, NOON]), f"tokens_price.parquet column time, row 1 must be at most {NOON}"),
        (price("time", [0.5, 1.5, 2.5]), "tokens_price.parquet column time must be an integer, got double"),
        (price("sample", [9, 8, 7]), "tokens_price.parquet column sample, row 1 must be a sample of samples.parquet"),
        (price("values", [[1.0], [2.0], [3.0]]), "column values must be a fixed-size list of float32, got list"),
        (price("values", THREE), "column values has width 3, but dataset.json gives 2 units"),
        (price("values", INFINITE), "tokens_price.parquet column values, row 1 must not be infinite"),
        (text("text", None), "tokens_text.parquet column text is missing"),
        (text("text", [1, 2]), "tokens_text.parquet column text must be a string"),
        (text("text", ["a", None]), "tokens_text.parquet column text, row 1 is null"),
        (no_parquet, "tokens_text.parquet is not a readable parquet file"),
        (no_json, "dataset.json, row 1 is not JSON"),
        (info(format=2), "dataset.json column format must be 1, got 2"),
        (info(task="ranking"), "dataset.json column task must be one of regression, classification, got 'ranking'"),
        (info(time_unit="ms"), "dataset.json column time_unit must be 'second', got 'ms'"),
        (info(modalities={}), "dataset.json column modalities must name at least one modality"),
        (
            info(modalities={"a": {"kind": "video"}}),
            "modalities.a.kind must be one of numeric, text, image, got 'video'",
        ),
        (info(persistence="past_y"), "samples.parquet column past_y is missing: dataset.json names it"),
        (info(task="classification"), "dataset.json column classes must be an integer of at least 2"),
        (classes([0.0, 1.0, 2.0]), "samples.parquet column target_a, row 2 must be a class from 0 to 1, got 2.0"),
        (second_class, "samples.parquet column target_b is one target too many"),
    ],
)
def test_what_is_wrong_gets_one_error(tmp_path: Path, break_it: Breaks, says: str) -> None:
    write_small(tmp_path)
    break_it(tmp_path)
    with pytest.raises(DataFormatError) as error:
        read_dataset(tmp_path)
    message = str(error.value)
    assert message.startswith("read_dataset: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("file", ["dataset.json", "samples.parquet", "tokens_text.parquet"])
def test_missing_file(tmp_path: Path, file: str) -> None:
    write_small(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        read_dataset(tmp_path)


def test_an_interrupted_write_leaves_no_data_set(tmp_path: Path) -> None:
    write_small(tmp_path)
    described = read_dataset(tmp_path).info
    one = np.zeros(1, np.int64)
    tokens = {"price": RawTokens(one, one, np.zeros((1, 2), np.float32)), "text": RawTokens(one, one, text=["a"])}
    with pytest.raises(pa.ArrowException):
        write_dataset(tmp_path, described, pd.DataFrame({"sample": [object()]}), tokens)
    with pytest.raises(FileNotFoundError, match=r"dataset\.json"):
        read_dataset(tmp_path)


def test_write_refuses_other_modalities(tmp_path: Path) -> None:
    described = DatasetInfo("x", "regression", "", "", {"price": ModalityInfo("numeric")})
    with pytest.raises(ValueError, match=r"tokens must have the modalities \['price'\], got \[\]"):
        write_dataset(tmp_path, described, pd.DataFrame(), {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sound", {}, "must have values or text, got neither"),
        ("sound", {"values": np.zeros((2, 3)), "text": ["a", "b"]}, "must have values or text, got both"),
        ("sound", {"values": np.zeros(2)}, r"values must be \[token, feature\], got shape \[2\]. Flatten what a"),
        ("chart", {"values": np.zeros((2, 8, 8))}, r"got shape \[2, 8, 8\]"),
        ("sound", {"values": np.zeros((3, 1))}, "a sample and a time for each of its 3 tokens, got 2 and 2"),
        ("log", {"text": ["a", 3]}, "text must be strings, got another type among them"),
        ("a.b", {"text": ["a", "b"]}, "must name modalities by letters, digits, _ and -, .* got 'a.b'"),
        ("keys", {"text": ["a", "b"]}, "not as an attribute of torch.nn.ModuleDict, got 'keys'"),
    ],
)
def test_write_refuses_what_are_no_tokens(tmp_path: Path, name: str, content: dict[str, Any], message: str) -> None:
    described = DatasetInfo("x", "regression", "", "", {name: ModalityInfo("numeric")})
    two = np.zeros(2, np.int64)
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "data", described, pd.DataFrame(), {name: RawTokens(two, two, **content)})
    assert not (tmp_path / "data").exists()


def test_classes_are_read(tmp_path: Path) -> None:
    write_small(tmp_path, task="classification")
    dataset = read_dataset(tmp_path)
    assert dataset.info.classes == 2
    assert dataset.matrix("target_").tolist() == [[1.0], [0.0], [1.0]]
