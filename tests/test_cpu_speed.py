"""The CPU path against PyTorch's compositions: ratios only, from variants that are timed side by side.

At most `GOAL` times the fastest composition, but for noise. Memory is bounded: a chunk of scores or logits.
"""

import time

import pytest
import torch

from benchmarks.case import Case, Prepared
from benchmarks.cases import attention, attention_peers, builders, distillation, distillation_peers
from benchmarks.harness import call_of
from benchmarks.memory import peak_bytes

CPU = torch.device("cpu")
GOAL = 1.10
NOISE = 1.05  # of one run against another: jagged-market-day forward, 1.07 committed, reads 1.03 to 1.12
ROUNDS = 7
TRIES = 3
CASES = (
    "attention/dense-plain",
    "attention/dense-prior",
    "attention/dense-gated",
    "attention/jagged-market-day",
    "attention/jagged-call",
    "attention/jagged-vision-latents",
    "attention/time-causal",
    "attention/active-1",
    "attention/active-0.125",
    "attention/per-modality",
    "attention/few-latents",
    "attention/tiny",
    "distillation/kl",
    "distillation/jsd",
    "distillation/cross-entropy",
    "distillation/small-v",
    "distillation/scores",
    "distillation/scores-small-v",
)
RUNS = [(name, mode) for name in CASES for mode in ("forward", "both") if mode == "forward" or "scores" not in name]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> None:
    """Not here: filling memory would be timed, of those most who allocate most."""


def prepared(case: Case) -> dict[str, Prepared]:
    """Every composition but the compiled one, whose compilation takes longer than this whole file."""
    problem = case.problem(CPU)
    return {v.name: v.prepare(problem) for v in case.variants if v.name not in ("compile", "fusedmm-lean")}


def ratios(case: Case, mode: str) -> float:
    """How many times as long as the fastest composition this project takes: medians of interleaved rounds."""
    calls = {name: call_of(bound, mode) for name, bound in prepared(case).items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(time.perf_counter() - began)
    medians = {name: sorted(each)[ROUNDS // 2] for name, each in times.items()}
    return medians.pop("fusedmm") / min(medians.values())


@pytest.mark.speed
@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_not_slower_than_the_best_composition(name: str, mode: str) -> None:
    case = builders("cpu")[name]()
    allowed = NOISE * GOAL
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
