"""Scores and losses of every implementation against the float64 reference, over options, sizes and dtypes; and the
reference against gradcheck.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedmm
from fusedmm import LinearHead, Logits, TopKLogProbs, distillation_loss, distillation_scores
from fusedmm.eager import products, waves
from fusedmm.reference import distillation as reference

IMPLEMENTATIONS = ("eager", "triton")
# Relative error allowed of a float32 implementation: scores per field, gradients in norm.
SCORE_ERROR, GRADIENT_ERROR = 3e-5, 1e-4
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "padded": {"num_classes": 50},
    "row_temperature": {"row_temperature": True},
    "temperature": {"temperature": 2.0},
    "ignored": {"ignored": True},
    "smoothed": {"label_smoothing": 0.1, "alpha": 0.5},
    "cross_entropy_only": {"alpha": 0.0},
    "everything": {
        "bias": True,
        "softcap": 5.0,
        "num_classes": 50,
        "row_temperature": True,
        "ignored": True,
        "label_smoothing": 0.2,
        "alpha": 0.3,
        "weighted": True,
    },
}


class Case:
    """A seeded problem with some options, in a dtype."""

    def __init__(
        self,
        rows: int = 37,
        classes: int = 61,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **options: Any,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=draw) * std).to(device, dtype)

        self.options = options
        self.student = LinearHead(
            normal(rows, 24),
            normal(classes, 24, std=0.6),
            normal(classes) if options.get("bias") else None,
            options.get("num_classes"),
            options.get("softcap"),
        )
        self.teacher = LinearHead(
            normal(rows, 40),
            normal(classes + 3, 40, std=0.4),
            normal(classes + 3) if options.get("bias") else None,
            options.get("num_classes", classes),
            options.get("softcap"),
        )
        self.labels = torch.randint(0, options.get("num_classes", classes), (rows,), generator=draw).to(device)
        if options.get("ignored"):
            self.labels[::3] = -100
        self.row_weight = (torch.rand(rows, generator=draw) + 0.1).to(device) if options.get("weighted") else None
        self.temperature = (
            (torch.rand(rows, generator=draw) + 0.5).to(device)
            if options.get("row_temperature")
            else options.get("temperature", 1.0)
        )

    def loss(self, student: Any, teacher: Any, **arguments: Any) -> Tensor:
        settings = {name: self.options[name] for name in ("alpha", "label_smoothing") if name in self.options}
        return distillation_loss(
            student,
            teacher,
            self.labels,
            temperature=self.temperature,
            row_weight=self.row_weight,
            **settings,
            **arguments,
        )

    def gradients(self, dtype: torch.dtype | None = None, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss, weighted by fixed numbers where it is one a row, and its gradients in the student's tensors."""
        student = _leaf(self.student, dtype)
        teacher = _cast(self.teacher, dtype)
        loss = self.loss(student, teacher, **arguments)
        upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).reshape(loss.shape)
        tensors = [t for t in (student.hidden, student.weight, student.bias) if t is not None]
        return loss.detach(), list(torch.autograd.grad(loss, tensors, upstream))


def _cast(head: LinearHead, dtype: torch.dtype | None) -> LinearHead:
    if dtype is None:
        return head
    return dataclasses.replace(
        head,
        hidden=head.hidden.to(dtype),
        weight=head.weight.to(dtype),
        bias=None if head.bias is None else head.bias.to(dtype),
    )


def _leaf(head: LinearHead, dtype: torch.dtype | None = None) -> LinearHead:
    cast = _cast(head, dtype)
    return dataclasses.replace(
        cast,
        hidden=cast.hidden.detach().clone().requires_grad_(),
        weight=cast.weight.detach().clone().requires_grad_(),
        bias=None if cast.bias is None else cast.bias.detach().clone().requires_grad_(),
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def assert_scores(
    got: fusedmm.DistillationScores, expected: fusedmm.DistillationScores, allowed: float = SCORE_ERROR
) -> None:
    for name, value in expected._asdict().items():
        field = getattr(got, name)
        assert (field is None) == (value is None), name
        if value is not None:
            error = ((field.double() - value.double()).abs() / (1 + value.double().abs())).max().item()
            assert error <= allowed, f"{name}: error {error:.1e}"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_scores_match_the_reference(option: str, impl: str, device: torch.device) -> None:
    case = Case(device=device, **OPTIONS[option])
    arguments: dict[str, Any] = {"temperature": case.temperature, "beta": 0.3}
    expected = distillation_scores(
        _cast(case.student, torch.float64),
        _cast(case.teacher, torch.float64),
        case.labels,
        impl="reference",
        **arguments,
    )
    assert_scores(distillation_scores(case.student, case.teacher, case.labels, impl=impl, **arguments), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_gradients_match_the_reference(option: str, beta: float, impl: str, device: torch.device) -> None:
    case = Case(rows=19, device=device, **OPTIONS[option])
    loss, gradients = case.gradients(torch.float64, beta=beta, impl="reference")
    for memory in ("fast", "lean"):
        got, computed = case.gradients(beta=beta, memory=memory, impl=impl)
        assert relative(got, loss) <= SCORE_ERROR
        for a, b in zip(computed, gradients, strict=True):
            assert relative(a, b) <= GRADIENT_ERROR


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(reduction: str, impl: str, device: torch.device) -> None:
    case = Case(rows=11, device=device, weighted=True, ignored=True)
    loss, gradients = case.gradients(torch.float64, reduction=reduction, impl="reference")
    got, computed = case.gradients(reduction=reduction, impl=impl)
    assert got.shape == loss.shape
    assert relative(got, loss) <= SCORE_ERROR
    for a, b in zip(computed, gradients, strict=True):
        assert relative(a, b) <= GRADIENT_ERROR


def test_normalizer_is_what_the_mean_divides_by(device: torch.device) -> None:
    case = Case(device=device, weighted=True)
    total = case.loss(case.student, case.teacher, reduction="sum", impl="eager")
    assert torch.allclose(
        case.loss(case.student, case.teacher, normalizer=torch.tensor(7.0, device=device), impl="eager"), total / 7
    )
    assert torch.allclose(case.loss(case.student, case.teacher, impl="eager"), total / case.row_weight.sum())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_a_teacher_that_requires_grad_gets_one_in_lean_mode(beta: float, impl: str, device: torch.device) -> None:
    case = Case(rows=9, device=device, bias=True, softcap=4.0)
    expected, got = [], []
    for dtype, implementation, results in ((torch.float64, "reference", expected), (None, impl, got)):
        teacher = _leaf(case.teacher, dtype)
        loss = distillation_loss(
            _cast(case.student, dtype),
            teacher,
            case.labels,
            alpha=0.7,
            beta=beta,
            temperature=2.0,
            memory="lean",
            impl=implementation,
        )
        results += torch.autograd.grad(loss, (teacher.hidden, teacher.weight, teacher.bias))
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) <= GRADIENT_ERROR


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_as_student_and_teacher(impl: str, device: torch.device) -> None:
    values = torch.randn(2, 13, 30, device=device, dtype=torch.float64)
    values[1, :, 3] = -torch.inf  # a class that the teacher forbids
    labels = torch.randint(4, 30, (13,), device=device)
    results = []
    for implementation, dtype in (("reference", torch.float64), (impl, torch.float32)):
        student = values[0].to(dtype).requires_grad_()
        heads = Logits(student, num_classes=27), Logits(values[1].to(dtype), num_classes=27)
        rows = [
            distillation_loss(*heads, labels % 27, alpha=0.6, memory=memory, impl=implementation)
            for memory in ("fast", "lean")
        ]
        results.append([torch.autograd.grad(loss, student)[0] for loss in rows])
    for got in results[1]:
        assert relative(got, results[0][0]) <= GRADIENT_ERROR
        assert bool((got[:, 27:] == 0).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_shared_weight_gives_what_two_equal_weights_give(impl: str, device: torch.device) -> None:
    hidden, weight = torch.randn(2, 33, 24, device=device), torch.randn(45, 24, device=device)
    for memory in ("fast", "lean"):
        results = []
        for copy in (weight.detach(), weight.clone()):
            w = weight.detach().requires_grad_()
            teacher = LinearHead(
                hidden[1], w.detach() if copy is not weight and copy.data_ptr() == weight.data_ptr() else copy
            )
            loss = distillation_loss(LinearHead(hidden[0], w), teacher, memory=memory, impl=impl)
            results.append((loss.detach(), *torch.autograd.grad(loss, w)))
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [1, 5, 30])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_top_k_teacher_is_the_full_teacher_with_its_rest_in_one_bucket(
    k: int, beta: float, impl: str, device: torch.device
) -> None:
    student = LinearHead(
        torch.randn(12, 8, device=device, dtype=torch.float64),
        torch.randn(30, 8, device=device, dtype=torch.float64) * 2,
    )
    labels = torch.randint(0, 30, (12,), device=device)
    log_probs, indices = torch.log_softmax(torch.randn(12, 30, device=device, dtype=torch.float64) * 2, -1).topk(k)
    teacher = TopKLogProbs(indices, log_probs)
    arguments: dict[str, Any] = {"beta": beta, "temperature": 1.5}
    results = []
    for implementation, dtype in (("reference", torch.float64), (impl, torch.float32)):
        leaf = _leaf(student, dtype)
        loss = distillation_loss(leaf, teacher, labels, alpha=0.7, impl=implementation, **arguments)
        results.append((loss.detach(), *torch.autograd.grad(loss, (leaf.hidden, leaf.weight))))
    for a, b in zip(*results, strict=True):
        assert relative(b, a) <= GRADIENT_ERROR
    expected = distillation_scores(student, teacher, labels, impl="reference", **arguments)
    assert_scores(distillation_scores(_cast(student, torch.float32), teacher, labels, impl=impl, **arguments), expected)
    full = torch.log_softmax(reference.logits(student, 30) / 1.5, -1)
    rest = 1 - full.exp().gather(1, indices).sum(-1)
    if k < 30:  # the bucket by its definition
        t_rest = 1 - log_probs.exp().sum(-1)
        by_hand = (log_probs.exp() * (log_probs - full.gather(1, indices))).sum(-1) + t_rest * (t_rest / rest).log()
        assert torch.allclose(expected.forward_kl, by_hand, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_top_k_teacher_with_every_option(option: str, impl: str, device: torch.device) -> None:
    case = Case(rows=13, device=device, **OPTIONS[option])
    log_probs, indices = torch.log_softmax(torch.randn(13, 50, device=device) * 3, -1).topk(6)
    log_probs[:, 4] = -torch.inf  # a slot that is not used
    results = []
    for implementation, memory, dtype in (
        ("reference", "fast", torch.float64),
        (impl, "fast", torch.float32),
        (impl, "lean", torch.float32),
    ):
        student, teacher = _leaf(case.student, dtype), TopKLogProbs(indices, log_probs.to(dtype))
        loss = case.loss(student, teacher, beta=0.0 if option == "softcap" else 0.4, memory=memory, impl=implementation)
        leaves = [t for t in (student.hidden, student.weight, student.bias) if t is not None]
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            assert relative(a, b) <= GRADIENT_ERROR
    arguments: dict[str, Any] = {"temperature": case.temperature, "beta": 0.3}
    expected, found = (
        distillation_scores(
            _cast(case.student, dtype), TopKLogProbs(indices, log_probs), case.labels, impl=implementation, **arguments
        )
        for implementation, dtype in (("reference", torch.float64), (impl, torch.float32))
    )
    assert_scores(found, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("gap", [0.0, 20.0, 60.0])
def test_the_bucket_of_a_confident_student_keeps_its_digits(gap: float, impl: str, device: torch.device) -> None:
    """Next to nothing is left outside the top-k: 1 minus the sum of their probabilities would be 0 or noise."""
    values = torch.randn(8, 40, device=device, dtype=torch.float64)
    values[:, :3] += gap
    log_probs = torch.log_softmax(values + torch.randn(8, 40, device=device, dtype=torch.float64), -1)[:, :3]
    top = TopKLogProbs(torch.arange(3, device=device).expand(8, 3), log_probs)
    results = []
    for implementation, dtype in (("reference", torch.float64), (impl, torch.float32)):
        student = values.to(dtype).requires_grad_()
        rows = distillation_loss(Logits(student), top, beta=1.0, reduction="none", impl=implementation)
        (grad,) = torch.autograd.grad(rows.sum(), student)
        results.append((rows.detach(), grad[:, :3], grad[:, 3:]))
    for a, b in zip(results[1], results[0], strict=True):
        assert relative(a, b) <= GRADIENT_ERROR


def test_reference_gradients_by_finite_differences() -> None:
    case = Case(
        rows=3, classes=5, device=torch.device("cpu"), bias=True, row_temperature=True, label_smoothing=0.1, alpha=0.4
    )
    student, teacher = _leaf(case.student, torch.float64), _cast(case.teacher, torch.float64)
    for beta in (0.0, 0.3, 1.0):
        for impl, memory in (("reference", "fast"), ("eager", "fast"), ("eager", "lean")):

            def loss(
                hidden: Tensor, weight: Tensor, bias: Tensor, beta: float = beta, impl: str = impl, memory: str = memory
            ) -> Tensor:
                return case.loss(
                    dataclasses.replace(student, hidden=hidden, weight=weight, bias=bias),
                    teacher,
                    beta=beta,
                    impl=impl,
                    memory=memory,
                )

            assert torch.autograd.gradcheck(loss, (student.hidden, student.weight, student.bias))


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_no_row_that_counts(rows: int, impl: str, device: torch.device) -> None:
    student = LinearHead(
        torch.randn(rows, 16, device=device, requires_grad=True), torch.randn(20, 16, device=device, requires_grad=True)
    )
    teacher = LinearHead(torch.randn(rows, 16, device=device), torch.randn(20, 16, device=device))
    labels = torch.full((rows,), -100, device=device)
    loss = distillation_loss(student, teacher, labels, alpha=0.5, impl=impl)
    gradients = torch.autograd.grad(loss, (student.hidden, student.weight))
    assert loss.item() == 0
    assert all(bool((gradient == 0).all()) for gradient in gradients)
    scores = distillation_scores(student, teacher, labels, beta=0.5, impl=impl)
    assert all(bool((field == 0).all()) and field.shape == (rows,) for field in scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_too_large_to_convert_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(device=torch.device("cpu"), dtype=dtype, bias=True, num_classes=50)
    results = [case.gradients(beta=0.4, impl="eager")]
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 200)
    monkeypatch.setattr(waves, "BLOCK_ELEMENTS", 200)
    results.append(case.gradients(beta=0.4, impl="eager"))
    for a, b in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) <= 1e-3  # of the same sums, rounded to the dtype


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_results_are_bitwise_reproducible(impl: str, device: torch.device) -> None:
    case = Case(rows=40, classes=100, device=device)
    runs = [case.gradients(beta=0.5, memory=memory, impl=impl) for memory in ("fast", "lean") for _ in range(2)]
    for first, second in (runs[:2], runs[2:]):
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
