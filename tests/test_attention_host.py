"""What a call of the Triton path does on the host, kernels aside: few operators, and none that waits for the GPU."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedmm
from fusedmm.visibility import lookback_tensor

pytest.importorskip("triton")

from fusedmm.kernels.attention import backward_rows, combine
from fusedmm.kernels.attention import launch as launch_module
from fusedmm.kernels.attention.arguments import input_precision
from tests.operators import WAITS, NoKernel, Operators


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (launch_module, backward_rows, combine):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, NoKernel())


def call(features: Sequence[str], softmax: str, device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    """A call with a ready layout, and the tensors that want a gradient."""
    layout = fusedmm.ModalityLayout.from_lengths(
        torch.tensor([2, 3], device=device), torch.tensor([[40, 5], [0, 60]], device=device)
    )
    if "times" in features:
        times = (torch.arange(size, device=device) for size in (layout.total_q, layout.total_k))
        layout = layout.at_times(*times)
    leaves = {
        "query": torch.randn(5, 2, 16, device=device),
        "key": torch.randn(105, 2, 16, device=device),
        "value": torch.randn(105, 2, 16, device=device),
        "gate": torch.randn(2, 2, device=device),
        "output_gate": torch.randn(5, 2, 16, device=device),
    }
    if softmax == "joint":
        leaves["log_prior"] = torch.randn(2, 2, device=device)
    leaves = {name: x.requires_grad_() for name, x in leaves.items() if name in ("query", "key", "value", *features)}
    others: dict[str, Any] = {"dropout_p": 0.1} if "dropout" in features else {}
    if "active" in features:
        others["active"] = torch.ones(2, 2, dtype=torch.bool, device=device)
    return lambda: fusedmm.gated_multimodal_attention(
        **leaves, layout=layout, softmax=softmax, impl="triton", **others
    ), list(leaves.values())


ALL = ("log_prior", "gate", "output_gate", "times", "active", "dropout")


@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_waits_for_the_gpu(
    softmax: str, splits: int, device: torch.device, no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a forward and a backward can be captured in a CUDA graph."""
    monkeypatch.setattr(launch_module, "key_splits", lambda *_, **__: splits)
    attend, leaves = call(ALL, softmax, device)
    with Operators() as operators:
        result = attend()
        torch.autograd.grad(result.output.sum() + result.mass.sum(), leaves)
    names = {name.removeprefix("aten::") for name in operators.names}
    assert {"fusedmm::attention_forward", "fusedmm::attention_backward"} <= names
    assert names.isdisjoint(WAITS)


def test_a_look_back_is_written_where_it_is_needed() -> None:
    """A copy from the host would wait for the GPU."""
    layout = SimpleNamespace(cu_seqlens_k=torch.empty(4, dtype=torch.int32, device="meta"), num_modalities=3)
    with Operators() as operators:
        window = lookback_tensor("op", layout, 7)
    assert (window.device.type, window.dtype, list(window.shape)) == ("meta", torch.int64, [3])
    assert {"aten::_to_copy", "aten::copy_", "aten::lift_fresh"}.isdisjoint(operators.names)


def test_a_forward_calls_few_operators(device: torch.device, no_kernels: None) -> None:
    """Three results and a view of the offsets; what broadcasts costs one view each."""
    attend, _ = call((), "joint", device)
    with torch.no_grad(), Operators() as operators:
        attend()
    allocations = [name for name in operators.names if name in ("aten::new_empty", "aten::empty_like", "aten::empty")]
    assert len(allocations) == 3
    assert len(operators.names) <= 6, operators.names


@pytest.fixture
def full_precision() -> Iterator[Any]:
    """PyTorch's switch for matrix products of float32 on CUDA, put back behind the test."""
    switch = torch.backends.cuda.matmul
    yield switch
    switch.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["fp32_precision", "allow_tf32", "set_float32_matmul_precision"])
def test_float32_follows_every_name_of_pytorchs_switch(name: str, full_precision: Any) -> None:
    """Reading the older name raises once the newer one is set."""
    assert input_precision(torch.float32) == "ieee"
    match name:
        case "fp32_precision":
            full_precision.fp32_precision = "tf32"
        case "allow_tf32":
            full_precision.allow_tf32 = True
        case _:
            torch.set_float32_matmul_precision("high")
    assert input_precision(torch.float32) == "tf32"
    assert input_precision(torch.bfloat16) == "ieee"
