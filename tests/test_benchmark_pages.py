"""Pages and figures made from results: they are up to date, and say what is missing, failed or not comparable."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import plot, readme, results, targets
from benchmarks.cases import builders, scaling
from benchmarks.command import main
from benchmarks.overheads import Overheads
from benchmarks.telemetry import Telemetry
from tests.benchmark_rows import RESULT, RUN

CPU = torch.device("cpu")


def test_the_readme_s_performance_section_is_generated() -> None:
    assert readme.run(check=True) == 0


def test_the_table_of_small_losses_holds_the_fastest_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same run and mode; a point that no run has says so."""
    name = scaling.grid_name(*scaling.GRID[0], "jsd")
    times = {"fusedmm": 0.2, "fusedmm-lean": 0.05, "eager": 0.1, "chunked": 0.3}
    rows = [replace(RESULT, case=name, mode="both", variant=variant, median_ms=ms) for variant, ms in times.items()]
    monkeypatch.setattr(readme, "latest", lambda kind: {row.key: (RUN, row) for row in rows})
    cells = readme.grid_part().splitlines()[4].split(" | ")
    assert cells == ["| 64", "2", "not measured yet", "not measured yet", "0.100 / 0.200 ms: 0.50x |"]
    monkeypatch.setattr(readme, "latest", lambda kind: {})
    assert readme.grid_part() == f"**CPU: not measured yet.** Command: {readme.GRID_COMMAND}."


def test_figures_show_no_ratio_of_different_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(plot, "_legend", lambda figure, axes: shown.extend(len(axis.get_lines()) for axis in axes))
    ours = replace(RESULT, mode="both", clock_mhz=1980.0)
    for clock in (1980.0, 1500.0):
        rows = (ours, replace(ours, variant="other", clock_mhz=clock))
        plot.speed_and_memory({row.key: (RUN, row) for row in rows}, tmp_path / "figure.svg")
    assert shown == [2, 2, 1, 2]  # the line at fusedmm's and a mark: of time, and of memory


def test_every_page_and_figure_can_be_made_from_gpu_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run in which one thing each went wrong: a case, a variant, a clock."""
    rates = {"bfloat16": 780.0, "float16": 780.0, "float32": 50.0}
    run = replace(RUN, device="NVIDIA H200", versions={**RUN.versions, "arch": "sm_90"}, matrix_tflops=rates)
    sizes = {"total_q": 8, "heads": 2, "head_dim": 64, "modalities": 4, "rows": 8, "classes": 8, "student_dim": 8}
    blank = results.Result(run.id, "", "", "", {**sizes, "softmax": "joint"}, results.TIMED)
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
    overheads = Overheads(CPU, Telemetry(CPU), run.id, 0.01).rows()
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
    assert "NVIDIA H200, torch 2, triton 3, commit abc" in page
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
