"""The GPU's side of the benchmarks, line by line, on a CPU: with stand-ins for torch.cuda and for NVML."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import isolate, plot, readme, results, roofline, targets, timing
from benchmarks.cases import attention, attention_peers, builders
from benchmarks.command import main
from benchmarks.overheads import Overheads
from benchmarks.telemetry import Reading, Telemetry
from benchmarks.timing import throttles

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MHZ, WATTS = 1755, 650_000


class OnCpu(TorchFunctionMode):
    """Whatever asks for a CUDA device gets the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(x: Any) -> Any:
            return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x

        named = {name: moved(x) for name, x in (kwargs or {}).items()}
        return function(*(moved(x) for x in args), **named)


class Event:
    """Two of them are 2 ms apart, whatever lies between."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, stop: "Event") -> float:
        return 2.0


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


class Graph:
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class NvmlError(Exception):
    pass


def nvml(**changes: Any) -> SimpleNamespace:
    """A card at `MHZ` that throttles for its power cap."""
    energy = iter(range(0, 10**9, 1000))
    found: dict[str, Any] = {
        "NVMLError": NvmlError,
        "NVML_CLOCK_SM": 1,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda identifier: identifier,
        "nvmlDeviceGetClockInfo": lambda handle, which: MHZ,
        "nvmlDeviceGetPowerUsage": lambda handle: WATTS,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(energy),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 4,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlClocksThrottleReasonSwPowerCap": 4,
        "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": 128,
        "nvmlClocksThrottleReasonHwThermalSlowdown": 64,
        "nvmlClocksThrottleReasonSwThermalSlowdown": 32,
        "nvmlClocksThrottleReasonHwSlowdown": 8,
    }
    return SimpleNamespace(**{**found, **changes}, __spec__=object())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine that says that it has a GPU."""

    @contextmanager
    def context(entered: object) -> Iterator[None]:
        yield

    facts = SimpleNamespace(uuid="1234", name="Stand-in GPU", multi_processor_count=132)
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "synchronize": lambda *device: None,
        "empty_cache": lambda: None,
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": Stream,
        "stream": context,
        "graph": context,
        "memory_allocated": lambda device: 1 << 20,
        "max_memory_allocated": lambda device: 3 << 20,
        "reset_peak_memory_stats": lambda device: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "get_device_properties": lambda device: facts,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(results, "device_arch", lambda device: "sm_90")
    monkeypatch.setattr(timing, "L2_BYTES", 1 << 10)
    monkeypatch.setattr(timing, "ENERGY_SECONDS", 0.02)
    monkeypatch.setattr(roofline, "_copy_rate", lambda size, device: 4e12)
    monkeypatch.setattr(roofline, "_matrix_rate", lambda size, dtype, device: 7e14)
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    with OnCpu():
        yield monkeypatch


@pytest.mark.usefixtures("gpu")
def test_a_gpu_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    words = ["attention/tiny", "--device", "cuda", "--quick", "--energy", "--seconds", "0.02", "--json", str(file)]
    assert main([*words, "--variants", "fusedmm", "eager", "flash-attn-4+merge"]) == 0
    runs, rows = results.read(file)
    (run,) = runs.values()
    assert (run.device, run.kind, run.power_limit_w) == ("Stand-in GPU", "cuda", 700.0)
    assert (run.versions["arch"], run.copy_gb_s, run.matrix_tflops["bfloat16"]) == ("sm_90", 4000.0, 700.0)
    timed = {(row.mode, row.variant): row for row in rows if row.status == results.TIMED}
    modes = ("forward", "backward", "both", "forward-graph", "both-graph")
    assert {mode for mode, _ in timed} == set(modes)
    assert {"fusedmm", "eager"} <= {variant for _, variant in timed}
    row = timed["both-graph", "fusedmm"]
    assert (row.median_ms, row.peak_mib, row.clock_mhz) == (2.0, 2.0, MHZ)
    assert (row.power_w, row.throttled) == (650.0, "power cap")
    assert row.energy_mj == 100.0  # 1000 mJ more at the second reading, over 20 ms / 2 ms = 10 calls
    assert Graph.replays > 0
    absent = next(row for row in rows if row.variant == "flash-attn-4+merge")
    assert (absent.status, absent.reason) == ("skipped", "flash-attn-4 is not installed (ci/wheels gathers it)")
    shown = capsys.readouterr().out
    assert "1.00x" in shown
    assert "  1755 MHz  650 W, 100 mJ  throttled: power cap" in shown


WORDS = ["--device", "cuda", "--seconds", "0.02", "attention/tiny"]


def test_a_call_that_waits_for_the_gpu_is_not_captured(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A capture that fails spoils PyTorch's allocator for everyone after it."""
    modes: list[object] = [0]
    begun: list[object] = []

    def waits(*arguments: Any) -> Any:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return formula(*arguments)

    formula = attention_peers.formula
    gpu.setattr(attention_peers, "formula", waits)
    gpu.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    graph = torch.cuda.graph
    gpu.setattr(torch.cuda, "graph", lambda entered: begun.append(entered) or graph(entered))
    file = tmp_path / "results.jsonl"
    assert main([*WORDS, "--json", str(file), "--variants", "fusedmm", "eager"]) == 0
    found = {(row.mode, row.variant): (row.status, row.reason) for row in results.read(file)[1]}
    for mode in ("forward-graph", "both-graph"):
        assert found[mode, "eager"] == ("skipped", "it waits for the GPU, which a CUDA graph cannot")
        assert found[mode, "fusedmm"][0] == results.TIMED
    assert found["forward", "eager"][0] == results.TIMED
    assert len(begun) == 2
    assert modes[-1] == 0


def test_a_gpu_that_no_longer_answers_ends_the_process(gpu: pytest.MonkeyPatch) -> None:
    def fault(*device: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert main([*WORDS, "--variants", "nobody"]) == 0
    gpu.setattr(torch.cuda, "synchronize", fault)
    assert main([*WORDS, "--variants", "nobody"]) == isolate.CRASHED


def test_a_fault_of_one_is_not_a_row_of_those_after_it(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken: list[str] = []

    def faults(problem: object) -> Any:
        broken.append("GPU")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize(*device: object) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu.setattr(torch.cuda, "synchronize", synchronize)
    gpu.setattr(attention_peers, "loops", faults)
    progress, file = tmp_path / "progress", tmp_path / "results.jsonl"
    gpu.setenv(isolate.PROGRESS, str(progress))
    variants = ("fusedmm", "eager", "loops", "sdpa")
    assert main([*WORDS, "--json", str(file), "--variants", *variants]) == isolate.CRASHED
    assert progress.read_text().split()[-2:] == ["attention/tiny", "loops"]
    assert results.read(file)[1] == []


@pytest.mark.usefixtures("gpu")
def test_an_error_of_one_case_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_room(shape: attention.Shape, *where: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")

    file = tmp_path / "results.jsonl"
    monkeypatch.setattr(attention.Shape, "example", no_room)
    assert main([*WORDS, "modules/fusion-block-tiny", "--json", str(file), "--variants", "fusedmm"]) == 1
    first, *rows = results.read(file)[1]
    assert first.key == ("attention/tiny", "all", "fusedmm")
    assert first.status == "out of memory"
    assert {row.status for row in rows if row.case == "modules/fusion-block-tiny"} == {results.TIMED}


def test_without_nvml_there_are_times_but_no_clocks_and_no_ratios(
    gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_driver() -> None:
        raise NvmlError("Driver Not Loaded")

    gpu.setitem(sys.modules, "pynvml", nvml(nvmlInit=no_driver))
    telemetry = Telemetry(CUDA)
    assert telemetry.missing == "NVML: Driver Not Loaded"
    assert telemetry.read() == Reading(clock_mhz=0.0)
    assert (telemetry.power_w(), telemetry.energy_mj(), telemetry.power_limit_w()) == (None, None, None)
    assert main([*WORDS, "--variants", "fusedmm", "eager"]) == 0
    shown = capsys.readouterr().out
    assert "no ratios are shown" in shown
    assert "x  error" not in shown
    assert Telemetry(torch.device("cpu")).read() == Reading()


def test_what_a_card_does_not_tell_is_none(gpu: pytest.MonkeyPatch) -> None:
    def unsupported(handle: object) -> int:
        raise NvmlError("Not Supported")

    changes = dict.fromkeys(("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"), unsupported)
    gpu.setitem(sys.modules, "pynvml", nvml(**changes, nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0))
    telemetry = Telemetry(CUDA)
    assert telemetry.read() == Reading(clock_mhz=MHZ, throttled="no")
    assert (telemetry.power_w(), telemetry.energy_mj()) == (None, None)


def test_every_reason_for_throttling_is_kept() -> None:
    assert throttles(None, None) is None
    assert throttles(None, "no") == "no"
    assert throttles("power cap", "no") == "power cap"
    assert throttles("power cap", "thermal, power cap") == "power cap, thermal"


@pytest.mark.usefixtures("gpu")
def test_ceilings_are_measured_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert roofline._copy_rate(1 << 10, CUDA) == 2 * 1024 / 2e-3
    assert roofline._matrix_rate(16, torch.bfloat16, CUDA) == 2 * 16**3 / 2e-3


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


def test_every_page_and_figure_can_be_made_from_gpu_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run in which one thing each went wrong: a case, a variant, a clock."""
    versions = {"torch": "2.11.0", "triton": "3.6.0", "arch": "sm_90"}
    began = "2026-01-01T00:00:00Z"
    rates = {"bfloat16": 780.0, "float16": 780.0, "float32": 50.0}
    run = results.Run("1", "NVIDIA H200", "cuda", began, "abc", "x", versions, 0, 700.0, 132, 4300.0, rates)
    sizes = {"total_q": 8, "heads": 2, "head_dim": 64, "modalities": 4, "rows": 8, "classes": 8, "student_dim": 8}
    blank = results.Result("1", "", "", "", {**sizes, "softmax": "joint"}, results.TIMED)
    rows, kernel = [], "attention_hopper_forward[joint,gated,d64,bf16]"
    for rank, name in enumerate(builders("cuda")):
        for mode in ("forward", "backward", "both", "forward-graph"):
            for place, variant in enumerate(("fusedmm", "fusedmm-portable", "fusedmm-hopper", "eager", "sdpa-cudnn")):
                ms = 1.0 + 0.1 * place
                clock = 1200.0 if variant == "eager" and rank % 3 == 0 else 1980.0
                row = replace(blank, case=name, mode=mode, variant=variant, median_ms=ms, p20_ms=ms, p80_ms=ms)
                row = replace(row, clock_mhz=clock, peak_mib=10.0 + place, tflops=300.0, share=0.5, intensity=100.0)
                rows.append(replace(row, kernel=kernel if variant == "fusedmm-hopper" else None))
            rows.append(replace(blank, case=name, mode=mode, variant="flex", status="failed", reason="it broke"))
    whole = replace(blank, case="attention/tiny", mode="all", variant="fusedmm", status="out of memory", reason="big")
    rows = [row for row in rows if row.case != "attention/tiny"] + [whole]
    overheads = [replace(row, run="1") for row in Overheads(CPU, Telemetry(CPU), "1", 0.01).rows()]
    results.append(tmp_path / "results.jsonl", [run, *rows, *overheads])
    monkeypatch.setattr(results, "RESULTS", tmp_path / "kept")
    (kept,) = results.keep(tmp_path / "results.jsonl")
    assert kept.name == "nvidia-h200.jsonl"
    assert plot.run(tmp_path) == 0
    assert "overheads" not in (tmp_path / "speed-and-memory.svg").read_text()
    assert {file.stem for file in tmp_path.glob("*.svg")} == set(plot.FIGURES)
    many = {("case", "both", f"peer {place}"): (run, blank) for place in range(30)}
    assert len({tuple(look.values()) for look in plot._looks(many, ["case"]).values()}) == 30
    page = readme.section()
    assert "NVIDIA H200, torch 2.11.0, triton 3.6.0, commit abc" in page
    assert "| attention/tiny | all | out of memory: big |" in page
    assert "| eager | 1.30 |" in page
    assert "no ratio: clocks differ" in page
    assert "not measured yet" not in page.split("**CPU")[0]
    text = targets.page(results.latest("cuda"))
    assert "dense-gated-d128-4k forward TFLOP/s: 300 (>= 620, MISSED)" in text
    assert main(["paths", str(kept)]) == 0
    assert "('forward', 'joint', 64): not justified" in capsys.readouterr().out
    assert results.measured_shares() == {("sm_90", kernel): pytest.approx(300e12 / (4096 * 132 * 1980e6))}
    assert main(["compare", str(kept), str(kept)]) == 0
