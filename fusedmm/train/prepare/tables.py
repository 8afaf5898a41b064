"""Reading source tables with errors that name the file and the column."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fusedmm.train.format import DataFormatError


def read_columns(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """Read some columns of a parquet file, or say which is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"prepare: {path} must exist, got nothing there.")
    _need(path.name, pq.read_schema(path).names, columns)
    return pq.read_table(path, columns=list(columns))


def read_csv(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read a comma-separated file with a header, its names in lower case; say which column is missing."""
    frame = pd.read_csv(path).rename(columns=str.lower)
    _need(path.name, list(frame.columns), columns)
    return frame


def _need(file: str, names: list[str], columns: tuple[str, ...]) -> None:
    for column in columns:
        if column not in names:
            raise DataFormatError(f"prepare: {file} column {column} is missing; the file has {', '.join(names)}.")
