"""What the command line takes for a number or a file; argparse says what is wrong with anything else."""

import argparse
import math
from pathlib import Path

from benchmarks import results


def count(text: str) -> int:
    """A whole number, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def seconds(text: str) -> float:
    """A time, more than 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return number


def new_file(text: str) -> Path:
    """A file to write or append to."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"is a folder, not a file: {text}")
    return Path(text)


def result_file(text: str) -> Path:
    """A file of results that is there and can be read."""
    file = Path(text)
    if not file.is_file():
        raise argparse.ArgumentTypeError(f"{'is a folder' if file.is_dir() else 'no such file'}: {file}")
    try:
        results.read(file)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("benchmarks: ")) from None
    return file
