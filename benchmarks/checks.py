"""Checks: one number of the result rows, or of two of one device and commit at comparable clocks, and its bound."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.harness import ratio
from benchmarks.results import TIMED, Result, Run

NOT_MEASURED = "not measured yet"
Key = tuple[str, str, str]  # case, mode, variant
Rows = Mapping[Key, tuple[Run, Result]]
MIB = 2**20


@dataclass(frozen=True)
class Check:
    """One measured number and its bound.

    Attributes:
        label: what the number is, short.
        keys: rows it is made of.
        measure: the number; None where a row is missing, has no time, or cannot be compared.
        bound: what it is held to.
        at_least: whether the bound is a lower one.
        form: how the number is shown.
    """

    label: str
    keys: tuple[Key, ...]
    measure: Callable[[Rows], float | None]
    bound: float
    at_least: bool
    form: str

    def holds(self, value: float) -> bool:
        """Whether a value meets the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    def show(self, value: float | None) -> str:
        """The number, its bound, and in which direction it misses."""
        if value is None:
            return f"{self.label}: {NOT_MEASURED}"
        relation = ">=" if self.at_least else "<="
        missed = "" if self.holds(value) else ", MISSED"
        return f"{self.label}: {value:{self.form}} ({relation} {self.bound:{self.form}}{missed})"


def pair(rows: Rows, ours: Key, other: Key) -> tuple[Result, Result] | None:
    """Two timed results of one device and commit; None where there are none."""
    found = [rows[key] for key in (ours, other) if key in rows]
    if len(found) < 2 or any(result.status != TIMED for _, result in found):
        return None
    (run, mine), (other_run, theirs) = found
    same = (run.device, run.commit) == (other_run.device, other_run.commit)
    return (mine, theirs) if same else None


def faster(ours: Key, variants: tuple[str, ...], least: float, case: str = "") -> Check:
    """How many times as long the fastest of some others takes, on our case or on ``case``."""
    keys = [(case or ours[0], ours[1], variant) for variant in variants]

    def measure(rows: Rows) -> float | None:
        found = [both for key in keys if (both := pair(rows, ours, key)) is not None]
        times = [ratio(mine, theirs) for mine, theirs in found]
        known = [value for value in times if value is not None]
        return min(known) if known and len(known) == len(times) else None

    return Check(f"{_short(ours)} against {_any(variants)}", (ours, *keys), measure, least, True, ".2f")


def at_most(ours: Key, other: Key, most: float, label: str) -> Check:
    """Our time over another row's, at most so much."""

    def measure(rows: Rows) -> float | None:
        both = pair(rows, ours, other)
        return None if both is None else ratio(both[1], both[0])

    return Check(label, (ours, other), measure, most, False, ".3f")


def rate(ours: Key, least: float) -> Check:
    """TFLOP/s on visible pairs."""

    def measure(rows: Rows) -> float | None:
        return rows[ours][1].tflops if ours in rows and rows[ours][1].status == TIMED else None

    return Check(f"{_short(ours)} TFLOP/s", (ours,), measure, least, True, ".0f")


def rate_share(ours: Key, other: Key, least: float) -> Check:
    """Our rate on visible pairs over that of another row."""

    def measure(rows: Rows) -> float | None:
        both = pair(rows, ours, other)
        if both is None or ratio(*both) is None or not both[1].tflops:
            return None
        return (both[0].tflops or 0.0) / both[1].tflops

    return Check(f"{_short(ours)} rate over {_short(other)}", (ours, other), measure, least, True, ".2f")


def milliseconds(ours: Key, most: float) -> Check:
    """Median time."""

    def measure(rows: Rows) -> float | None:
        return rows[ours][1].median_ms if ours in rows and rows[ours][1].status == TIMED else None

    return Check(f"{_short(ours)} ms", (ours,), measure, most, False, ".1f")


def memory(ours: Key, most: float, outputs: Callable[[Mapping[str, float]], float]) -> Check:
    """Peak MiB beyond the inputs and beyond ``outputs`` bytes, which follow from the case's sizes."""

    def measure(rows: Rows) -> float | None:
        if ours not in rows or rows[ours][1].peak_mib is None:
            return None
        result = rows[ours][1]
        return (result.peak_mib or 0.0) - outputs(result.sizes) / MIB

    return Check(f"{_short(ours)} extra MiB", (ours,), measure, most, False, ".1f")


def counted(ours: Key, name: str, most: int) -> Check:
    """A count among a row's sizes."""

    def measure(rows: Rows) -> float | None:
        return float(rows[ours][1].sizes[name]) if ours in rows and rows[ours][1].status == TIMED else None

    return Check(name, (ours,), measure, float(most), False, ".0f")


def ran(ours: Key) -> Check:
    """1 where a row was timed, 0 where it failed."""

    def measure(rows: Rows) -> float | None:
        return float(rows[ours][1].status == TIMED) if ours in rows else None

    return Check(f"{_short(ours)} runs", (ours,), measure, 1.0, True, ".0f")


def _short(key: Key) -> str:
    return f"{key[0].partition('/')[2]} {key[1]}"


def _any(variants: tuple[str, ...]) -> str:
    return variants[0] if len(variants) == 1 else f"the fastest of {', '.join(variants)}"
