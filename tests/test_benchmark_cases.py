"""The cases of the benchmarks: each can be built, and whoever runs on a CPU computes the right thing."""

import pytest
import torch

from benchmarks.case import Unavailable
from benchmarks.cases import attention, attention_paths, attention_peers, builders
from benchmarks.gate import Gate

CPU = torch.device("cpu")


SMALL = [name for name in builders("cpu") if name.startswith(("attention/", "distillation/", "modules/"))]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_case_can_be_built(kind: str) -> None:
    for name, build in builders(kind).items():
        case = build()
        assert case.name == name
        assert case.variants[0].ours
        assert set(case.flops) == set(case.bytes)
        assert min(case.flops.values()) > 0


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
