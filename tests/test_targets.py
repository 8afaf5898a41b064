"""Targets name rows that exist, their commands run, and verdicts follow from the rows; so does the table of kernels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import overheads, paths, plan, targets
from benchmarks.cases import builders
from benchmarks.checks import at_most, counted, faster, memory, milliseconds, ran, rate, rate_share
from benchmarks.command import main
from benchmarks.results import Result, Run
from benchmarks.targets import Target, attention, verdict
from benchmarks.telemetry import Telemetry
from tests.benchmark_rows import RUN

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
OURS, OTHER = attention("dense-gated-d64-4k", "forward"), attention("dense-gated-d64-4k", "forward", "flex")


def row(key: tuple[str, str, str], ms: float | None, **facts: object) -> tuple[Run, Result]:
    known = {"clock_mhz": 1800.0, "peak_mib": 100.0, "tflops": 500.0, "status": "timed", **facts}
    return RUN, Result(RUN.id, *key, {}, median_ms=ms, **known)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def overhead_rows() -> list[Result]:
    measured = overheads.Overheads(CPU, Telemetry(CPU), "run", seconds=0.01)
    return list(measured.rows())


@pytest.mark.slow
def test_every_row_that_a_target_needs_is_one_of_a_case(overhead_rows: list[Result]) -> None:
    wanted = {key for target in targets.targets() for check in target.checks for key in check.keys}
    cases = {name: build() for name, build in builders("cuda").items() if name in {case for case, _, _ in wanted}}
    known = {
        (name, mode, variant.name)
        for name, case in cases.items()
        for variant in case.variants
        for mode in case.modes
        if mode in variant.modes
    }
    known |= {result.key for result in overhead_rows}
    assert wanted <= known
    assert {target.operator for target in targets.targets()} == {"attention", "distillation"}


def test_what_is_not_measured_comes_first_and_the_targets_before_the_rest() -> None:
    names = list(builders("cuda"))
    order = plan.ordered(names)
    needed = {case for case, _ in targets.wanted()} & set(names)
    assert order[0] == plan.FIRST[0]
    assert set(plan.FIRST) <= set(names)
    assert set(order[: len(needed | set(plan.FIRST))]) == needed | set(plan.FIRST)
    again = plan.ordered(names, measured=order[:3])
    assert again == [*order[3:], *order[:3]]


@pytest.mark.parametrize("target", targets.targets(), ids=lambda target: target.what)
def test_a_target_s_command_runs(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    listed: set[str] = set()
    for command in target.command.split("; "):
        words = command.split()
        if words[0] == "pytest":
            file, name = ROOT / words[1], words[-1].split("/")[-1]
            assert file.exists()
            assert name.endswith(".py") or name in file.read_text()
            continue
        assert words[:3] == ["python", "-m", "benchmarks"]
        assert main([*words[3:], "--list", "--device", "cuda"]) == 0
        listed |= set(capsys.readouterr().out.split())
    assert {key[0] for check in target.checks for key in check.keys} <= listed


def test_overheads_are_measured(overhead_rows: list[Result]) -> None:
    status = {result.key: result.status for result in overhead_rows}
    assert [key for key, what in status.items() if what not in ("timed", "skipped")] == []
    (recompiled,) = [result for result in overhead_rows if result.case == "overheads/recompile"]
    assert recompiled.sizes == {"compilations": 0, "batches": overheads.CHANGES}
    assert "module" in overheads.table(overhead_rows)


def test_a_target_is_met_missed_or_unknown() -> None:
    target = Target(3, "what", "bar", (faster(OURS, ("flex",), 3.0), rate(OURS, 400.0)))
    good = {OURS: row(OURS, 1.0), OTHER: row(OTHER, 3.0)}
    assert verdict(target, good).met is True
    assert "3.00 (>= 3.00)" in verdict(target, good).text
    missed = verdict(target, {**good, OTHER: row(OTHER, 2.9)})
    assert missed.met is False
    assert "2.90 (>= 3.00, MISSED)" in missed.text
    assert verdict(target, {}) == targets.Verdict(None, "not measured yet")
    assert verdict(target, {OURS: good[OURS]}).met is None  # half of it
    assert verdict(target, {OURS: row(OURS, 1.0, tflops=399.0)}).met is False  # whatever the other half is


@pytest.mark.parametrize(
    "other",
    [
        row(OTHER, 9.0, clock_mhz=1500.0),
        row(OTHER, None, status="failed"),
        (replace(RUN, commit="def"), row(OTHER, 9.0)[1]),
        (replace(RUN, device="another"), row(OTHER, 9.0)[1]),
    ],
    ids=["clock", "failed", "commit", "device"],
)
def test_what_cannot_be_compared_is_not_measured(other: tuple[Run, Result]) -> None:
    assert faster(OURS, ("flex",), 3.0).measure({OURS: row(OURS, 1.0), OTHER: other}) is None


def test_every_kind_of_check_reads_its_row() -> None:
    rows = {OURS: row(OURS, 2.0), OTHER: row(OTHER, 1.0)}
    assert at_most(OURS, OTHER, 1.5, "cost").measure(rows) == 2.0
    assert not at_most(OURS, OTHER, 1.5, "cost").holds(2.0)
    assert memory(OURS, 64.0, lambda sizes: 40.0 * 2**20).measure(rows) == 60.0
    assert ran(OURS).measure(rows) == 1.0
    assert ran(OURS).measure({OURS: row(OURS, None, status="failed")}) == 0.0
    assert ran(OURS).measure({}) is None
    sized = {OURS: (RUN, replace(rows[OURS][1], sizes={"compilations": 3}))}
    assert counted(OURS, "compilations", 0).measure(sized) == 3.0
    assert milliseconds(OURS, 1.0).measure(rows) == 2.0
    assert rate_share(OURS, OTHER, 0.85).measure(rows) == 1.0


def test_the_page_of_targets_is_generated() -> None:
    assert targets.run(check=True) == 0


def side_by_side(case: str, portable: float, hopper: float | None, **facts: object) -> list[Result]:
    sizes = {"softmax": "joint", "head_dim": 96}
    blank = Result(RUN.id, case, "forward", "fusedmm-portable", sizes, "timed", median_ms=portable, clock_mhz=1800.0)
    return [blank, replace(blank, variant="fusedmm-hopper", median_ms=hopper, **facts)]  # type: ignore[arg-type]


def test_an_entry_of_the_table_needs_a_gain_and_no_loss() -> None:
    wins, level, loses = side_by_side("a", 1.2, 1.0), side_by_side("b", 1.0, 1.0), side_by_side("c", 0.9, 1.0)
    assert paths.proposal([*wins, *level]) == {("forward", "joint"): frozenset({128})}
    assert paths.proposal(level) == {}
    assert paths.proposal([*wins, *loses]) == {}
    assert "c 0.90x" in paths.report([*wins, *loses])
    assert '("forward", "joint"): frozenset([128]),' in paths.report(wins)


@pytest.mark.parametrize(
    ("facts", "hopper", "reason"),
    [
        ({"status": "wrong", "reason": "output: over budget"}, None, "wrong: output: over budget"),
        ({"clock_mhz": 1200.0}, 0.5, "no portable time"),
        ({"run": "another"}, 0.5, "no portable time"),
    ],
)
def test_an_entry_is_not_justified_by_what_is_wrong(facts: dict[str, object], hopper: float, reason: str) -> None:
    rows = [*side_by_side("a", 1.2, 1.0), *side_by_side("b", 1.2, hopper, **facts)]
    assert paths.proposal(rows) == {}
    assert reason in paths.report(rows)


def test_what_hopper_does_not_support_speaks_neither_for_nor_against() -> None:
    rows = [*side_by_side("a", 1.2, 1.0), *side_by_side("b", 1.2, None, status="skipped")]
    assert paths.proposal(rows) == {("forward", "joint"): frozenset({128})}
