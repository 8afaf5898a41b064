"""ci/gpu tells the truth: its status, its time budget, its files; and the scripts are what the documents say."""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.command import main
from benchmarks.peers import join, split

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("setup", "demo", "test", "check", "gpu", "wheels")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_gpu", ROOT / "ci" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ci_gpu", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return module


def test_provenance_needs_neither_git_nor_a_driver(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FUSEDMM_COMMIT", "abc1234")
    found = gpu.provenance()
    assert (found["commit"], found["gpu"]) == ("abc1234", "")
    monkeypatch.delenv("FUSEDMM_COMMIT")
    assert gpu.provenance()["commit"] == "unknown"


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, budget: str, *codes: str) -> tuple[int, str]:
    found = [gpu.Step(f"step {place}", [sys.executable, "-c", code], 0.5) for place, code in enumerate(codes)]
    monkeypatch.setattr(gpu, "steps", lambda args, out: found)
    monkeypatch.setattr(gpu, "provenance", lambda: {"commit": "abc"})
    monkeypatch.setattr(sys, "argv", ["ci/gpu", "--out", str(out), "--budget-s", budget])
    return gpu.main(), (out / "table.txt").read_text()


def test_status_is_0_only_if_every_step_passed(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, table = run(gpu, monkeypatch, tmp_path, "60", "print('fine')", "raise SystemExit(3)", "print('also')")
    assert status == 1
    assert [line.split(" s  ")[1] for line in table.splitlines()] == ["passed", "FAILED with exit status 3", "passed"]
    log = (tmp_path / "log.txt").read_text()
    assert "fine" in log
    assert "also" in log
    assert json.loads((tmp_path / "provenance.json").read_text()) == {"commit": "abc"}
    assert run(gpu, monkeypatch, tmp_path / "good", "60", "print('fine')")[0] == 0


def test_a_step_is_stopped_when_its_share_of_the_budget_is_spent(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # 15 s are kept back, so 12 are left: 6 for the first step, then less than the 5 that a step must have.
    status, table = run(
        gpu, monkeypatch, tmp_path, "27", "import time; time.sleep(60)", "print('never')", "print('no')"
    )
    assert status == 1
    assert "STOPPED after its 6 s" in table
    assert "not run: the time budget is spent" in table


def test_the_gpu_tests_come_first_and_the_choice_of_kernels_last(gpu: ModuleType) -> None:
    args = argparse.Namespace(workers=2, conformance=Path("oracle"), quick=True, only=None)
    found = gpu.steps(args, Path("out"))
    seeds = [f"conformance seed {seed}" for seed in range(3)]
    names = ["tests", "Hopper tests", *seeds, "compiling", "overheads", "benchmarks", "choice of kernels"]
    assert [step.name for step in found] == names
    assert not [word for step in found for word in step.command if word.startswith("tests/") and not exists(word)]
    assert exists(gpu.HOPPER)
    assert all(any((ROOT / "tests").glob(f"test_{name}.py")) for name in gpu.ELSEWHERE)
    (quick,) = (step.command for step in found if step.name == "benchmarks")
    args.quick = False
    (full,) = (step.command for step in gpu.steps(args, Path("out")) if step.name == "benchmarks")
    assert ("--quick" in quick, "--energy" in full) == (True, True)
    args.quick = True
    for step in found:
        if step.command[1:3] == ["-m", "benchmarks"]:
            words = step.command[3:]
            last = {"paths": ["none"], "warm": ["no-such-case"]}.get(words[0], ["--list"])
            assert main([*(words[:1] if words[0] == "paths" else words), *last]) in (0, 2)
    args.only = ["conformance", "choice"]
    assert [step.name for step in gpu.steps(args, Path("out"))] == [*seeds, "choice of kernels"]


def exists(name: str) -> bool:
    return (ROOT / name).exists()


def test_a_hang_costs_its_limit_and_what_relies_on_it_goes_without(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hang = gpu.Step("hang", [sys.executable, "-c", "import time; time.sleep(60)"], 1.0, limit_s=6.0)
    echo = [sys.executable, "-c", "import sys; print('given', sys.argv[1:])"]
    relies = gpu.Step("relies", echo, 0.5, relies_on="hang", otherwise=("--without", "it"))
    monkeypatch.setattr(gpu, "provenance", dict)
    monkeypatch.setattr(gpu, "steps", lambda args, out: [hang, relies])
    monkeypatch.setattr(sys, "argv", ["ci/gpu", "--out", str(tmp_path), "--budget-s", "120"])
    assert gpu.main() == 1
    assert [line.split(" s  ")[1] for line in (tmp_path / "table.txt").read_text().splitlines()] == [
        "STOPPED after its 6 s",
        "passed",
    ]
    assert "given ['--without', 'it']" in (tmp_path / "log.txt").read_text()


def test_the_quick_plan_needs_no_gpu_and_less_than_ten_minutes(gpu: ModuleType) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [ROOT / "ci" / "gpu", "--quick", "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Hopper tests, at most" in done.stdout
    assert "all, at most 580 s" in done.stdout
    (limit,) = (line for line in done.stdout.splitlines() if line.startswith("benchmarks, at most"))
    assert float(done.stdout.split("an estimated ")[1].split()[0]) <= float(limit.split()[3])  # every row is filled


def test_wheels_are_unpacked_offline_and_found(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    facts = "dummy_peer-1.0.dist-info"
    with zipfile.ZipFile(wheels / "dummy_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("inner/dummy_peer.py", "ANSWER = 42\n")
        wheel.writestr("dummy_peer.pth", "import sys, os; sys.path.insert(0, os.path.join(sitedir, 'inner'))\n")
        wheel.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: dummy-peer\nVersion: 1.0\n")
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    other = "dummy_peer_of_another_machine-1.0-cp27-cp27m-win32.whl"
    (wheels / other).write_bytes((wheels / "dummy_peer-1.0-py3-none-any.whl").read_bytes())
    assert gpu.add_wheels(tmp_path / "nothing", tmp_path).startswith("FAILED: no wheel")
    split(wheels / "dummy_peer-1.0-py3-none-any.whl", 300)
    assert not (wheels / "dummy_peer-1.0-py3-none-any.whl").exists()
    assert gpu.add_wheels(wheels, tmp_path) == f"FAILED for {other}"
    code = "import dummy_peer, importlib.metadata as m; print(dummy_peer.ANSWER, m.version('dummy-peer'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["42", "1.0"], done.stderr
    (wheels / "dummy_peer-1.0-py3-none-any.whl.1of3").unlink()
    assert join(wheels, tmp_path) == [wheels / other]


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "ci" / "gpu"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device here" in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_valid(name: str) -> None:
    script = ROOT / "ci" / name
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_check_refuses_what_it_does_not_know() -> None:
    done = subprocess.run([ROOT / "ci" / "check", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown check 'nonsense', expected one of: lint format types package tests speed." in done.stderr


FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python";; esac
"""


@pytest.mark.parametrize(("version", "folder"), [("", ".venv"), ("2.11.0", ".venv-2.11.0")])
def test_setup_pins_another_torch_in_a_venv_of_its_own(version: str, folder: str, tmp_path: Path) -> None:
    pinned = (ROOT / "ci" / "constraints.txt").read_text().splitlines()
    for name in ("pyproject.toml", "ci/setup", "ci/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "FUSEDMM_NO_VENV": "0", "FUSEDMM_TORCH": version, "PYTHON": str(python)}
    done = subprocess.run([tmp_path / "ci" / "setup"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / folder / "bin" / "python")
    given = (tmp_path / folder / "constraints.txt").read_text().splitlines()
    if version:
        others = [line for line in pinned if not line.startswith(("torch==", "triton==", "setuptools=="))]
        assert len(others) == len(pinned) - 3
        assert given == [*others, f"torch=={version}"]
    else:
        assert given == pinned


def test_setup_without_a_venv_uses_the_active_python() -> None:
    environment = {**os.environ, "FUSEDMM_NO_VENV": "1", "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "ci" / "setup"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.strip() == sys.executable
    assert f"torch {torch.__version__}" in done.stderr
