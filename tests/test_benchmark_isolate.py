"""Cases in a child process: a crash or a hang costs one variant, and every row is kept."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import isolate, results
from benchmarks.command import main

CHILD = """
import json, os, sys, time
progress, log = sys.argv[1:3]
cases, without = (words.split() for words in sys.argv[3:5])

def begin(*what):
    with open(progress, "a") as file:
        file.write(" ".join(what) + "\\n")

for case in cases:
    begin(case)
    for variant in ("fusedmm", "good", "bad"):
        if variant in without:
            continue
        begin(case, variant)
        if (case, variant) in (("crash", "bad"), ("ours", "fusedmm")):
            os.abort()
        if (case, variant) == ("hang", "bad"):
            time.sleep(60)
    begin(case, "")
    if case == "timing":
        os.abort()
    with open(log, "a") as file:
        file.write(f"{case}-{'-'.join(without)}\\n")
sys.exit(1 if "wrong" in cases else 0)
"""


def test_a_crash_and_a_hang_cost_one_variant_each(tmp_path: Path) -> None:
    progress, log, told = tmp_path / "progress", tmp_path / "log", []

    def command(left: Any, without: Any) -> list[str]:
        return [sys.executable, "-c", CHILD, str(progress), str(log), " ".join(left), " ".join(without)]

    def run(*cases: str) -> int:
        return isolate.run(cases, command, progress, 2.0, lambda *facts: told.append(facts))

    assert run("first", "crash", "ours", "second", "timing", "hang", "last") == 1
    # Run again without whoever ended the process; left out of everything that follows once it has ended two.
    assert log.read_text().split() == ["first-", "crash-bad", "second-", "hang-bad", "last-bad"]
    assert told == [
        ("crash", "bad", "exit status -6"),
        ("ours", "fusedmm", "exit status -6"),
        ("timing", "all", "exit status -6"),
        ("hang", "bad", "stopped after 2 s"),
    ]
    assert run("wrong") == 1
    assert run("fine") == 0
    assert len(told) == 4


def test_a_child_that_cannot_start_is_not_started_again(tmp_path: Path) -> None:
    starts: list[object] = []

    def command(left: Any, without: Any) -> list[str]:
        starts.append(left)
        return [sys.executable, "-c", "raise SystemExit(3)"]

    assert isolate.run(["a", "b"], command, tmp_path / "progress", 2.0, lambda *facts: None) == 3
    assert len(starts) == 1


def test_isolated_runs_keep_every_row(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    words = ["attention/tiny", "--device", "cpu", "--seconds", "0.02", "--json", str(file)]
    assert main([*words, "--variants", "fusedmm", "--isolate"]) == 0  # prints a table without clocks, too
    kinds = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["kind_of_row"] for row in kinds] == ["run"] + 3 * ["result"]
    assert [row["mode"] for row in kinds[1:]] == ["forward", "backward", "both"]


ABORTS = """
import os

from benchmarks.cases import attention_peers

attention_peers.loops = lambda problem: os.abort()
"""


def test_an_isolated_run_goes_on_without_who_ended_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABORTS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(results.ROOT))))
    file = tmp_path / "results.jsonl"
    words = ["attention/tiny", "distillation/small-v", "--device", "cpu", "--seconds", "0.02", "--isolate"]
    assert main([*words, "--json", str(file), "--variants", "loops", "fusedmm", "chunked"]) == 1
    runs, rows = results.read(file)
    assert len(runs) == 3  # of both cases, of the first again, of the second
    ended = [row for row in rows if row.status == "crashed"]
    assert [(row.case, row.variant, row.reason) for row in ended] == [("attention/tiny", "loops", "exit status -6")]
    timed = {(row.case, row.variant) for row in rows if row.status == results.TIMED}
    small = {("distillation/small-v", "fusedmm"), ("distillation/small-v", "chunked")}
    assert timed == {("attention/tiny", "fusedmm"), *small}
