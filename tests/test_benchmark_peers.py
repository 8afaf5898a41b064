"""Those that are compared: what only a GPU runs computes the right thing, here with stand-ins for its kernels at small
sizes, and who is not here is named.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.case import Unavailable, Variant
from benchmarks.cases import attention_gpu, builders, distillation, distillation_peers
from benchmarks.cases.attention_peers import repeat_heads
from benchmarks.gate import Gate
from benchmarks.harness import why

CPU = torch.device("cpu")
KINDS = (
    "attention/dense-plain-d64-4k",
    "attention/dense-plain-d128-gqa-4k",
    "attention/jagged-market-day",
    "attention/active-0.25",
    "attention/per-modality-512",
)


def varlen_stand_in(query: Tensor, key: Tensor, value: Tensor, *bounds: Any) -> tuple[Tensor, Tensor]:
    """Variable-length attention as the kernels give it: output, and LSE [total_q, H]."""
    cu_q, cu_k, longest_q, longest_k = bounds
    assert (longest_q, longest_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outputs, lses = [], []
    for sample in range(len(cu_q) - 1):
        q = query[cu_q[sample] : cu_q[sample + 1]].float().transpose(0, 1)
        rows = slice(int(cu_k[sample]), int(cu_k[sample + 1]))
        k, v = (repeat_heads(x[rows], query.shape[1], 1).float().transpose(0, 1) for x in (key, value))
        scores = q @ k.transpose(-1, -2) * query.shape[-1] ** -0.5
        lses.append(scores.logsumexp(-1).transpose(0, 1))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype))
    return torch.cat(outputs), torch.cat(lses)


@pytest.fixture
def cute(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for flash-attn-4 with its names and layouts; the functions that were called."""
    called = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        called.append("dense")
        heads = (x.transpose(1, 2).float() for x in (q, k, v))
        output = torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=q.shape[2] != k.shape[2])
        return output.transpose(1, 2).to(q.dtype), None

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        assert return_lse
        called.append("varlen")
        output, lse = varlen_stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return output, lse.transpose(0, 1)

    functions = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=functions))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", functions)
    monkeypatch.setattr(attention_gpu, "require", lambda distribution: None)
    return called


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", KINDS)
def test_variable_length_calls_and_their_merge(name: str, cute: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu, "_torch_varlen", lambda: varlen_stand_in)
    case = builders("cuda")[name]()
    gate = Gate(case, CPU)
    called = [variant for variant in case.variants if "varlen" in variant.name or "flash-attn" in variant.name]
    assert len(called) == 2
    for variant in called:
        assert gate.check(variant).complaints == [], variant.name
    assert set(cute) == {"dense" if "plain" in name else "varlen"}


def test_a_merge_leaves_out_what_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        return varlen_stand_in(*arguments)

    monkeypatch.setattr(attention_gpu, "_torch_varlen", lambda: counted)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = builders("cuda")["attention/active-0.25"]()
    attention_gpu.varlen_merge(case.small(CPU)).forward()
    assert len(calls) == 2  # of 8


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")  # FlexAttention warns that it is not compiled
@pytest.mark.parametrize("name", [*KINDS, "attention/time-causal"])
def test_flex_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = builders("cuda")[name]()
    gate = Gate(case, CPU)
    # It has no backward on a CPU, and refuses inputs that ask for one.
    monkeypatch.setattr(Tensor, "requires_grad_", lambda self: self)
    for variant in case.variants:
        if variant.name.startswith("flex"):
            with torch.no_grad():
                assert gate.check(replace(variant, modes=("forward",))).complaints == [], variant.name


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    ("distribution", "names", "beta", "alpha"),
    [
        ("liger-kernel", ("liger-chunked",), 0.5, 1.0),
        ("trl", ("trl",), 0.0, 1.0),
        ("trl", ("trl",), 0.5, 1.0),
        ("torch", ("torch-linear-ce",), 0.0, 0.0),
    ],
)
def test_libraries_that_run_on_a_cpu(distribution: str, names: tuple[str, ...], beta: float, alpha: float) -> None:
    pytest.importorskip(distribution.partition("-")[0].replace("liger", "liger_kernel"))
    shape = distillation.Shape(64, 1000, 64, 48, beta=beta, alpha=alpha)
    case = replace(distillation.build("x", "cpu", shape), small=lambda device: shape.problem(torch.float32, device))
    found = {variant.name: variant for variant in distillation_peers.losses("cuda", beta, alpha)}
    for name in names:
        if name == "torch-linear-ce" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            continue
        assert Gate(case, CPU).check(found[name]).complaints == []


def test_the_gate_s_twin_is_one_that_quack_takes() -> None:
    """Its rows and classes; of classes in multiples of 128 the pipeline that is timed on Hopper."""
    small = builders("cuda")["distillation/cross-entropy"]().small(CPU)
    assert small.student.shape[0] % 8 == 0
    assert small.student_weight.shape[0] % 128 == 0


def test_what_an_installed_library_lacks_is_named() -> None:
    def needs(problem: object) -> Any:
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401

    with pytest.raises(ModuleNotFoundError) as caught:
        Variant("v", needs).prepare(None)
    assert why(caught.value) == ("skipped", "it needs no_such_module, which is not installed")


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
