"""Result files: appended and read back, kept by device, small enough to review, read one device at a time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import readme, results
from tests.benchmark_rows import RESULT, RUN


def test_results_append_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    results.append(file, [RUN, RESULT])
    results.append(file, [RESULT])
    assert results.read(file) == ({RUN.id: RUN}, [RESULT, RESULT])
    file.write_text(json.dumps({"kind_of_row": "rumour"}) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 must be a run or a result, got 'rumour'"):
        results.read(file)
    file.write_text(json.dumps({"kind_of_row": "result", "run": "run"}) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 is no result of this version: .*missing"):
        results.read(file)


def test_runs_are_kept_once_in_the_file_of_their_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "kept")
    file, run, row = tmp_path / "results.jsonl", replace(RUN, id="1", device="NVIDIA H200"), replace(RESULT, run="1")
    results.append(file, [run, row])
    assert results.keep(file) == [tmp_path / "kept" / "nvidia-h200.jsonl"]
    results.append(file, [replace(run, id="2"), replace(row, run="2")])
    (kept,) = results.keep(file)
    assert results.keep(file) == []
    assert results.read(kept) == results.read(file)
    monkeypatch.setattr(results, "FULL_BYTES", 1)
    results.append(file, [replace(run, id="3"), replace(row, run="3")])
    assert results.keep(file) == [tmp_path / "kept" / "nvidia-h200.2.jsonl"]
    assert results.keep(file) == []
    assert results.files_of("NVIDIA H200 NVL") == []
    assert [kept.id for kept, _ in results.committed("cuda")] == ["1", "2", "3"]


def test_no_committed_file_of_results_is_larger_than_a_review_reads() -> None:
    assert max(file.stat().st_size for file in results.RESULTS.iterdir()) <= 1 << 20


def test_a_run_s_command_names_no_place_on_a_machine() -> None:
    words = ["attention/tiny", "--json", "/home/me/runs/new.jsonl", "--json=/tmp/a/b.jsonl"]
    assert results.command_of(words) == "python -m benchmarks attention/tiny --json new.jsonl --json=b.jsonl"
    for kind in ("cpu", "cuda"):
        for run, _ in results.committed(kind):
            assert results.command_of(run.command.split()[3:]) == run.command


def test_rows_of_two_devices_do_not_share_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for day, device in enumerate(("H100", "H200", "H200"), 1):
        began = f"2026-01-0{day}T00:00:00Z"
        run = replace(RUN, id=began, device=device, began=began, commit=f"commit{day}", command=f"run {day}")
        results.append(tmp_path / f"{device}.jsonl", [run, replace(RESULT, run=began, case=f"case{day}")])
    found = results.latest("cuda")
    assert [key[0] for key in found] == ["case2", "case3"]
    assert readme._machine(found) == "H200, torch 2, triton 3, commit commit3 (the newest of 2), 2026-01-03"
    assert readme._commands(found) == "`run 2`, then `run 3`"
