"""The benchmarks measure what they say: gate, timing, memory, model, files, comparison."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import compare, peers, plot, readme, results, warm
from benchmarks.against import Against, over_rounds
from benchmarks.case import Case, Prepared, Unavailable, Variant
from benchmarks.cases import attention, attention_paths, attention_peers, builders, scaling
from benchmarks.command import COMMANDS, main
from benchmarks.gate import Gate
from benchmarks.harness import Harness, call_of, ratio
from benchmarks.machine_code import parse_sass
from benchmarks.memory import peak_bytes
from benchmarks.model import in_flight, loop_flops, pipe_clocks
from benchmarks.results import Result, Run
from benchmarks.roofline import Ceilings
from benchmarks.telemetry import Telemetry
from benchmarks.timing import comparable

CPU = torch.device("cpu")
CEILINGS = Ceilings(10.0, {"float32": 0.1})
RESULT = Result("run", "case", "forward", "fusedmm", {}, "timed", "", 1.0, 0.9, 1.1, 10, 100.0)


def toy(*variants: Variant) -> Case:
    """y = 2 x, summed up."""

    def bind(problem: Tensor, dtype: torch.dtype) -> Prepared:
        return doubled(problem.to(dtype))

    return Case(
        name="toy",
        sizes={"n": 8},
        problem=lambda device: torch.ones(8),
        small=lambda device: torch.arange(8.0),
        reference=bind,
        variants=variants,
        flops=dict.fromkeys(("forward", "backward", "both"), 8.0),
        bytes=dict.fromkeys(("forward", "backward", "both"), 64.0),
        dtype=torch.float32,
    )


def doubled(x: Tensor, factor: float = 2.0) -> Prepared:
    leaf = x.clone().requires_grad_()
    return Prepared(lambda: {"y": leaf * factor}, {"x": leaf}, {"y": torch.ones_like(x)})


def harness() -> Harness:
    return Harness(CPU, CEILINGS, Telemetry(CPU), "run", seconds=0.01)


def unavailable(problem: Tensor) -> Prepared:
    raise Unavailable("not here")


def broken(problem: Tensor) -> Prepared:
    raise RuntimeError("it broke\nin two lines")


def test_every_variant_and_mode_gets_a_row() -> None:
    good = Variant("fusedmm", doubled, ours=True)
    rows = harness().results(toy(good, Variant("absent", unavailable), Variant("broken", broken, modes=("forward",))))
    assert {(row.variant, row.mode): row.status for row in rows} == {
        ("fusedmm", "forward"): "timed",
        ("fusedmm", "backward"): "timed",
        ("fusedmm", "both"): "timed",
        ("absent", "forward"): "skipped",
        ("absent", "backward"): "skipped",
        ("absent", "both"): "skipped",
        ("broken", "forward"): "failed",
    }
    assert next(row.reason for row in rows if row.variant == "broken") == "RuntimeError: it broke"


def test_warming_up_calls_what_will_be_timed_and_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def variant(name: str, *, compiles: bool = False) -> Variant:
        def prepare(x: Tensor) -> Prepared:
            called.append(name)
            return doubled(x)

        return Variant(name, prepare, compiles=compiles)

    found = [variant("fusedmm"), variant("left-out"), variant("slow", compiles=True), variant("wanted", compiles=True)]
    monkeypatch.setattr("benchmarks.timing.time_once", None)
    warm.once(toy(*found, Variant("broken", broken)), CPU, {"left-out"}, {("toy", "wanted")})
    assert called == ["fusedmm", "fusedmm", "wanted", "wanted"]  # the gate's twin, and the problem


def test_cases_are_warmed_up_side_by_side_in_shares_of_one_cost(tmp_path: Path) -> None:
    cost = {"long": 9.0, "a": 3.0, "b": 3.0, "c": 2.0}
    assert warm.divided(cost, 2) == [["long"], ["a", "b", "c"]]
    command = [sys.executable, "-c", f"import sys; open('{tmp_path}/' + sys.argv[-1], 'w'); sys.exit('c' in sys.argv)"]
    assert warm.side_by_side(cost, command, 3) == 1  # that of a and c
    assert {file.name for file in tmp_path.iterdir()} == {"long", "b", "c"}
    assert warm.side_by_side({"a": 1.0}, command, 3) == 0


@pytest.mark.parametrize(("room_alone", "status"), [(True, "timed"), (False, "out of memory")])
def test_who_does_not_fit_beside_the_others_is_timed_alone(room_alone: bool, status: str) -> None:
    refused = []

    def crowded(problem: Tensor) -> Prepared:
        bound = doubled(problem)

        def forward() -> dict[str, Tensor]:
            if len(problem) and problem[0] == 1 and not (refused and room_alone):  # not the gate's problem
                refused.append(bound)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return bound.forward()

        return replace(bound, forward=forward)

    variants = (Variant("fusedmm", doubled, ours=True), Variant("crowded", crowded, modes=("forward",)))
    rows = {row.variant: row for row in harness().results(toy(*variants)) if row.mode == "forward"}
    assert {name: row.status for name, row in rows.items()} == {"fusedmm": "timed", "crowded": status}
    assert len(refused) == (1 if room_alone else 2)


def test_the_forward_alone_asks_for_no_gradient() -> None:
    """Liger's and fla's losses take it in the forward of every leaf that asks for one, under no_grad too."""
    bound = doubled(torch.ones(8))
    for mode, asked in (("forward", False), ("both", True), ("forward", False), ("backward", True)):
        call_of(bound, mode)()
        assert bound.inputs["x"].requires_grad == asked


@pytest.mark.parametrize(
    ("ours", "factor", "status"), [(True, 2.001, "wrong"), (False, 2.001, "timed"), (False, 3.0, "wrong")]
)
def test_no_number_without_a_right_answer(ours: bool, factor: float, status: str) -> None:
    variant = Variant("v", lambda problem: doubled(problem, factor), modes=("forward",), ours=ours)
    (row,) = harness().results(toy(variant))
    assert row.status == status
    assert (row.median_ms is None) == (status == "wrong")


def test_the_gate_wants_every_output() -> None:
    variant = Variant("v", lambda problem: replace(doubled(problem), forward=dict, upstream={}))
    assert Gate(toy(), CPU).check(variant).complaints == ["y: not computed"]


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    x = torch.ones(1 << 20)

    def call() -> Tensor:
        y = x + 1  # 4 MiB
        z = y * 2  # and 4 more
        del y
        return z + 1

    assert peak_bytes(call, CPU) == pytest.approx(8 << 20, rel=0.01)


def test_ratios_need_equal_clocks() -> None:
    assert ratio(RESULT, replace(RESULT, median_ms=2.0)) == 2.0
    fast, slow = replace(RESULT, clock_mhz=1980.0), replace(RESULT, clock_mhz=1500.0)
    assert ratio(fast, replace(fast, clock_mhz=1900.0)) == 1.0
    assert ratio(fast, slow) is None
    assert ratio(fast, RESULT) is None
    assert not comparable([1000.0, None])
    assert not comparable([0.0, 0.0])  # of a GPU that does not tell


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


def test_compare_refuses_different_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("H100", "H200"):
        run = Run(device, device, "cuda", "2026-01-01T00:00:00Z", "abc", "x", {}, 0, None, 132, 1.0, {})
        results.append(tmp_path / device, [run, replace(RESULT, run=device)])
    assert main(["compare", str(tmp_path / "H100"), str(tmp_path / "H200")]) == 2
    assert "different devices: H100, H200" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "H100"), str(tmp_path / "H100")]) == 0


def test_figures_show_no_ratio_of_different_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(plot, "_legend", lambda figure, axes: shown.extend(len(axis.get_lines()) for axis in axes))
    run = Run(
        "1", "GPU", "cuda", "2026-01-01T00:00:00Z", "abc", "x", {"torch": "2", "triton": "3"}, 0, None, 1, 1.0, {}
    )
    ours = replace(RESULT, run="1", mode="both", clock_mhz=1980.0)
    for clock in (1980.0, 1500.0):
        rows = (ours, replace(ours, variant="other", clock_mhz=clock))
        plot.speed_and_memory({row.key: (run, row) for row in rows}, tmp_path / "figure.svg")
    assert shown == [2, 2, 1, 2]  # the line at fusedmm's and a mark: of time, and of memory


def test_compare_is_silent_within_the_noise() -> None:
    assert compare.changes([RESULT], [replace(RESULT, median_ms=1.05, p20_ms=1.0, p80_ms=1.2)]) == []


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


def test_help_names_every_command_and_a_missing_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert "no such file" in capsys.readouterr().err


def test_results_append_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    run = Run(
        "run", "cpu", "cpu", "2026-01-01T00:00:00Z", "abc", "x", {"torch": "2"}, 1, None, 2, 10.0, {"float32": 0.1}
    )
    results.append(file, [run, RESULT])
    results.append(file, [RESULT])
    assert results.read(file) == ({"run": run}, [RESULT, RESULT])
    file.write_text(json.dumps({"kind_of_row": "rumour"}) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 must be a run or a result, got 'rumour'"):
        results.read(file)


def test_runs_are_kept_once_in_the_file_of_their_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "kept")
    run = Run("1", "NVIDIA H200", "cuda", "2026-01-01T00:00:00Z", "abc", "x", {}, 0, None, 132, 1.0, {"bfloat16": 1.0})
    file, row = tmp_path / "results.jsonl", replace(RESULT, run="1")
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


def test_rows_of_two_devices_do_not_share_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for day, device in enumerate(("H100", "H200", "H200"), 1):
        began = f"2026-01-0{day}T00:00:00Z"
        facts = {"torch": "2", "triton": "3"}
        run = Run(began, device, "cuda", began, f"commit{day}", "x", facts, 0, None, 132, 1.0, {"bfloat16": 1.0})
        results.append(tmp_path / f"{device}.jsonl", [run, replace(RESULT, run=began, case=f"case{day}")])
    found = results.latest("cuda")
    assert [key[0] for key in found] == ["case2", "case3"]
    assert readme._machine(found) == "H200, torch 2, triton 3, commit commit3 (the newest of 2), 2026-01-03"


SASS = """
.section .text.kernel,"ax"
.L_x_0:
        /*0000*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0010*/  MUFU.EX2 R1, R2 ;
        /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/  MUFU.EX2 R3, R4 ;
        /*0040*/  FFMA R1, R2, R3, R4 ;
        /*0050*/  @P0 BRA `(.L_x_0) ;
        /*0060*/  EXIT ;
"""


def test_the_model_reads_a_main_loop() -> None:
    (function,) = parse_sass(SASS)
    (loop,) = function.main_loops
    assert in_flight(loop) == 0.5
    assert loop_flops(loop.steady_path) == 2 * 64 * 128 * 16
    assert pipe_clocks(loop.mix) == {"issue": 6, "fma": 1, "alu": 0, "exponential": 16}


UNIFORM_BRANCH = """
.section .text.kernel,"ax"
.L_x_0:
        /*0000*/  BRA.U !UP0, `(.L_x_1) ;
        /*0010*/  UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT ;
.L_x_1:
        /*0020*/  @P0 BRA `(.L_x_0) ;
        /*0030*/  BRA `(.L_x_2) ;
        /*0040*/  NOP ;
.L_x_2:
        /*0050*/  EXIT ;
"""


def test_a_branch_with_its_condition_among_its_operands_may_fall_through() -> None:
    (function,) = parse_sass(UNIFORM_BRANCH)
    assert function.successors == {
        0x00: (0x20, 0x10),
        0x10: (0x20,),
        0x20: (0x00, 0x30),
        0x30: (0x50,),
        0x40: (0x50,),
        0x50: (),
    }
    (loop,) = function.main_loops
    assert [instruction.base for instruction in loop.steady_path] == ["BRA", "UTCHMMA", "BRA"]


def test_a_gpu_case_says_why_it_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device here. On one, run ci/gpu." in capsys.readouterr().err


def test_an_unknown_case_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-case", "--device", "cpu"]) == 2
    assert "no case for cpu contains no-such-case" in capsys.readouterr().err


def test_an_unknown_commit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["attention/tiny", "--against", "no-such-commit"])
    assert "--against: no such commit here: no-such-commit" in capsys.readouterr().err


def test_the_list_says_its_order_beside_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert sorted(shown.out.split()) == sorted(builders("cpu"))
    assert "in the order in which they run" in shown.err


def test_a_second_quick_run_begins_where_the_first_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    words = ["tiny", "dense-gated-d128-4k", "dense-plain-d128-4k", "--quick", "--device", "cuda", "--list"]
    main([*words, "--json", str(file)])
    first, second, *_ = capsys.readouterr().out.split()
    results.append(file, [replace(RESULT, case=first)])
    main([*words, "--json", str(file)])
    assert (shown := capsys.readouterr().out.split())[0] == second
    assert shown[-1] == first


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_case_can_be_built(kind: str) -> None:
    for name, build in builders(kind).items():
        case = build()
        assert case.name == name
        assert case.variants[0].ours
        assert set(case.flops) == set(case.bytes)
        assert min(case.flops.values()) > 0


def test_peers_are_skipped_with_a_reason() -> None:
    assert peers.missing("torch") is None
    assert "is not installed" in (peers.missing("no-such-distribution") or "")
    with pytest.raises(Unavailable, match="ci/wheels"):
        peers.require("no-such-distribution")
    with pytest.raises(ValueError, match="group must be one of default"):
        peers.gather("no-such-group", Path())


def test_a_wheel_that_is_not_to_be_had_is_named_and_the_others_are_gathered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def pip(command: list[str]) -> object:
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, int(command[-1].startswith("trl")))

    monkeypatch.setattr(peers.subprocess, "run", pip)
    assert peers.gather("default", tmp_path) == 1
    assert len(asked) == len(peers.manifest()["group"]["default"])
    assert "not to be had for this target: trl==" in capsys.readouterr().out


def test_the_readme_s_performance_section_is_generated() -> None:
    assert readme.run(check=True) == 0


def test_the_table_of_small_losses_holds_the_fastest_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same run and mode; a point that no run has says so."""
    run = next(run for run, _ in results.latest("cpu").values())
    name = scaling.grid_name(*scaling.GRID[0], "jsd")
    times = {"fusedmm": 0.2, "fusedmm-lean": 0.05, "eager": 0.1, "chunked": 0.3}
    rows = [replace(RESULT, case=name, mode="both", variant=variant, median_ms=ms) for variant, ms in times.items()]
    monkeypatch.setattr(readme, "latest", lambda kind: {row.key: (run, row) for row in rows})
    cells = readme.grid_part().splitlines()[4].split(" | ")
    assert cells == ["| 64", "2", "not measured yet", "not measured yet", "0.100 / 0.200 ms: 0.50x |"]
    monkeypatch.setattr(readme, "latest", lambda kind: {})
    assert readme.grid_part() == f"**CPU: not measured yet.** Command: {readme.GRID_COMMAND}."


SMALL = [name for name in builders("cpu") if name.startswith(("attention/", "distillation/", "modules/"))]


@pytest.mark.parametrize("name", SMALL)
def test_every_cpu_variant_is_right(name: str) -> None:
    case = builders("cpu")[name]()
    gate = Gate(case, CPU)
    for variant in case.variants:
        absent = variant.name == "torch-linear-ce" and not hasattr(torch.nn.functional, "linear_cross_entropy")
        if variant.name != "compile" and not absent:
            assert gate.check(variant).complaints == [], variant.name


def test_a_path_computes_what_the_operator_does_or_says_why_not(device: torch.device) -> None:
    pytest.importorskip("triton")
    shape = attention.Shape([5, 3], [[7, 4], [2, 9]], 2, 1, 16, features=("log_prior", "gate", "times"))
    problem = attention_peers.Problem(shape.example(torch.float32, device), asks_mass=True)
    expected = attention_peers.fused(problem).results(gradients=True)
    found = attention_paths.on_path(problem, path="portable").results(gradients=True)
    assert set(found) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, msg=name)
    with pytest.raises(Unavailable, match="float16 and bfloat16 only"):
        attention_paths.on_path(problem, path="hopper")
