"""The one data format: a directory of parquet files with integer knowable-times, read with every check before any work
is lost.

The tables and their columns are described in ``docs/data-format.md``. `read_dataset` raises one `DataFormatError` that
names the file, the column and the row; what it returns is sorted by sample and time, so that everything later slices
arrays by offsets.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from fusedmm.train.dataset import (
    FORMAT_VERSION,
    SECONDS_PER_DAY,
    Dataset,
    DatasetInfo,
    Float32Array,
    Int64Array,
    ModalityInfo,
    TokenTable,
)

__all__ = [
    "DataFormatError",
    "Dataset",
    "DatasetInfo",
    "ModalityInfo",
    "RawTokens",
    "TokenTable",
    "read_dataset",
    "write_dataset",
]

KINDS = ("numeric", "text", "image")
TASKS = ("regression", "classification")


class DataFormatError(ValueError):
    """A file does not hold what the format says; the message names the file, the column and the row."""


@dataclass(frozen=True)
class RawTokens:
    """Tokens on their way to a file: ``sample`` and ``time`` [T] int64, and ``values`` [T, F] float32 or ``text``."""

    sample: Int64Array
    time: Int64Array
    values: Float32Array | None = None
    text: Sequence[str] | pa.Array | None = None


def write_dataset(directory: Path, info: DatasetInfo, samples: pd.DataFrame, tokens: Mapping[str, RawTokens]) -> None:
    """Write the format; ``dataset.json`` comes last, so an interrupted write is not mistaken for a data set.

    Args:
        directory: made where missing; files of the same names are replaced.
        info: ``info.modalities`` names exactly the keys of ``tokens``.
        samples: the columns of ``docs/data-format.md``.
        tokens: for each modality its tokens.

    Raises:
        ValueError: before anything is written, for arrays that do not make tokens. Their values `read_dataset` checks.
    """
    if set(info.modalities) != set(tokens):
        raise ValueError(
            f"write_dataset: tokens must have the modalities {sorted(info.modalities)}, got {sorted(tokens)}."
        )
    tables = {name: _token_columns(name, table) for name, table in tokens.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "dataset.json").unlink(missing_ok=True)
    pq.write_table(
        pa.Table.from_pandas(samples, preserve_index=False), directory / "samples.parquet", compression="zstd"
    )
    for name in tokens:
        pq.write_table(tables[name], directory / f"tokens_{name}.parquet", compression="zstd")
    (directory / "dataset.json").write_text(json.dumps(asdict(info), indent=1) + "\n")


def _token_columns(name: str, tokens: RawTokens) -> pa.Table:
    """The columns of one modality's file."""
    where = f"write_dataset: tokens[{name!r}]"
    _check_name(name, "write_dataset: tokens")
    if (tokens.values is None) == (tokens.text is None):
        raise ValueError(f"{where} must have values or text, got {'neither' if tokens.text is None else 'both'}.")
    if tokens.values is not None:
        values = np.asarray(tokens.values, np.float32)
        if values.ndim != 2 or values.shape[1] == 0:
            raise ValueError(
                f"{where}.values must be [token, feature], got shape {list(values.shape)}. Flatten what a token holds."
            )
        rows, column = len(values), pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    else:
        try:
            column = pa.array(tokens.text, pa.large_string())
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise ValueError(f"{where}.text must be strings, got another type among them ({error}).") from error
        rows = len(column)
    if not len(tokens.sample) == len(tokens.time) == rows:
        raise ValueError(
            f"{where} must have a sample and a time for each of its {rows} tokens, got {len(tokens.sample)} and "
            f"{len(tokens.time)}."
        )
    keys = {"sample": pa.array(tokens.sample, pa.int64()), "time": pa.array(tokens.time, pa.int64())}
    return pa.table(keys | {"values" if tokens.text is None else "text": column})


def _check_name(name: str, where: str) -> None:
    """Raise `DataFormatError` for what cannot name a file and a submodule, as modalities do."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise DataFormatError(
            f"{where} must name modalities by letters, digits, _ and -, not as an attribute of torch.nn.ModuleDict, "
            f"got {name!r}. Rename it."
        )


def read_dataset(directory: Path | str, *, need_targets: bool = True) -> Dataset:
    """Read and check a data set; one to be forecast need not have targets.

    Raises:
        DataFormatError: the first thing that is not as ``docs/data-format.md`` says.
        FileNotFoundError: where the directory or one of its files is not there.

    Cost: every value is looked at once; 2,800 samples with 900,000 tokens take about a second.
    """
    directory = Path(directory)
    info = _read_info(directory)
    samples = _read_samples(directory, info, need_targets)
    tokens = {name: _read_tokens(directory, name, modality, samples) for name, modality in info.modalities.items()}
    return Dataset(info=info, samples=samples, tokens=tokens)


def _fail(file: str, column: str | None, row: int | None, problem: str) -> DataFormatError:
    where = file + (f" column {column}" if column else "") + (f", row {row}" if row is not None else "")
    return DataFormatError(f"read_dataset: {where} {problem}")


def _need_file(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"read_dataset: {path} must exist, got nothing there. Prepare it with `python -m fusedmm.train.prepare`."
        )
    return path


def _read_info(directory: Path) -> DatasetInfo:
    file = "dataset.json"
    path = _need_file(directory / file)
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise _fail(file, None, error.lineno, f"is not JSON: {error.msg}.") from None
    if not isinstance(raw, dict):
        raise _fail(file, None, None, "must hold an object.")
    for key in ("format", "name", "task", "time_unit", "source", "licence", "modalities"):
        if key not in raw:
            raise _fail(file, key, None, "is missing. Add it; docs/data-format.md describes it.")
    if raw["format"] != FORMAT_VERSION:
        raise _fail(
            file,
            "format",
            None,
            f"must be {FORMAT_VERSION}, got {raw['format']!r}. Prepare the data again with this version.",
        )
    if raw["task"] not in TASKS:
        raise _fail(file, "task", None, f"must be one of {', '.join(TASKS)}, got {raw['task']!r}.")
    if raw["time_unit"] != "second":
        raise _fail(
            file,
            "time_unit",
            None,
            f"must be 'second', got {raw['time_unit']!r}. Convert all times to integer UNIX seconds.",
        )
    classes = raw.get("classes")
    if raw["task"] == "classification" and not (isinstance(classes, int) and classes >= 2):
        raise _fail(file, "classes", None, f"must be an integer of at least 2 in a classification, got {classes!r}.")
    if not isinstance(raw["modalities"], dict) or not raw["modalities"]:
        raise _fail(file, "modalities", None, "must name at least one modality.")
    modalities = {}
    for name, entry in raw["modalities"].items():
        _check_name(name, "read_dataset: dataset.json column modalities")
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if kind not in KINDS:
            raise _fail(file, f"modalities.{name}.kind", None, f"must be one of {', '.join(KINDS)}, got {kind!r}.")
        modalities[name] = ModalityInfo(kind=kind, units=tuple(entry.get("units", ())), notes=entry.get("notes", ""))
    return DatasetInfo(
        name=raw["name"],
        task=raw["task"],
        source=raw["source"],
        licence=raw["licence"],
        modalities=modalities,
        classes=classes,
        persistence=raw.get("persistence"),
    )


def _read_table(directory: Path, file: str, required: Mapping[str, str]) -> pa.Table:
    try:
        table = pq.read_table(_need_file(directory / file))
    except pa.ArrowInvalid as error:
        raise _fail(file, None, None, f"is not a readable parquet file: {error}.") from None
    for column, meaning in required.items():
        if column not in table.column_names:
            raise _fail(file, column, None, f"is missing ({meaning}); the file has {', '.join(table.column_names)}.")
        nulls = table.column(column).combine_chunks().is_null().to_numpy(zero_copy_only=False)
        if nulls.any():
            raise _fail(file, column, int(nulls.argmax()), "is null. Drop the row, or fill it.")
    return table


def _integer_column(table: pa.Table, file: str, column: str) -> Int64Array:
    kind = table.schema.field(column).type
    if not pa.types.is_integer(kind):
        advice = (
            "Use integer UNIX seconds: a float cannot hold every time exactly."
            if column in ("time", "label_end")
            else "Cast it to an integer."
        )
        raise _fail(file, column, None, f"must be an integer, got {kind}. {advice}")
    values: Int64Array = table.column(column).to_numpy().astype(np.int64, copy=False)
    return values


def _read_samples(directory: Path, info: DatasetInfo, need_targets: bool) -> pd.DataFrame:
    file = "samples.parquet"
    required = {
        "sample": "the key",
        "entity": "whose forecast",
        "time": "when it is made",
        "day": "days since 1970-01-01",
    }
    table = _read_table(directory, file, required)
    if table.num_rows == 0:
        raise _fail(file, None, None, "has no rows: the data set is empty.")
    key, time, day = (_integer_column(table, file, column) for column in ("sample", "time", "day"))
    duplicate = pd.Series(key).duplicated().to_numpy()
    if duplicate.any():
        row = int(duplicate.argmax())
        raise _fail(file, "sample", row, f"must be unique, got {key[row]} again.")
    far = np.abs(day - time // SECONDS_PER_DAY) > 1  # a local date may differ from the UTC date by one
    if far.any():
        row = int(far.argmax())
        raise _fail(
            file,
            "day",
            row,
            f"must be the day of time={time[row]} ({time[row] // SECONDS_PER_DAY}), got {day[row]}. "
            "Are the times in seconds?",
        )
    if "label_end" in table.column_names:
        label_end = _integer_column(
            _read_table(directory, file, {"label_end": "when the target becomes known"}), file, "label_end"
        )
        early = label_end < time
        if early.any():
            row = int(early.argmax())
            raise _fail(file, "label_end", row, f"must not be before time={time[row]}, got {label_end[row]}.")
    targets = [name for name in table.column_names if name.startswith("target_")]
    if need_targets and not targets:
        raise _fail(file, "target_<name>", None, f"is missing; the file has {', '.join(table.column_names)}.")
    if info.persistence is not None and info.persistence not in table.column_names:
        raise _fail(file, info.persistence, None, "is missing: dataset.json names it as the forecast by persistence.")
    samples = table.to_pandas()
    for column in [
        name
        for name in table.column_names
        if name.startswith(("target_", "past_", "callday_", "importance_", "oracle_"))
    ]:
        _check_finite(file, column, samples)
    if info.task == "classification" and targets:
        _check_classes(file, targets, samples, info.classes or 0)
    return samples


def _check_finite(file: str, column: str, samples: pd.DataFrame) -> None:
    if not pd.api.types.is_numeric_dtype(samples[column].dtype):
        raise _fail(file, column, None, f"must be a number, got {samples[column].dtype}.")
    values = samples[column].to_numpy(np.float64, na_value=np.nan)
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(bad.argmax())
        raise _fail(
            file,
            column,
            row,
            f"must be finite, got {values[row]}. Drop the sample (sample={samples['sample'].iloc[row]}) or mend it.",
        )


def _check_classes(file: str, targets: list[str], samples: pd.DataFrame, classes: int) -> None:
    if len(targets) != 1:
        raise _fail(
            file, targets[1], None, f"is one target too many: a classification has one, got {', '.join(targets)}."
        )
    values = samples[targets[0]].to_numpy(np.float64)
    bad = (values != np.floor(values)) | (values < 0) | (values >= classes)
    if bad.any():
        row = int(bad.argmax())
        raise _fail(file, targets[0], row, f"must be a class from 0 to {classes - 1}, got {values[row]}.")


def _read_tokens(directory: Path, name: str, modality: ModalityInfo, samples: pd.DataFrame) -> TokenTable:
    file = f"tokens_{name}.parquet"
    content = "text" if modality.kind == "text" else "values"
    table = _read_table(
        directory,
        file,
        {"sample": "a key of samples.parquet", "time": "when the token was knowable", content: f"kind {modality.kind}"},
    )
    key, time = (_integer_column(table, file, column) for column in ("sample", "time"))
    row_of = pd.Index(samples["sample"]).get_indexer(pd.Index(key))
    if (row_of < 0).any():
        row = int((row_of < 0).argmax())
        raise _fail(file, "sample", row, f"must be a sample of samples.parquet, got {key[row]}.")
    late = time > samples["time"].to_numpy(np.int64)[row_of]
    if late.any():
        row = int(late.argmax())
        made = int(samples["time"].iloc[row_of[row]])
        rule = f"must be at most {made}, when the forecast of sample {key[row]} is made"
        raise _fail(file, "time", row, f"{rule}, got {time[row]}: not knowable yet. Drop the token.")
    order = np.lexsort((time, row_of))  # stable: tokens of one time keep the file's order
    offsets = np.searchsorted(row_of[order], np.arange(len(samples) + 1)).astype(np.int64)
    in_order = bool((order == np.arange(len(order))).all())  # then what is large need not be copied
    if modality.kind == "text":
        kind = table.schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise _fail(file, "text", None, f"must be a string, got {kind}.")
        text = table.column("text").combine_chunks()
        return TokenTable(time[order], None, text if in_order else text.take(pa.array(order)), offsets)
    values = _fixed_size_values(table, file, modality)
    return TokenTable(time[order], values if in_order else values[order], None, offsets)


def _fixed_size_values(table: pa.Table, file: str, modality: ModalityInfo) -> Float32Array:
    kind = table.schema.field("values").type
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type)):
        raise _fail(file, "values", None, f"must be a fixed-size list of float32, got {kind}. Use write_dataset.")
    if modality.units and len(modality.units) != kind.list_size:
        raise _fail(
            file, "values", None, f"has width {kind.list_size}, but dataset.json gives {len(modality.units)} units."
        )
    flat = table.column("values").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    values: Float32Array = flat.reshape(table.num_rows, kind.list_size)
    bad = np.isinf(values).any(axis=1)
    if bad.any():
        raise _fail(file, "values", int(bad.argmax()), "must not be infinite. Use NaN for what is undefined.")
    return values
