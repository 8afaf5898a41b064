"""The registered operators under PyTorch's own checks: opcheck, torch.compile, autocast; and what users get told."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.overrides import TorchFunctionMode

from fusedmm import LinearHead, Logits, ShapeError, TopKLogProbs, distillation_loss, distillation_scores
from fusedmm.eager import waves
from fusedmm.ops.distillation_inputs import check_inputs
from fusedmm.ops.distillation_op import problem_of

OPERATORS = torch.ops.fusedmm
CPU = torch.device("cpu")


def heads(bias: bool = True, device: torch.device = CPU) -> tuple[LinearHead, LinearHead, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    student = LinearHead(draw(6, 8), draw(11, 8), draw(11) if bias else None)
    return student, LinearHead(draw(6, 5), draw(11, 5)), torch.randint(0, 11, (6,), device=device)


def problem(
    impl: str, device: torch.device, requires_grad: bool = False, beta: float = 0.3, is_top: bool = False
) -> list[Any]:
    student, full, labels = heads(device=device)
    top = torch.log_softmax(torch.randn(6, 11, device=device), -1).topk(3)
    teacher = TopKLogProbs(top.indices, top.values) if is_top else full
    if requires_grad:
        for tensor in (student.hidden, student.weight, student.bias):
            tensor.requires_grad_()
    inputs = check_inputs("distillation_loss", student, teacher, labels, 2.0, impl)
    return problem_of(inputs, beta=beta, alpha=0.5, label_smoothing=0.1, ignore_index=-100, all_count=False).flat()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of PyTorch 2.15's opcheck
@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("is_top", [False, True])
def test_opcheck(is_top: bool, impl: str, requires_grad: bool, device: torch.device) -> None:
    grad_rows, needs = torch.rand(6, device=device), (True, True, True)
    arguments = problem(impl, device, requires_grad, is_top=is_top)
    library.opcheck(OPERATORS.distillation_rows.default, tuple(arguments))
    library.opcheck(OPERATORS.distillation_fast.default, (*arguments, grad_rows, *needs))
    frozen = problem(impl, device, is_top=is_top)
    statistics = OPERATORS.distillation_rows(*frozen)[1]
    library.opcheck(OPERATORS.distillation_scores.default, (*frozen, True))
    library.opcheck(OPERATORS.distillation_backward.default, (*frozen, grad_rows, statistics, *needs))


def assert_one_graph(step: Callable[..., Tensor], student: LinearHead, *others: Tensor) -> None:
    """`step` of the student's hidden and weight and of others: the same compiled, its gradients too."""
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [student.hidden.clone().requires_grad_(), student.weight.clone().requires_grad_()]
        loss = function(*leaves, *others)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_compiles_into_one_graph(memory: str) -> None:
    def step(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        loss = distillation_loss(
            LinearHead(hidden, weight),
            LinearHead(teacher_hidden, teacher_weight),
            labels,
            beta=0.5,
            alpha=0.7,
            memory=memory,
            impl="eager",
        )
        scores = distillation_scores(
            LinearHead(hidden, weight), LinearHead(teacher_hidden, teacher_weight), labels, impl="eager"
        )
        return loss + scores.forward_kl.sum()

    student, teacher, labels = heads(bias=False)
    assert_one_graph(step, student, teacher.hidden, teacher.weight, labels)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_top_k_teachers_compile_into_one_graph(memory: str, impl: str, device: torch.device) -> None:
    def step(hidden: Tensor, weight: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
        student, teacher = LinearHead(hidden, weight), TopKLogProbs(indices, log_probs)
        loss = distillation_loss(student, teacher, beta=0.5, memory=memory, impl=impl)
        return loss + distillation_scores(LinearHead(hidden.detach(), weight.detach()), teacher, impl=impl)[0].sum()

    student, _, _ = heads(bias=False, device=device)
    top = torch.log_softmax(torch.randn(6, 11, device=device), -1).topk(3)
    assert_one_graph(step, student, top.indices, top.values)


def test_autocast_takes_heads_in_its_dtype() -> None:
    student, teacher, labels = heads()
    cast = [
        LinearHead(*(None if t is None else t.bfloat16() for t in (h.hidden, h.weight, h.bias)))
        for h in (student, teacher)
    ]
    expected = distillation_loss(*cast, labels, impl="eager")
    weight = student.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(student, teacher, labels, impl="eager")
        mixed = distillation_loss(
            dataclasses.replace(student, hidden=student.hidden.bfloat16()), teacher, labels, impl="eager"
        )
    assert torch.equal(loss, expected)
    assert torch.equal(mixed, expected)
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32


@pytest.mark.parametrize("rows_of_a_wave", [4, 10**6])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_gradients_under_autocast_are_those_of_cast_heads(
    memory: str, rows_of_a_wave: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one wave and in several, with the backward inside the block and outside."""
    student, teacher, labels = heads()
    monkeypatch.setattr(waves, "MIN_WAVE_ROWS", 4)
    monkeypatch.setattr(waves, "WAVE_ELEMENTS", rows_of_a_wave * student.weight.shape[0])
    leaves = [t.detach().requires_grad_() for t in (student.hidden, student.weight)]

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor, theirs: LinearHead) -> torch.Tensor:
        head = dataclasses.replace(student, hidden=hidden, weight=weight)
        return distillation_loss(head, theirs, labels, alpha=0.5, memory=memory, impl="eager")

    low = [
        LinearHead(*(None if t is None else t.bfloat16() for t in (h.hidden, h.weight, h.bias)))
        for h in (student, teacher)
    ]
    student = dataclasses.replace(student, bias=low[0].bias)
    expected = torch.autograd.grad(loss_of(leaves[0].bfloat16(), leaves[1].bfloat16(), low[1]), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        outside = loss_of(*leaves, teacher)
        inside = torch.autograd.grad(loss_of(*leaves, teacher), leaves)
    for found in (inside, torch.autograd.grad(outside, leaves)):
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got, wanted)


def test_upstream_gradient_scales_and_backward_runs_twice() -> None:
    student, teacher, _ = heads()
    hidden = student.hidden.requires_grad_()
    loss = distillation_loss(student, teacher, impl="eager")
    once = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(3 * loss, hidden)[0], 3 * once)


def test_a_teacher_in_single_precision_has_a_gradient_beside_a_student_in_double() -> None:
    student = LinearHead(torch.randn(6, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64))
    weights = [torch.randn(11, 5).to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64)]
    weights[1].data.copy_(weights[0].data)
    hidden = torch.randn(6, 5)
    gradients = []
    for weight in weights:
        teacher = LinearHead(hidden.to(weight.dtype), weight)
        loss = distillation_loss(student, teacher, memory="lean", impl="eager")
        gradients.append(torch.autograd.grad(loss, weight)[0])
    assert gradients[0].dtype == torch.float32
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-7)


def test_without_grad_mode_nothing_has_a_gradient() -> None:
    student, teacher, _ = heads()
    student.hidden.requires_grad_()
    with torch.no_grad():
        assert not distillation_loss(student, teacher, impl="eager").requires_grad
    assert not distillation_scores(student, teacher, impl="eager").forward_kl.requires_grad


def test_every_mistake_is_told() -> None:
    student, teacher, labels = heads()
    top = TopKLogProbs(torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2))
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "temperature must be positive", {"temperature": 0.0}),
        (ValueError, "beta must be between 0 and 1", {"beta": 1.5}),
        (ValueError, "alpha must be between 0 and 1", {"alpha": -0.1}),
        (ValueError, "label_smoothing must be between 0 and 1", {"label_smoothing": 2.0}),
        (ValueError, "memory must be one of", {"memory": "small"}),
        (ValueError, "reduction must be one of", {"reduction": "batchmean"}),
        (ValueError, "impl must be one of", {"impl": "cuda"}),
        (ValueError, "labels must be given", {"alpha": 0.5, "labels": None}),
        (ValueError, "normalizer divides", {"reduction": "sum", "normalizer": 2.0}),
        (ValueError, "normalizer must be a number", {"normalizer": torch.ones(2)}),
        (ValueError, "row_weight must not require grad", {"row_weight": torch.ones(6, requires_grad=True)}),
        (ValueError, "normalizer must not require grad", {"normalizer": torch.ones((), requires_grad=True)}),
        (ValueError, "temperature must not require grad", {"temperature": torch.ones(6, requires_grad=True)}),
        (
            ValueError,
            "teacher must not require grad",
            {"teacher": dataclasses.replace(teacher, weight=teacher.weight.clone().requires_grad_())},
        ),
        (ValueError, "softcap must be positive", {"student": dataclasses.replace(student, softcap=0.0)}),
        (TypeError, "student.group must be", {"student": dataclasses.replace(student, group="world")}),
        (
            ValueError,
            "teacher.indices must be 0 to 10, got 11",
            {"teacher": TopKLogProbs(torch.tensor([[0, 11]] * 6), top.log_probs)},
        ),
        (TypeError, "labels must be int64", {"labels": labels.int()}),
        (
            TypeError,
            "student.weight must be float32, got bfloat16",
            {"student": dataclasses.replace(student, weight=student.weight.bfloat16())},
        ),
        (TypeError, "student must be LinearHead or Logits", {"student": top}),
        (TypeError, "teacher must be LinearHead, Logits or TopKLogProbs", {"teacher": teacher.hidden}),
        (TypeError, "row_weight must be", {"row_weight": torch.ones(6, dtype=torch.int64)}),
        (ShapeError, "teacher.hidden has row=5", {"teacher": dataclasses.replace(teacher, hidden=teacher.hidden[:5])}),
        (
            ShapeError,
            "student.weight has student_dim=8",
            {"student": dataclasses.replace(student, hidden=student.hidden[:, :7])},
        ),
        (
            ShapeError,
            "teacher has 10 classes, but student has 11",
            {"teacher": dataclasses.replace(teacher, weight=teacher.weight[:10])},
        ),
        (ShapeError, "num_classes must be at most", {"student": dataclasses.replace(student, num_classes=12)}),
        (ShapeError, "labels must have 1 dimensions", {"labels": labels[:, None]}),
        (ShapeError, "row_weight has row=5", {"row_weight": torch.ones(5)}),
        (ShapeError, "temperature has row=5", {"temperature": torch.ones(5)}),
        (NotImplementedError, "float64", {"student": Logits(torch.ones(6, 11).double()), "impl": "triton"}),
    ]
    for error, message, change in cases:
        arguments = {"student": student, "teacher": teacher, "labels": labels, **change}
        with pytest.raises(error, match=message.replace("(", "\\(")) as caught:
            distillation_loss(**arguments)
        assert str(caught.value).startswith("distillation_loss: ")


def test_a_gradient_changed_in_place_cannot_be_asked_for_again() -> None:
    student, teacher, _ = heads()
    hidden = student.hidden.requires_grad_()
    loss = distillation_loss(student, teacher, impl="eager")
    torch.autograd.grad(loss, hidden, retain_graph=True)[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_gpu_of_their_tensors() -> None:
    """Also where another one is current."""
    values = torch.randn(2, 33, 50)
    here, there = (
        distillation_scores(Logits(values[0].to(device)), Logits(values[1].to(device)), impl="triton")
        for device in ("cuda:0", "cuda:1")
    )
    assert torch.equal(here.forward_kl.cpu(), there.forward_kl.cpu())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_a_function_mode_and_a_tracer_see_the_operators() -> None:
    student, weight, teacher = torch.randn(4, 8), torch.randn(5, 8), LinearHead(torch.randn(4, 8), torch.randn(5, 8))
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    with Watch():
        distillation_scores(LinearHead(student, weight), teacher)
    assert "distillation_scores" in seen

    def rows(hidden: Tensor) -> Tensor:
        return distillation_loss(LinearHead(hidden, weight), teacher, reduction="none")

    def loss(hidden: Tensor) -> Tensor:
        return distillation_loss(LinearHead(hidden, weight), LinearHead(0.5 * hidden, weight))

    traced = torch.jit.trace(rows, student, check_trace=False)
    assert "fusedmm::distillation_rows" in {node.kind() for node in traced.graph.nodes()}
    mean = torch.jit.trace(loss, student, check_trace=False)
    torch.testing.assert_close(mean(torch.cat([student, student])), loss(student))  # of another number of rows
    other = 100 * student  # saturated rows, for which eager takes another branch
    assert torch.equal(traced(other), rows(other))
