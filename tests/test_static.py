"""Kernels compiled ahead of time are no worse than the committed table; the readers of that table are right.

The check itself runs in a process without Triton's interpreter. What has not changed since the table was committed is
not compiled again, except for a sample; of what has changed at most `LIMIT` kernels are. All of them:
`python -m benchmarks static --check`.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton

from benchmarks import results, static_command
from benchmarks.cases import attention, distillation
from benchmarks.compiled import SHARED_BYTES, KernelReport, read_compiled
from benchmarks.static import Row, faults, read_rows, specs, worsened
from benchmarks.static_command import problems
from fusedmm.kernels.launch import ARCHITECTURES, capability_arch
from tests.benchmark_rows import RESULT, RUN

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 48
SAMPLE = 6
PINNED = "3.7.1"
# Triton's version -> architectures and kernels (by a part of their names) that its table holds
TABLES = {PINNED: (ARCHITECTURES, ""), "3.6.0": (("sm_90",), "")}
# Kernels that spill a little, at most 20, outside their loops under 3.6: tiles are chosen under the pinned version.
SPILLING = {
    "3.6.0": {
        "attention_backward_key_value_spans[joint,dropout,d128,bf16]",
        "attention_backward_key_value_spans[joint,dropout,d96,bf16]",
        "attention_backward_query[joint,split,d64,bf16]",
        "attention_backward_query[partials,plain,d256,fp32]",
        "attention_backward_query_spans[per_modality,plain,d64,fp32]",
        "attention_forward[joint,few,timed,d256,bf16]",
        "attention_forward[joint,timed,d256,bf16]",
        "attention_forward[partials,plain,d256,fp32]",
        "attention_forward[per_modality,plain,d256,bf16]",
    }
}

# Most shared memory among the passes of attention that have tiles of their own on sm_86, and of distillation.
LARGEST = (
    "attention_forward[joint,gated,d256,bf16]",
    "attention_backward_query_spans[joint,many,timed,d256,bf16]",
    "attention_backward_query_spans[joint,gated,d256,fp32]",
    "distillation_gradient[forward_kl,heads,labels,bf16]",
)

ROW = Row(
    arch="sm_90",
    name="attention_forward[x]",
    fingerprint="0",
    config={"num_warps": 4, "num_stages": 2},
    registers=200,
    spills=4,
    main_spills=0,
    shared=100 << 10,
    programs=2,
    instructions=400,
    mix={"HGMMA": 8},
    matrix=8,
    in_flight=1.0,
    share=0.7,
    clocks={"matrix": 1024},
    copies=4,
)


def table(version: str) -> list[Row]:
    return list(read_rows(ROOT / "benchmarks" / "results" / f"static-{version}.jsonl").values())


def test_kernels_are_no_worse_than_committed() -> None:
    if triton.__version__ not in TABLES:
        pytest.skip(f"no table of Triton {triton.__version__}: python -m benchmarks static --update writes one")
    command = [sys.executable, "-m", "benchmarks", "static", "--check", "--limit", str(LIMIT), "--sample", str(SAMPLE)]
    arches, only = TABLES[triton.__version__]
    command += ["--arch", *arches, "--only", only]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    known = {f"static: {arch} {name}: " for arch in arches for name in SPILLING.get(triton.__version__, ())}
    complaints = re.findall(r"^static: (?:sm_|gfx|The ).*", done.stdout, re.MULTILINE)
    assert {re.sub(r"\d+ spills$", "", complaint) for complaint in complaints} == known, done.stderr[-4000:]
    assert done.returncode == bool(known), done.stderr[-4000:]


@pytest.mark.parametrize("version", TABLES)
def test_the_committed_tables_cover_what_they_should(version: str) -> None:
    rows = table(version)
    arches, only = TABLES[version]
    assert {row.arch for row in rows} == set(arches)
    assert all(only in row.name for row in rows)
    spilling = [row for row in rows if row.spills]
    assert {row.name for row in spilling} == SPILLING.get(version, set())
    assert all(row.spills <= 20 and not row.main_spills for row in spilling)
    assert [row.key for row in rows if faults(row) and row not in spilling] == []
    missing = {name for name in specs("sm_90") if "attention_hopper" in name} - {row.name for row in rows}
    assert missing == set()


@pytest.mark.parametrize("version", TABLES)
def test_the_hopper_kernels_hide_their_exponentials_under_products(version: str) -> None:
    """Of every kind that the launcher can choose: TMA loads, HGMMA in the loop, none spilled, none in the open."""
    rows = [row for row in table(version) if row.name.startswith("attention_hopper_") and row.matrix]
    kinds = {tuple(row.name.partition("[")[2].rstrip("]").split(",")) for row in rows}
    dims = {"d64", "d96", "d128", "d256"}
    assert {kind[0] for kind in kinds} == {"joint", "per_modality", "partials"}
    assert {part for kind in kinds for part in kind[1:]} >= {"plain", "gated", "timed", "active", "delta", *dims}
    for row in rows:
        assert row.copies > 0, row
        assert row.mix["HGMMA"] == row.matrix, row
        assert row.in_flight == 1.0, row
        assert row.spills == 0, row
    other_dtype = {"bf16": "fp16", "fp16": "bf16"}
    names = {row.name for row in rows}
    for row in rows:
        dtype = row.name[-5:-1]
        assert row.name.replace(dtype, other_dtype[dtype]) in names, row


def test_a_measurement_shows_the_model_s_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peak = 4096 * 132 * 1.5e9 / 1e12
    run, result = replace(RUN, versions={"arch": "sm_90"}), replace(RESULT, kernel=ROW.name)
    results.append(tmp_path / "h200.jsonl", [run, replace(result, tflops=0.55 * peak, clock_mhz=1500.0)])
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    shown = static_command.table([ROW, replace(ROW, name="another")])
    assert "70%  55% (model +15%)" in shown
    assert shown.count("model +") == 1
    tiny = replace(result, case="tiny", tflops=0.01 * peak, clock_mhz=1500.0)
    results.append(tmp_path / "h200.jsonl", [tiny])  # not what the model speaks of: the best case counts
    assert "55% (model +15%)" in static_command.table([ROW])
    unread = [replace(row, tflops=0.55 * peak, clock_mhz=None) for row in (result, tiny)]
    results.append(tmp_path / "h200.jsonl", unread)
    assert results.measured_shares() == {}  # without a clock there is no peak


def test_every_gpu_case_names_kernels_of_the_table() -> None:
    for name, arguments in attention.shapes("cuda").items():
        kernels = attention.forward_kernels(attention.Shape(**arguments))  # type: ignore[arg-type]
        assert set(kernels.values()) <= set(specs("sm_90")), name
    for name, shape in distillation.shapes("cuda").items():
        kernels = distillation.build(name, "cuda", shape).kernels
        assert set(kernels.values()) <= set(specs("sm_90")), name
        assert bool(kernels) == (name == "scores-2048-4096")


def test_hopper_forwards_use_asynchronous_products() -> None:
    """`in_flight` is None where no group of asynchronous products (wgmma) is in the main loop."""
    rows = [row for row in table(PINNED) if row.arch == "sm_90" and "bf16" in row.name]
    forwards = [row for row in rows if row.name.startswith(("attention_forward[", "attention_backward_query["))]
    assert forwards
    assert [row.name for row in forwards if row.in_flight is None] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 5}, "spills 4 -> 5"),
        ({"main_spills": 1}, "main_spills 0 -> 1"),
        ({"programs": 1}, "programs on a multiprocessor 2 -> 1"),
        ({"matrix": 0}, "no matrix instruction"),
        ({"copies": 0}, "no TMA load left"),
        ({"in_flight": 0.9}, "in_flight 1.0 -> 0.9"),
        ({"share": 0.6}, "share 0.7 -> 0.6"),
        ({"share": None}, "share 0.7 -> None"),
    ],
)
def test_worse_is_named(change: dict[str, object], words: str) -> None:
    found = worsened(ROW, replace(ROW, **change))  # type: ignore[arg-type]
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize("change", [{"spills": 0}, {"registers": 255}, {"programs": 3}, {"share": 0.69}, {"shared": 0}])
def test_better_or_noise_is_not(change: dict[str, object]) -> None:
    assert worsened(ROW, replace(ROW, **change)) == []  # type: ignore[arg-type]


def test_faults_need_no_committed_row() -> None:
    bad = replace(ROW, main_spills=2, shared=300 << 10, programs=0, registers=4)
    assert len(faults(bad)) == 4
    assert len(problems([bad], {}, [], [])) == 4


def test_amd_spills_are_what_goes_through_memory() -> None:
    """A vector register in scratch counts; a scalar one in a lane of a vector register does not."""
    code = """
        v_writelane_b32 v254, s30, 0
        scratch_store_dwordx2 off, v[18:19], off ; 8-byte Folded Spill
        scratch_load_dword v64, off, off offset:32 ; 4-byte Folded Reload
        .vgpr_count: 255
        .sgpr_spill_count: 1
        .vgpr_spill_count: 2
    """
    report = read_compiled("x", "gfx942", SimpleNamespace(asm={"amdgcn": code}, metadata=SimpleNamespace(shared=0)))
    assert (report.spills, report.registers) == (2, 255)


@pytest.mark.parametrize(("columns", "programs"), [(0, 4), (256, 2), (512, 1)])
def test_programs_share_tensor_memory(columns: int, programs: int) -> None:
    """512 columns a multiprocessor: a program waits until its own are free, however many registers are."""
    report = KernelReport("x", "sm_100", 128, 128, (), 0, columns, 0, 0, ())
    assert report.ctas_per_sm == programs


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        *(((8, 0), "sm_80"), ((8, 7), "sm_80"), ((9, 0), "sm_90")),
        *(((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_100")),
        *(((8, 6), "sm_86"), ((8, 9), "sm_86"), ((12, 0), "sm_86"), ((12, 1), "sm_86")),
    ],
)
def test_a_gpu_takes_the_tiles_that_it_can_hold(capability: tuple[int, int], arch: str) -> None:
    assert capability_arch(*capability) == arch


def test_what_sm_86_takes_of_sm_80_fits_its_shared_memory() -> None:
    """The table lists of sm_86 only what differs: of the rest the rows of sm_80 tell."""
    own = specs("sm_86")
    taken = [r for r in table(PINNED) if r.arch == "sm_80" and r.config == own[r.name].config.chosen()]
    assert len(taken) > 100
    assert [row.name for row in taken if row.shared > SHARED_BYTES["sm_86"]] == []


@pytest.mark.parametrize("capability", [89, 120])
def test_the_tiles_of_sm_86_fit_the_gpus_that_share_them(capability: int) -> None:
    """The largest of each pass, compiled: no more shared memory than 8.6 has, no spills."""
    script = f"""
from dataclasses import replace
from benchmarks.compiled import SHARED_BYTES, analyse
from benchmarks.static import specs
for name in {LARGEST}:
    report = analyse(replace(specs("sm_86")[name], arch="sm_{capability}"))
    assert (report.spills, report.shared_bytes <= SHARED_BYTES["sm_86"]) == (0, True), report
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_no_target_may_spill_in_a_main_loop() -> None:
    for arch in ARCHITECTURES:
        assert faults(replace(ROW, arch=arch, shared=0, main_spills=1)) == ["1 spills in the main loop"]


def test_no_kernel_may_spill_outside_its_main_loop() -> None:
    for arch in ARCHITECTURES:
        assert faults(replace(ROW, arch=arch, shared=0, spills=1)) == ["1 spills"]


def test_unchanged_source_that_compiles_differently_is_a_problem() -> None:
    row = replace(ROW, spills=0)
    committed = {row.key: row}
    assert problems([row], committed, [row.key], []) == []
    assert "compiles to something else" in problems([replace(row, registers=100)], committed, [row.key], [])[0]


def test_a_row_of_a_kernel_that_is_gone_is_a_problem() -> None:
    assert "which is no more" in problems([], {}, [], [ROW.key])[0]
