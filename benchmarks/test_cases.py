"""The same cases under pytest-benchmark: ``pytest benchmarks``, latency with the host in it.

A variant that cannot run here is skipped with its reason, and so is every GPU case where there is no GPU; one that
computes something else fails. What compiles first, and the points of curves, are left to ``python -m benchmarks``.
"""

import gc
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.case import Case, Unavailable
from benchmarks.cases import builders
from benchmarks.gate import Gate
from benchmarks.harness import call_of, quiet

KIND = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE = torch.device(KIND)
SECONDS = 0.1  # of timing for each case, mode and variant


def pairs() -> list[Any]:
    """Every case, mode and variant of this machine."""
    found = []
    for name in listed(KIND):
        case = built(name)
        for mode in case.modes:
            for variant in case.variants:
                if mode in variant.modes and not variant.compiles:
                    found.append(pytest.param(name, variant.name, mode, id=f"{name}-{mode}-{variant.name}"))
    return found


def listed(kind: str) -> list[str]:
    """Cases of a kind of device without the points of curves."""
    return [name for name in builders(kind) if not name.startswith("scaling/")]


@lru_cache
def built(name: str) -> Case:
    """A case of this machine."""
    return builders(KIND)[name]()


@lru_cache(maxsize=1)  # the tests of a case follow one another
def bound(name: str) -> tuple[Gate, Any]:
    """Its gate and its inputs."""
    case = built(name)
    return Gate(case, DEVICE), case.problem(DEVICE)


@pytest.mark.filterwarnings("ignore")  # other people's
@pytest.mark.benchmark(max_time=SECONDS, min_rounds=3, warmup=False)
@pytest.mark.parametrize(("name", "variant_name", "mode"), pairs())
def test_case(benchmark: Any, name: str, variant_name: str, mode: str) -> None:
    case = built(name)
    variant = next(variant for variant in case.variants if variant.name == variant_name)
    gate, problem = bound(name)
    with quiet():
        try:
            verdict = gate.check(variant)
            call = call_of(variant.prepare(problem), mode)
            assert verdict.complaints == []
            call()
        except (Unavailable, ModuleNotFoundError, torch.OutOfMemoryError) as error:
            pytest.skip(str(error))
        benchmark.group = f"{case.name} {mode}"
        benchmark.extra_info.update(case.sizes, flops=case.flops[mode], bytes=case.bytes[mode])
        benchmark(synchronous(call))
    gc.collect()


@pytest.mark.skipif(KIND == "cuda", reason="they run above")
@pytest.mark.parametrize("name", listed("cuda"))
def test_gpu_case(name: str) -> None:
    pytest.skip("needs a CUDA device; ci/gpu runs it on one")


def synchronous(call: Callable[[], object]) -> Callable[[], object]:
    """The call, and waiting for the GPU to end it."""
    if KIND == "cpu":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait
