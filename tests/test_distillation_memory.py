"""No implementation holds the logits: the largest allocation of scores and losses, counted without a GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedmm import LinearHead, TopKLogProbs, distillation_loss, distillation_scores
from fusedmm.eager.objective import Objective
from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import MIN_WAVE_ROWS, WAVE_ELEMENTS
from fusedmm.heads import Teacher
from fusedmm.kernels.distillation import gradient, mixture, statistics, top_gradient, top_statistics
from fusedmm.ops import distillation_op, distillation_pair, distillation_sums, distillation_triton, distillation_waves

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
            implementation: Callable[..., Any] = distillation_op.registered(func._opname)
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
    monkeypatch.setattr(distillation_waves, "FAST_ELEMENTS", 1)
    monkeypatch.setattr(distillation_waves, "RANGE_ELEMENTS", 1)


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


class PeakAllocation(TorchDispatchMode):
    """Most bytes alive at once among the storages that operators returned."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage.cdata not in self.known:
                    self.alive[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return result


class NoKernel:
    """A Triton kernel that computes nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: None


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and matmuls of the Triton path that write nothing, so that it runs on meta tensors of any size; the
    matmuls allocate what they do on CUDA.
    """
    for module, kernel in (
        (statistics, "_statistics_kernel"),
        (statistics, "_merge_statistics_kernel"),
        (mixture, "_mixture_kernel"),
        (gradient, "_gradient_kernel"),
        (top_statistics, "_top_sweep_kernel"),
        (top_statistics, "_top_merge_kernel"),
        (top_gradient, "_top_gradient_kernel"),
    ):
        monkeypatch.setattr(module, kernel, NoKernel())
    monkeypatch.setattr(
        distillation_pair, "matmul", lambda a, b: a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)
    )
    monkeypatch.setattr(distillation_sums, "accumulate", lambda total, a, b, *, is_sum, scale=1.0: None)


ROWS, CLASSES, WIDTH = 8192, 128256, 4096


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "top"])
@pytest.mark.parametrize(("path", "limit"), [("scores", 16 << 20), ("lean", 64 << 20), ("fast", 1 << 30)])
def test_memory_of_a_large_vocabulary(
    path: str, limit: int, kind: str, dtype: torch.dtype, beta: float, nothing_computed: None
) -> None:
    """Beyond inputs and gradients, counted on meta tensors."""
    student, other = (
        LinearHead(*(torch.empty(shape, dtype=dtype, device="meta") for shape in ((ROWS, WIDTH), (CLASSES, WIDTH))))
        for _ in range(2)
    )
    student = replace(student, bias=torch.empty(CLASSES, dtype=dtype, device="meta"))
    top = torch.empty(ROWS, 64, dtype=torch.int64, device="meta"), torch.empty(ROWS, 64, device="meta")
    teacher: Teacher = other if kind == "linear" else TopKLogProbs(*top)
    labels = torch.empty(ROWS, dtype=torch.int64, device="meta")
    grad_rows = torch.empty(ROWS, device="meta")
    objective = Objective(Shard(CLASSES, 0, CLASSES), beta, 0.5, 2.0, 0.1, -100)
    problem = distillation_op.Problem(student, teacher, labels, None, objective, "triton")
    needs = (True, True, True)
    inputs = [x for head in (student, other) for x in (head.hidden, head.weight, head.bias) if x is not None]
    with PeakAllocation([*inputs, *top, labels, grad_rows]) as peak:
        if path == "scores":
            distillation_triton.scores(problem, beta > 0.0)
        elif path == "fast":
            distillation_triton.fast(problem, grad_rows, needs)
        else:
            _, saved = distillation_triton.rows(problem)
            distillation_triton.backward(problem, grad_rows, saved, needs)
    assert student.bias is not None
    outputs = 2 * (student.hidden.numel() + student.weight.numel() + student.bias.numel()) if path != "scores" else 0
    assert limit / 8 < peak.bytes - outputs <= limit
