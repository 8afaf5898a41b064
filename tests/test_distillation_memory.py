"""No implementation holds the logits: the largest allocation of scores and losses, counted without a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedmm import LinearHead, distillation_loss, distillation_scores
from fusedmm.eager.waves import MIN_WAVE_ROWS, WAVE_ELEMENTS
from fusedmm.ops import distillation_op, distillation_triton

SIZES = {"eager": (300, 400), "triton": (40, 160)}  # rows, classes: the interpreter takes its time
DIM = 16


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest storage that any operator returned, inside the registered operators too."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedmm":
            implementation: Callable[..., Any] = getattr(distillation_op, func._opname.removeprefix("distillation"))
            with self:
                return implementation(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def heads(device: torch.device, rows: int, classes: int, dim: int = DIM) -> tuple[LinearHead, LinearHead, Tensor]:
    student, teacher = (
        LinearHead(torch.randn(rows, dim, device=device), torch.randn(classes, dim, device=device)) for _ in range(2)
    )
    return student, teacher, torch.randint(0, classes, (rows,), device=device)


def largest(student: LinearHead, teacher: LinearHead, labels: Tensor, run: Callable[[], Any]) -> int:
    """float32 elements of the largest allocation that `run` makes."""
    with LargestAllocation([student.hidden, student.weight, teacher.hidden, teacher.weight, labels]) as counter:
        run()
    assert counter.bytes > 0  # something was counted
    return counter.bytes // 4


@pytest.fixture
def small_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waves of the Triton path as small as its rows allow, so that a test on a CPU has several."""
    monkeypatch.setattr(distillation_triton, "FAST_ELEMENTS", 1)
    monkeypatch.setattr(distillation_triton, "RANGE_ELEMENTS", 1)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_scores_hold_no_logits(beta: float, impl: str, device: torch.device) -> None:
    rows, classes = SIZES[impl]
    student, teacher, labels = heads(device, rows, classes)
    elements = largest(
        student, teacher, labels, lambda: distillation_scores(student, teacher, labels, beta=beta, impl=impl)
    )
    assert elements < rows * classes
    if impl == "triton":  # O(N): the states of all splits of the vocabulary
        assert elements <= 22 * rows * classes // 64


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_lean_holds_no_logits(beta: float, impl: str, device: torch.device, small_waves: None) -> None:
    rows, classes = SIZES[impl]
    student, teacher, labels = heads(device, rows, classes)
    student.hidden.requires_grad_()
    student.weight.requires_grad_()
    elements = largest(
        student,
        teacher,
        labels,
        lambda: distillation_loss(student, teacher, labels, beta=beta, alpha=0.5, memory="lean", impl=impl).backward(),
    )
    assert elements < rows * classes
    if impl == "triton":
        assert elements <= max(rows * 128, 13 * rows * classes // 64)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_fast_holds_one_wave(impl: str, device: torch.device, small_waves: None) -> None:
    rows, classes = {"eager": (3000, 400), "triton": (200, 100)}[impl]
    student, teacher, labels = heads(device, rows, classes)
    student.hidden.requires_grad_()
    student.weight.requires_grad_()
    elements = largest(
        student, teacher, labels, lambda: distillation_loss(student, teacher, labels, impl=impl).backward()
    )
    assert elements <= (max(WAVE_ELEMENTS, MIN_WAVE_ROWS * classes) if impl == "eager" else 128 * classes)
    assert elements < rows * classes


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_frozen_head_has_no_weight_gradient(memory: str, impl: str, device: torch.device) -> None:
    student, teacher, labels = heads(device, rows=20, classes=100, dim=256)
    student.hidden.requires_grad_()
    elements = largest(
        student, teacher, labels, lambda: distillation_loss(student, teacher, memory=memory, impl=impl).backward()
    )
    assert elements < student.weight.numel()
    assert student.weight.grad is None
    assert student.hidden.grad is not None
