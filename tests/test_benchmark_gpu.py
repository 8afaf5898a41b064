"""The GPU's side of the benchmarks, line by line, on a CPU: with stand-ins for torch.cuda and for NVML."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import isolate, results, roofline, timing
from benchmarks.cases import attention, attention_peers
from benchmarks.command import main
from benchmarks.telemetry import Reading, Telemetry
from benchmarks.timing import throttles

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MHZ, WATTS = 1755, 650_000


class OnCpu(TorchFunctionMode):
    """Whatever asks for a CUDA device gets the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(x: Any) -> Any:
            return CPU if isinstance(x, torch.device) and x.type == "cuda" else x

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

    assert main([*WORDS, "--variants", "fusedmm", "--without", "fusedmm"]) == 0
    gpu.setattr(torch.cuda, "synchronize", fault)
    assert main([*WORDS, "--variants", "fusedmm", "--without", "fusedmm"]) == isolate.CRASHED


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
    assert Telemetry(CPU).read() == Reading()


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
