"""The CPU path against PyTorch's compositions: ratios only, from variants that are timed side by side.

Every operator is held to `GOAL` times the fastest composition, but for noise. Memory is bounded: a chunk of scores or
logits.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.case import Case, Prepared
from benchmarks.cases import attention, attention_peers, builders, distillation, distillation_peers
from benchmarks.harness import call_of
from benchmarks.memory import peak_bytes, use_heap
from benchmarks.telemetry import Telemetry
from benchmarks.timing import interleave

CPU = torch.device("cpu")
GOAL = 1.10
NOISE = 1.05  # of one run against another
SECONDS = 0.2  # of all variants together: a median of few short calls is one of disturbances
TRIES = 5  # on a shared machine, whose memory others use for seconds at a time
CASES = [name for name in builders("cpu") if name.startswith(("attention/", "distillation/"))]
RUNS = [(name, mode) for name in CASES for mode in ("forward", "both") if mode == "forward" or "scores" not in name]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> None:
    """Not here: filling memory would be timed, of those most who allocate most."""


@pytest.fixture(scope="module", autouse=True)
def used_heap() -> None:
    use_heap()


def calls_of(case: Case, mode: str) -> dict[str, Callable[[], object]]:
    """Every composition but the compiled one, whose compilation takes longer than this whole file."""
    problem = case.problem(CPU)
    ours = [v for v in case.variants if v.name not in ("compile", "fusedmm-lean")]
    return {v.name: call_of(v.prepare(problem), mode) for v in ours}


def ratios(case: Case, mode: str) -> float:
    """How many times as long as the fastest composition this project takes: medians of interleaved rounds."""
    calls, first = calls_of(case, mode), calls_of(case, mode)
    for call in (*first.values(), *calls.values()):
        call()
    times = interleave(calls, CPU, SECONDS, Telemetry(CPU), first)
    medians = {name: each.quantile(0.5) for name, each in times.items()}
    return medians.pop("fusedmm") / min(medians.values())


@pytest.mark.speed
@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_not_slower_than_the_best_composition(name: str, mode: str) -> None:
    case, allowed = builders("cpu")[name](), GOAL * NOISE
    # A shared machine disturbs one side of a ratio now and then, not every time.
    measured = []
    while len(measured) < TRIES and (not measured or min(measured) > allowed):
        measured.append(ratios(case, mode))
    assert min(measured) <= allowed, f"{measured} times the fastest composition, allowed {allowed:.2f}"


@pytest.mark.speed
@pytest.mark.parametrize(("task", "allowed"), [("loss", 2.5), ("scores", 1.6)])
def test_a_small_call_costs_little_more_than_its_operators(task: str, allowed: float) -> None:
    """64 rows of 4 classes, forward: 20 microseconds of operators in plain PyTorch, to which checks may add as many;
    scores are 14 fields against its 10.
    """
    case = distillation.build("small", "cpu", distillation.Shape(64, 4, 64, 64, task))
    measured = []
    while len(measured) < TRIES and (not measured or min(measured) > allowed):
        measured.append(ratios(case, "forward"))
    assert min(measured) <= allowed, f"{measured} times plain PyTorch, allowed {allowed}"


def test_attention_holds_a_chunk_of_scores_not_all_of_them() -> None:
    shape = attention.Shape([128] * 64, [[128] * 4] * 64, 4, 4, 32)
    problem = attention_peers.Problem(shape.example(torch.float32, CPU), True)
    assert_half(attention_peers.fused(problem), attention_peers.eager(problem))


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_distillation_holds_a_wave_of_logits_not_all_of_them(memory: str) -> None:
    problem = distillation.Shape(4096, 4096, 32, 32, beta=0.5).problem(torch.float32, CPU)
    assert_half(distillation_peers.fused_loss(problem, memory=memory), distillation_peers.eager_loss(problem))


def assert_half(ours: Prepared, plain: Prepared) -> None:
    """Forward and backward hold at most half of what forming everything at once holds."""
    peaks = [peak_bytes(call_of(bound, "both"), CPU) for bound in (ours, plain)]
    assert peaks[0] <= 0.5 * peaks[1], peaks
