"""Distillation at its edges: rows that do not count and hold NaN, weights and normalizers of 0, one class, ties."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedmm import LinearHead, Logits, TopKLogProbs, distillation_loss, distillation_scores
from fusedmm.eager import distillation_scores_small, distillation_small, waves
from fusedmm.heads import Head, Teacher

ROWS, DIM = 9, 8
CPU = torch.device("cpu")
IMPLS = ("eager", "reference", "triton")
HOST = ("eager", "reference")
INTERPRETED = pytest.mark.filterwarnings(  # NumPy, of rows of NaN and inf
    "ignore:invalid value encountered:RuntimeWarning",
    "ignore:All-NaN slice encountered:RuntimeWarning",
    "ignore:overflow encountered:RuntimeWarning",
)


def draw(*shape: int, seed: int = 0, device: torch.device = CPU) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def rows_of(*numbers: int, device: torch.device = CPU) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def student_of(kind: str, classes: int, poisoned: Tensor) -> tuple[Head, list[Tensor]]:
    """A student whose `poisoned` rows hold NaN and inf, on their device, and its leaves."""
    device = poisoned.device
    if kind == "logits":
        values = draw(ROWS, classes, device=device).index_fill(0, poisoned, math.nan).requires_grad_()
        return Logits(values), [values]
    hidden = draw(ROWS, DIM, device=device).index_fill(0, poisoned, math.inf).requires_grad_()
    weight = draw(classes, DIM, seed=1, device=device).requires_grad_()
    bias = draw(classes, seed=2, device=device).requires_grad_()
    return LinearHead(hidden, weight, bias), [hidden, weight, bias]


def teacher_of(kind: str, classes: int, poisoned: Tensor) -> Teacher:
    device = poisoned.device
    if kind == "top":
        top = draw(ROWS, classes, seed=3, device=device).log_softmax(-1).topk(2)
        return TopKLogProbs(top.indices, top.values.index_fill(0, poisoned, math.nan))
    hidden = draw(ROWS, DIM, seed=3, device=device).index_fill(0, poisoned, math.nan)
    return LinearHead(hidden, draw(classes, DIM, seed=4, device=device))


@INTERPRETED
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("by", ["label", "weight", "both"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize(("kind", "teacher"), [("linear", "linear"), ("linear", "top"), ("logits", "linear")])
def test_rows_that_do_not_count_may_hold_anything(
    kind: str, teacher: str, memory: str, by: str, impl: str, device: torch.device
) -> None:
    """Loss and gradients are those of the other rows alone; the rows themselves have none."""
    classes, dead, none = 7, rows_of(0, 4, 8, device=device), rows_of(device=device)
    labels = torch.arange(ROWS, device=device) % classes
    weight = torch.linspace(0.5, 1.5, ROWS, device=device)
    weight_of_others = weight.index_fill(0, dead, 0.0)
    if by != "weight":
        labels = labels.index_fill(0, dead[:2] if by == "both" else dead, -100)
    if by != "label":
        weight = weight.index_fill(0, dead[1:] if by == "both" else dead, 0.0)
    student, leaves = student_of(kind, classes, dead)
    loss = distillation_loss(
        student,
        teacher_of(teacher, classes, dead),
        labels,
        beta=0.5,
        alpha=0.6,
        row_weight=weight,
        memory=memory,
        impl=impl,
    )
    grads = torch.autograd.grad(loss, leaves)
    few, few_leaves = student_of(kind, classes, none)
    whole = teacher_of(teacher, classes, none)
    few_loss = distillation_loss(
        few,
        whole,
        labels.where(labels >= 0, 0),
        beta=0.5,
        alpha=0.6,
        row_weight=weight_of_others,
        impl="reference",
    )
    torch.testing.assert_close(loss, few_loss, rtol=1e-5, atol=1e-6)
    for grad, expected in zip(grads, torch.autograd.grad(few_loss, few_leaves), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    assert bool((grads[0][dead] == 0).all())


@INTERPRETED
@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_ignored_rows_are_zero_whatever_they_hold(impl: str, device: torch.device) -> None:
    dead, labels = rows_of(1, 2, device=device), torch.arange(ROWS, device=device) % 5
    student, _ = student_of("linear", 5, dead)
    scores = distillation_scores(
        student, teacher_of("linear", 5, dead), labels.index_fill(0, dead, -100), beta=0.5, impl=impl
    )
    for name, field in scores._asdict().items():
        assert bool((field[dead] == 0).all()), name
        assert bool(field.isfinite().all()), name


@INTERPRETED
@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("where", ["logits", "bias"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_forbidden_class_counts_as_a_logit_of_minus_1e30(
    temperature: float, where: str, impl: str, device: torch.device
) -> None:
    """Of either head, of both, all but one; what would be infinite is the same huge number in every implementation."""
    classes, labels = 6, torch.zeros(ROWS, dtype=torch.int64, device=device)
    forbidden = ({3}, {2, 3})  # class 2 by the teacher alone
    if where == "bias":
        biases = [torch.zeros(classes).index_fill(0, rows_of(*some), -math.inf) for some in forbidden]

        def heads(dtype: torch.dtype) -> list[Head]:
            parts = [(draw(ROWS, DIM, seed=i), draw(classes, DIM, seed=2 + i), biases[i]) for i in range(2)]
            return [LinearHead(*(part.to(device, dtype) for part in head)) for head in parts]
    else:

        def heads(dtype: torch.dtype) -> list[Head]:
            values = draw(2, ROWS, classes).to(device, dtype)
            for head, some in zip(values, forbidden, strict=True):
                head[:, list(some)] = -math.inf
            values[0, 0, 1:] = -math.inf  # a row with a single class
            return [Logits(each) for each in values]

    for order in (1, -1):
        student, teacher = heads(torch.float32)[::order]
        exact_student, exact_teacher = heads(torch.float64)[::order]
        found = distillation_scores(student, teacher, labels, temperature=temperature, beta=0.3, impl=impl)
        expected = distillation_scores(
            exact_student, exact_teacher, labels, temperature=temperature, beta=0.3, impl="reference"
        )
        assert max(float(expected.forward_kl.max()), float(expected.reverse_kl.max())) > 1e28
        for name, field in found._asdict().items():
            torch.testing.assert_close(field.double(), getattr(expected, name), rtol=2e-5, atol=2e-6, msg=name)
        for beta in (0.0, 0.3, 1.0):
            settings: dict[str, Any] = {"beta": beta, "temperature": temperature, "reduction": "none"}
            rows = distillation_loss(student, teacher, labels, impl=impl, **settings)
            truth = distillation_loss(exact_student, exact_teacher, labels, impl="reference", **settings)
            torch.testing.assert_close(rows.double(), truth, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_normalizer_of_zero(impl: str, device: torch.device) -> None:
    """As a number it is a mistake; a tensor of 0 says that no row counts on any rank."""
    none = rows_of(device=device)
    student, leaves = student_of("linear", 5, none)
    teacher = teacher_of("linear", 5, none)
    for wrong in (0.0, 0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^distillation_loss: normalizer must be finite and not 0, got"):
            distillation_loss(student, teacher, normalizer=wrong, impl=impl)
    loss = distillation_loss(student, teacher, normalizer=torch.tensor(0, device=device), impl=impl)
    assert loss == 0
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_class(impl: str, device: torch.device) -> None:
    """Nothing to choose from: every divergence is 0, and so is the gradient; the margin has no runner-up."""
    none = rows_of(device=device)
    student, leaves = student_of("linear", 1, none)
    teacher = teacher_of("linear", 1, none)
    labels = torch.zeros(ROWS, dtype=torch.int64, device=device)
    scores = distillation_scores(student, teacher, labels, beta=0.3, impl=impl)
    assert bool((scores.margin == math.inf).all())
    assert bool((scores.agreement == 1).all())
    for name in ("forward_kl", "reverse_kl", "hellinger", "grad_norm", "el2n", "divergence", "student_nll"):
        torch.testing.assert_close(getattr(scores, name).float(), torch.zeros(ROWS, device=device), rtol=0, atol=1e-6)
    for beta in (0.0, 0.3, 1.0):
        grads = torch.autograd.grad(distillation_loss(student, teacher, labels, beta=beta, impl=impl), leaves)
        assert all(float(grad.abs().max()) <= 1e-6 for grad in grads)


def test_agreement_of_ties_is_that_of_the_first_class() -> None:
    student = torch.tensor([[1.0, 3.0, 3.0], [3.0, 3.0, 3.0], [2.0, 2.0, 1.0]])
    teacher = torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 5.0], [1.0, 2.0, 2.0]])
    for impl in HOST:
        scores = distillation_scores(Logits(student), Logits(teacher), impl=impl)
        assert scores.agreement.tolist() == [0.0, 1.0, 0.0], impl


@pytest.mark.parametrize("classes", [2, 3, waves.FEW_CLASSES, waves.FEW_CLASSES + 1])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_either_layout_of_a_wave(beta: float, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several waves, the last one shorter, with few classes and with one more than few."""
    monkeypatch.setattr(waves, "WAVE_ELEMENTS", 4 * classes)
    monkeypatch.setattr(waves, "MIN_WAVE_ROWS", 4)
    student, leaves = student_of("linear", classes, rows_of())
    teacher, labels = teacher_of("linear", classes, rows_of()), torch.arange(ROWS) % 2
    loss, expected = (
        distillation_loss(student, teacher, labels, beta=beta, alpha=0.5, temperature=2.0, impl=impl) for impl in HOST
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for grad, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-6)
    found, exact_scores = (
        distillation_scores(student, teacher, labels, temperature=2.0, beta=0.5, impl=impl) for impl in HOST
    )
    for name, field in found._asdict().items():
        torch.testing.assert_close(field, getattr(exact_scores, name), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_half_precision_logits_with_an_ignored_row(memory: str, dtype: torch.dtype) -> None:
    values, labels = (
        draw(ROWS, 5).to(dtype).requires_grad_(),
        (torch.arange(ROWS) % 5).index_fill(0, torch.tensor(2), -100),
    )
    teacher = Logits(draw(ROWS, 5, seed=1).to(dtype))
    found, expected = (
        torch.autograd.grad(distillation_loss(Logits(values), teacher, labels, memory=memory, impl=impl), values)[0]
        for impl in HOST
    )
    assert bool((found[2] == 0).all())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("std", [1.0, 30.0])
@pytest.mark.parametrize("way", ["few", "waves"])
def test_either_way_of_few_logits(
    way: str, std: float, temperature: float, beta: float, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row's gradient keeps its digits, a saturated one's (std 30) too."""
    if way == "waves":
        monkeypatch.setattr(distillation_small, "FEW_ELEMENTS", 0)
    labels, results = torch.arange(ROWS) % 5, []
    for impl, dtype in (("reference", torch.float64), ("eager", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (draw(ROWS, 6), std * draw(5, 6, seed=1), draw(5, seed=2))]
        teacher = LinearHead(draw(ROWS, 4, seed=3).to(dtype), (std * draw(5, 4, seed=4)).to(dtype))
        loss = distillation_loss(
            LinearHead(*leaves), teacher, labels, alpha=alpha, beta=beta, temperature=temperature, impl=impl
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for exact, found in zip(*results, strict=True):
        error, size = (torch.linalg.vector_norm(x, dim=-1) for x in (found - exact, exact))
        assert float((error / (size + 1e-9)).max()) <= 1e-4


@pytest.mark.parametrize("std", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("classes", [1, 2, 5, 40])
@pytest.mark.parametrize("way", ["call", "few", "waves"])
def test_every_way_of_few_scores(way: str, classes: int, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All fields, of a forbidden class, of heads that hardly differ and of saturated ones too."""
    if way != "call":
        monkeypatch.setattr(distillation_scores_small, "CALL_ELEMENTS", 0)
    if way == "waves":
        monkeypatch.setattr(distillation_small, "FEW_ELEMENTS", 0)
    hidden, weight, bias = draw(ROWS, 6), draw(classes, 6, seed=1), draw(classes, seed=2)
    bias[3:4] = -torch.inf
    heads = LinearHead(hidden, weight, bias), LinearHead(hidden, weight + std * draw(classes, 6, seed=3), bias)
    labels = torch.arange(ROWS) % min(classes, 3)
    exact, found = (distillation_scores(*heads, labels, impl=impl)._asdict() for impl in HOST)
    for name, field in exact.items():
        atol = 1e-5 if name in ("excess_loss", "margin") else 1e-6  # a difference of two logits
        torch.testing.assert_close(found[name], field, rtol=1e-4, atol=atol, msg=name)
    without = distillation_scores(*heads, temperature=2.0)
    expected = distillation_scores(*heads, temperature=2.0, impl="reference")
    assert without.student_nll is None
    torch.testing.assert_close(without.grad_norm, expected.grad_norm, rtol=1e-4, atol=1e-6)
    ties = LinearHead(torch.ones(1, 1), torch.ones(classes, 1)), LinearHead(torch.ones(1, 1), torch.ones(classes, 1))
    assert float(distillation_scores(*ties).agreement) == 1.0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_rest_of_forbidden_classes_is_as_unlikely_as_they_are(
    impl: str, temperature: float, device: torch.device
) -> None:
    """All that a top-k teacher leaves out has -inf: 1e30 / temperature times the mass it leaves."""
    values = draw(3, 7)
    values[:, [2, 5]] = -torch.inf
    indices = torch.tensor([[0, 1, 3, 4, 6]]).expand(3, -1)
    teacher = TopKLogProbs(indices.to(device), torch.full((3, 5), 0.15, device=device).log())
    student = Logits(values.to(device))
    loss = distillation_loss(student, teacher, temperature=temperature, impl=impl)
    assert float(loss) == pytest.approx(0.25e30 * temperature, rel=1e-5)
    scores = distillation_scores(student, teacher, temperature=temperature, impl=impl)
    assert scores.forward_kl.tolist() == pytest.approx([0.25e30 / temperature] * 3, rel=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", ["full", "top", "rest"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tested", ["eager", "triton"])
def test_a_forbidden_class_has_no_gradient(
    tested: str, temperature: float, beta: float, kind: str, device: torch.device
) -> None:
    """Its logit counts as -1e30 whatever its input, though the teacher or the label may name it."""
    hidden, weight, bias = draw(6, 4), draw(7, 4, seed=1), draw(7, seed=2)
    bias[[2, 5]] = -torch.inf
    probabilities = draw(6, 7, seed=3).log_softmax(-1)
    indices = torch.tensor([[0, 1, 3, 4, 6] if kind == "rest" else [5, 1, 2]]).expand(6, -1)
    teacher = TopKLogProbs(indices.to(device), probabilities.gather(1, indices).to(device))
    gradients = []
    for impl, dtype in (("reference", torch.float64), (tested, torch.float32)):
        leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)]
        loss = distillation_loss(
            LinearHead(*leaves),
            Logits(probabilities.to(device, dtype)) if kind == "full" else teacher,
            torch.tensor([0, 2, 3, 5, -100, 6], device=device),
            temperature=temperature, beta=beta, alpha=0.5, label_smoothing=0.1, reduction="sum", impl=impl,
        )  # fmt: skip
        gradients.append(torch.autograd.grad(loss, leaves))
    for truth, found in zip(*gradients, strict=True):
        assert bool((found[[2, 5]] == 0).all()) or found.shape[0] == 6
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_a_forbidden_class_has_no_gradient_on_any_eager_path(kind: str, alpha: float, dtype: torch.dtype) -> None:
    """Few logits of linear heads go one way, logits that are given another."""
    inputs = [draw(6, 4), draw(7, 4, seed=1), draw(7, seed=2)] if kind == "linear" else [draw(6, 7)]
    inputs[-1][..., [2, 5]] = -torch.inf
    teacher = [draw(6, 4, seed=3), draw(7, 4, seed=4)]
    gradients = []
    for impl, precision in (("reference", torch.float64), ("eager", dtype)):
        leaves = [x.to(dtype).to(precision).requires_grad_() for x in inputs]
        loss = distillation_loss(
            (LinearHead if kind == "linear" else Logits)(*leaves),
            LinearHead(*(x.to(dtype).to(precision) for x in teacher)),
            torch.tensor([0, 2, 3, 5, 1, 6]),
            alpha=alpha, reduction="sum", impl=impl,
        )  # fmt: skip
        gradients.append(torch.autograd.grad(loss, leaves))
    tolerance = 1e-2 if dtype == torch.float16 else 1e-5
    for truth, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_equal_classes_a_top_k_teacher_means_the_first_it_names(impl: str, device: torch.device) -> None:
    values = torch.zeros(3, 12)
    values[[0, 1, 2], [5, 2, 9]] = 4.0
    teacher = TopKLogProbs(torch.tensor([[5, 2, 9]] * 3).to(device), torch.tensor([[-1.0, -1.0, -2.0]] * 3).to(device))
    scores = distillation_scores(Logits(values.to(device)), teacher, impl=impl)
    assert scores.agreement.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("way", ["few", "waves"])
def test_sums_are_not_rounded_where_products_may_be(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over few classes are products with ones, but not where float32 products are rounded to bfloat16."""
    monkeypatch.setattr(distillation_scores_small, "CALL_ELEMENTS", 0)
    if way == "waves":
        monkeypatch.setattr(distillation_small, "FEW_ELEMENTS", 0)
    heads = LinearHead(draw(ROWS, 6), draw(5, 6, seed=1)), LinearHead(draw(ROWS, 6, seed=2), draw(5, 6, seed=3))
    expected = distillation_scores(*heads, impl="eager")
    monkeypatch.setattr(torch.Tensor, "__matmul__", None)
    with pytest.raises(TypeError):
        distillation_scores(*heads, impl="eager")
    torch.backends.mkldnn.matmul.fp32_precision, before = "bf16", torch.backends.mkldnn.matmul.fp32_precision
    try:
        found = distillation_scores(*heads, impl="eager")
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    torch.testing.assert_close(found.forward_kl, expected.forward_kl)
    torch.testing.assert_close(found.hellinger, expected.hellinger)
