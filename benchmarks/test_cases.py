"""The same cases under pytest-benchmark: ``pytest benchmarks``, latency with the host in it.

A variant that cannot run here is skipped with its reason; one that computes something else fails.
"""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.case import Unavailable
from benchmarks.cases import builders
from benchmarks.gate import Gate
from benchmarks.harness import call_of, quiet

KIND = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE = torch.device(KIND)


def pairs() -> list[Any]:
    """Every case, mode and variant of this machine."""
    found = []
    for name, build in builders(KIND).items():
        case = build()
        for variant in case.variants:
            for mode in case.modes:
                if mode in variant.modes:
                    label = f"{name}-{mode}-{variant.name}"
                    found.append(pytest.param(build, variant.name, mode, id=label))
    return found


@pytest.mark.parametrize(("build", "variant_name", "mode"), pairs())
def test_case(benchmark: Any, build: Callable[[], Any], variant_name: str, mode: str) -> None:
    case = build()
    variant = next(variant for variant in case.variants if variant.name == variant_name)
    with quiet():
        try:
            verdict = Gate(case, DEVICE).check(variant)
            call = call_of(variant.prepare(case.problem(DEVICE)), mode)
        except Unavailable as error:
            pytest.skip(str(error))
        assert verdict.complaints == []
        call()
        benchmark.group = f"{case.name} {mode}"
        benchmark.extra_info.update(case.sizes, flops=case.flops[mode], bytes=case.bytes[mode])
        benchmark(synchronous(call))
    gc.collect()


def synchronous(call: Callable[[], object]) -> Callable[[], object]:
    """The call, and waiting for the GPU to end it."""
    if KIND == "cpu":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait
