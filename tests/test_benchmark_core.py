"""Calls during which someone else was on a CPU's core are told from the others, kept apart, and compared with nothing
but their like.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks import compare, core, readme, timing
from benchmarks.core import Core
from benchmarks.harness import ratio
from benchmarks.results import Result, Run, timed
from benchmarks.run_command import table
from benchmarks.telemetry import Telemetry
from benchmarks.timing import MIN_ROUNDS, OWN_ROUNDS, Times, interleave
from tests.benchmark_rows import RESULT, RUN

CPU = torch.device("cpu")
ALONE, SHARED = 1e-5, 1.8e-5  # seconds of the loop


def of_paces(paces: Iterator[float], monkeypatch: pytest.MonkeyPatch) -> Core:
    """A core whose loop takes such times, all of them known from the start."""
    monkeypatch.setattr(core, "SEARCH_S", 0.0)
    monkeypatch.setattr(core, "_loop", lambda: next(paces))
    found = Core()
    found.fastest = ALONE
    return found


def test_a_pace_is_the_faster_of_two_loops_and_judged_by_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of_paces(iter([9.0, 1.2e-5, 1.2e-5, 0.9e-5]), monkeypatch)
    assert found.is_own(pace := found.pace())
    assert pace == 1.2e-5
    assert found.pace() == found.fastest == 0.9e-5
    assert not found.is_own(pace)


def test_a_loop_takes_microseconds() -> None:
    assert 1e-6 < Core().fastest < 1e-3


def interleaved(paces: list[list[float]], budget_s: float, monkeypatch: pytest.MonkeyPatch) -> Times:
    """Times of a call that finds the core at these paces before and after it, again and again."""
    read = (pace for call in itertools.cycle(paces) for pace in call for _ in range(core.LOOPS))
    own = of_paces(read, monkeypatch)
    monkeypatch.setattr(timing, "core", lambda: own)
    return interleave({"call": lambda: None}, CPU, budget_s, Telemetry(CPU))["call"]


def test_calls_with_someone_on_the_core_before_or_after_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """And waited for, until there are enough of the others."""
    times = interleaved([[ALONE, ALONE], [SHARED, ALONE], [ALONE, SHARED]], 1.0, monkeypatch)
    assert times.own_core
    assert len(times.ms) >= OWN_ROUNDS
    assert len(times.shared_ms) in (2 * len(times.ms), 2 * len(times.ms) - 1, 2 * len(times.ms) - 2)


def test_rounds_are_judged_by_a_pace_that_was_seen_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has someone on the core, whose own pace nobody knows yet."""
    paces = itertools.chain([SHARED] * 4, itertools.repeat(ALONE))  # of a round: two, of two loops each
    own = of_paces(paces, monkeypatch)
    own.fastest = SHARED
    monkeypatch.setattr(timing, "core", lambda: own)
    times = interleave({"call": lambda: None}, CPU, 0.1, Telemetry(CPU))["call"]
    assert times.own_core
    assert len(times.shared_ms) == 1


def test_too_few_calls_alone_are_not_told_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    times = interleaved([[SHARED, SHARED]], 0.001, monkeypatch)
    assert (times.own_core, times.shared_ms) == (False, [])
    assert len(times.ms) >= MIN_ROUNDS


def test_rows_hold_what_was_timed_alone_and_the_median_of_the_rest() -> None:
    times = Times([1.0] * MIN_ROUNDS, [2.0] * MIN_ROUNDS, [3.0] * MIN_ROUNDS, own_core=True)
    row = timed(RESULT, times)
    assert (row.median_ms, row.again_ms, row.shared_ms, row.repeats) == (1.0, 2.0, 3.0, MIN_ROUNDS)
    assert row.own_core
    assert timed(RESULT, replace(times, shared_ms=[3.0])).shared_ms is None


def test_a_time_on_a_shared_core_is_no_ratio_with_another() -> None:
    own, shared = replace(RESULT, own_core=True), replace(RESULT, own_core=False)
    assert ratio(own, shared) is None
    assert ratio(shared, shared) == 1.0


@pytest.mark.parametrize(
    ("own_core", "factor", "verdicts"),
    [(True, 1.5, ["slower"]), (False, 1.5, []), (False, 2.5, ["slower"]), (None, 1.5, [])],
)
def test_beside_someone_on_the_core_only_what_he_cannot_do_is_a_change(
    own_core: bool | None, factor: float, verdicts: list[str]
) -> None:
    now = replace(RESULT, own_core=own_core, p20_ms=factor, median_ms=factor, p80_ms=factor)
    was = replace(RESULT, own_core=True, p20_ms=1.0, p80_ms=1.0)
    assert [change.verdict for change in compare.changes([was], [now])] == verdicts
    assert [change.verdict for change in compare.changes([now], [was])] == [
        v.replace("slower", "faster") for v in verdicts
    ]


def test_the_second_of_two_calls_is_kept_beside_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is the one that was given for it."""
    called: list[str] = []
    own = of_paces(itertools.repeat(ALONE), monkeypatch)
    monkeypatch.setattr(timing, "core", lambda: own)
    calls, again = ({"call": lambda name=name: called.append(name)} for name in ("first", "again"))
    times = interleave(calls, CPU, 0.0, Telemetry(CPU), again)["call"]
    assert len(times.ms) == len(times.again_ms) == MIN_ROUNDS
    assert called == ["first", "again"] * MIN_ROUNDS


def test_the_readme_counts_second_calls_and_a_shared_core_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is the fastest; called again it is within 10 %, beside a neighbour not."""
    ours = replace(RESULT, case="attention/tiny", own_core=True, again_ms=3.0, shared_ms=4.0)
    ours = replace(ours, tflops=1.0, share=0.5, worst_error=0.0)
    other = replace(ours, variant="sdpa", median_ms=1.5, again_ms=2.9, shared_ms=2.0)
    run = replace(RUN, kind="cpu", device="CPU", threads=1)

    def found(*more: Result, **changed: object) -> dict[tuple[str, str, str], tuple[Run, Result]]:
        rows = (*(replace(row, **changed) for row in (ours, other)), *more)  # type: ignore[arg-type]
        return {row.key: (run, row) for row in rows}

    line = readme.cpu_line(found())
    assert "of 1 rows of operators 1 are at least as fast" in line
    assert "Called again, with their code in the caches, 1 of 1 are within 10 %" in line
    assert "on the same core, 0 of 1 are; the slowest takes 2.00 times as long" in line
    plain = readme.cpu_line(found(again_ms=None, shared_ms=None))
    assert "again" not in plain
    assert "same core" not in plain
    assert "| sdpa | 1.50 | 1.0 | 0.97 | 0.50 |" in readme.cpu_part(found())
    lacking = replace(ours, variant="eager", median_ms=1.2, again_ms=None)  # it might be the fastest
    assert "| eager | 1.20 | 1.0 | - | 0.50 |" in readme.cpu_part(found(lacking))
    never = found(own_core=False, again_ms=None, shared_ms=None)
    assert "| sdpa | 1.50, shared core | 1.0 | - | - |" in readme.cpu_part(never)
    assert "shared core" in table("attention/tiny", [row for _, row in never.values()])


def test_on_several_threads_no_core_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    times = interleave({"call": lambda: None}, CPU, 0.0, Telemetry(CPU))["call"]
    assert (times.own_core, times.shared_ms, len(times.ms)) == (None, [], MIN_ROUNDS)
