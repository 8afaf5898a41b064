"""Two sets of results: what changed beyond the noise, from one file to another or between trees that take turns."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare, results
from benchmarks.against import Against, over_rounds
from benchmarks.command import main
from benchmarks.results import Result
from tests.benchmark_rows import RESULT, RUN


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.1}, "slower"),
        ({"median_ms": 0.5, "p20_ms": 0.4, "p80_ms": 0.6}, "faster"),
        ({"peak_mib": 120.0}, "larger"),
        ({"status": "failed"}, "lost"),
        ({"clock_mhz": 1000.0}, "not comparable"),
        ({"sizes": {"batch": 2}}, "not comparable"),
    ],
)
def test_compare_names_what_changed(change: dict[str, object], verdict: str) -> None:
    (found,) = compare.changes([RESULT], [replace(RESULT, **change)])  # type: ignore[arg-type]
    assert found.verdict == verdict
    assert compare.report([found]) == (verdict in ("slower", "larger", "lost"))


def test_compare_is_silent_within_the_noise() -> None:
    assert compare.changes([RESULT], [replace(RESULT, median_ms=1.05, p20_ms=1.0, p80_ms=1.2)]) == []


def test_compare_refuses_different_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("H100", "H200"):
        results.append(tmp_path / device, [replace(RUN, device=device), RESULT])
    assert main(["compare", str(tmp_path / "H100"), str(tmp_path / "H200")]) == 2
    assert "different devices: H100, H200" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "H100"), str(tmp_path / "H100")]) == 0


def test_a_tree_s_noise_is_what_its_processes_differ_by() -> None:
    """Each process is steady within itself; by its own percentiles alone the second tree would be slower."""

    def processes(*medians: float) -> Result:
        return over_rounds([replace(RESULT, median_ms=m, p20_ms=m - 0.01, p80_ms=m + 0.01) for m in medians])

    was, now = processes(1.0, 1.01, 1.0, 1.08), processes(1.08, 1.0, 1.07, 1.08)
    assert (was.p20_ms, was.median_ms, was.p80_ms, was.repeats) == (0.99, 1.0, 1.08, 40)
    assert compare.changes([was], [now]) == []
    (slower,) = compare.changes([was], [processes(1.2, 1.21, 1.2, 1.3)])
    assert slower.verdict == "slower"
    failed = over_rounds([RESULT, replace(RESULT, status="failed", median_ms=None), RESULT, RESULT])
    assert [change.verdict for change in compare.changes([was], [failed])] == ["lost"]


SLOWED = """
import time

from fusedmm.ops import attention_op

fast = attention_op._forward_and_kept


def slow(*arguments, **options):
    time.sleep(0.01)
    return fast(*arguments, **options)


attention_op._forward_and_kept = slow
"""


def test_against_takes_turns_and_names_what_is_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = here, there = tmp_path / "here", tmp_path / "there"
    for folder in folders:
        folder.mkdir()
        for name in ("benchmarks", "fusedmm", "recipes"):
            (folder / name).symlink_to(results.ROOT / name)
    (here / "sitecustomize.py").write_text(SLOWED)
    turns, start = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **rest: turns.append(rest["cwd"]) or start(*args, **rest))
    blanks = [Result("run", "attention/tiny", "forward", name, {}, status="") for name in ("fusedmm", "missing")]
    monkeypatch.setattr("benchmarks.against.ROUNDS", 2)
    options = ["--device", "cpu", "--seconds", "0.05", "--threads", "1"]
    ours, theirs = Against("before", here, there, options).results(blanks)
    assert turns == [here, there, there, here]
    ended = {(row.status, row.reason) for row in (*ours, *theirs) if row.variant == "fusedmm"}
    assert ended == {("timed", "")}
    found = {change.key[1:]: change.verdict for change in compare.changes(theirs, ours)}
    assert found["forward", "fusedmm"] == "slower"
    assert {row.status for row in theirs if row.variant == "missing"} == {"crashed"}
