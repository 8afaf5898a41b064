"""How a case is run: made ready, held to the right answer, timed beside others, its memory counted."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import warm
from benchmarks.case import Case, Prepared, Unavailable, Variant
from benchmarks.gate import Gate
from benchmarks.harness import ALONE, Harness, call_of, ratio
from benchmarks.memory import peak_bytes
from benchmarks.roofline import Ceilings
from benchmarks.telemetry import Telemetry
from benchmarks.timing import comparable
from tests.benchmark_rows import RESULT

CPU = torch.device("cpu")
CEILINGS = Ceilings(10.0, {"float32": 0.1})


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
    assert rows["fusedmm"].reason == ""
    assert (rows["crowded"].reason == ALONE) == room_alone
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


def test_warming_up_calls_what_will_be_timed_and_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def variant(name: str, *, compiles: bool = False) -> Variant:
        def prepare(x: Tensor) -> Prepared:
            called.append(name)
            return doubled(x)

        return Variant(name, prepare, compiles=compiles)

    found = [variant("fusedmm"), variant("left-out"), variant("slow", compiles=True), variant("wanted", compiles=True)]
    monkeypatch.setattr("benchmarks.timing.time_once", None)
    failed = warm.once(toy(*found, Variant("broken", broken)), CPU, {"left-out"}, {("toy", "wanted")})
    assert failed == ["broken"]
    assert called == ["fusedmm", "fusedmm", "wanted", "wanted"]  # the gate's twin, and the problem


def test_cases_are_warmed_up_side_by_side_in_shares_of_one_cost(tmp_path: Path) -> None:
    cost = {"long": 9.0, "a": 3.0, "b": 3.0, "c": 2.0}
    assert warm.divided(cost, 2) == [["long"], ["a", "b", "c"]]
    command = [sys.executable, "-c", f"import sys; open('{tmp_path}/' + sys.argv[-1], 'w'); sys.exit('c' in sys.argv)"]
    assert warm.side_by_side(cost, command, 3) == 1  # that of a and c
    assert {file.name for file in tmp_path.iterdir()} == {"long", "b", "c"}
    assert warm.side_by_side({"a": 1.0}, command, 3) == 0
