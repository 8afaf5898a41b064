"""Distillation at the edge of what it accepts: labels that are no class, weights of any sign, heads of two dtypes."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fusedmm import LinearHead, Logits, ShapeError, TopKLogProbs, distillation_loss, distillation_scores

IMPLEMENTATIONS = ("eager", "triton")


def heads(
    dtype: torch.dtype = torch.float32, teacher_dtype: torch.dtype | None = None
) -> tuple[LinearHead, LinearHead]:
    student = LinearHead(torch.randn(4, 16).to(dtype), torch.randn(5, 16).to(dtype))
    teacher_dtype = dtype if teacher_dtype is None else teacher_dtype
    return student, LinearHead(torch.randn(4, 24).to(teacher_dtype), torch.randn(5, 24).to(teacher_dtype))


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize(("labels", "shown"), [([0, 5, -100, 1], 5), ([-1, 0, 0, 0], -1)])
def test_a_label_that_is_no_class_is_refused(impl: str, labels: list[int], shown: int) -> None:
    student, teacher = heads()
    match = rf"labels must be 0 to 4 or ignore_index=-100, got {shown}\. "
    with pytest.raises(ValueError, match=f"distillation_loss: {match}"):
        distillation_loss(student, teacher, torch.tensor(labels), alpha=0.5, impl=impl)
    with pytest.raises(ValueError, match=f"distillation_scores: {match}"):
        distillation_scores(student, teacher, torch.tensor(labels), impl=impl)
    cut = [Logits(torch.randn(4, 8), num_classes=5) for _ in range(2)]
    with pytest.raises(ValueError, match=match):
        distillation_loss(cut[0], cut[1], torch.tensor(labels), impl=impl)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("weights", [[1.0, -3.0, 0.5, 0.0], [1e-41, 2e-41, 0.0, 1e-41]])
def test_the_mean_divides_by_the_sum_of_the_weights_whatever_it_is(memory: str, weights: list[float]) -> None:
    student, teacher = heads()
    weight = torch.tensor(weights)
    rows = distillation_loss(student, teacher, reduction="none")
    mean = distillation_loss(student, teacher, row_weight=weight, memory=memory)
    torch.testing.assert_close(mean.double(), (rows.double() * weight).sum() / weight.double().sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_float64_teacher_of_a_float32_student(beta: float, memory: str) -> None:
    student, teacher = heads(torch.float32, torch.float64)

    def gradients(impl: str) -> list[Tensor]:
        leaf = LinearHead(student.hidden.clone().requires_grad_(), student.weight.clone().requires_grad_())
        loss = distillation_loss(leaf, teacher, beta=beta, memory=memory, impl=impl)
        return [loss, *torch.autograd.grad(loss, [leaf.hidden, leaf.weight])]

    for ours, expected in zip(gradients("eager"), gradients("reference"), strict=True):
        assert ours.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides(impl: str, memory: str, device: torch.device) -> None:
    """Columns of wider tensors, transposed and expanded ones: labels, temperatures and biases too."""
    wide = torch.randn(6, 40, device=device)
    student = LinearHead(
        torch.randn(16, 6, device=device).t(), wide[:5, ::2][:, :16], torch.randn(7, 1, device=device)[0].expand(5)
    )
    teacher = LinearHead(wide[:1, :24].expand(6, 24), torch.randn(24, 5, device=device).t(), wide[:5, 3])
    labels = torch.randint(0, 5, (6, 3), device=device)[:, 1]
    temperature = torch.rand(6, 2, device=device)[:, 0] + 0.5
    weight = torch.rand(1, device=device).expand(6)

    def results(student: LinearHead, teacher: LinearHead, *tensors: Tensor) -> list[Tensor]:
        labels, temperature, weight = tensors
        student = dataclasses.replace(student, hidden=student.hidden.detach().requires_grad_())
        loss = distillation_loss(
            student, teacher, labels, temperature=temperature, row_weight=weight, alpha=0.5, memory=memory, impl=impl
        )
        scores = distillation_scores(student, teacher, labels, temperature=temperature, impl=impl)
        return [loss, *torch.autograd.grad(loss, student.hidden), scores.forward_kl, scores.student_nll, scores.margin]

    packed = [
        LinearHead(*(x.contiguous() for x in (head.hidden, head.weight, head.bias))) for head in (student, teacher)
    ]
    got = results(student, teacher, labels, temperature, weight)
    expected = results(*packed, labels.contiguous(), temperature.contiguous(), weight.contiguous())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_row_at_all_in_lean_mode(impl: str, device: torch.device) -> None:
    hidden, weight = (torch.randn(n, 16, device=device, requires_grad=True) for n in (0, 5))
    teacher = LinearHead(torch.randn(0, 24, device=device), torch.randn(5, 24, device=device))
    rows = distillation_loss(LinearHead(hidden, weight), teacher, memory="lean", reduction="none", impl=impl)
    gradients = torch.autograd.grad(rows.sum(), (hidden, weight))
    assert rows.shape == (0,)
    assert gradients[0].shape == (0, 16)
    assert torch.equal(gradients[1], torch.zeros_like(weight))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about NaN in the interpreter
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scores_of_an_ignored_row_are_0_whatever_it_holds(impl: str, device: torch.device) -> None:
    student, teacher = (
        LinearHead(
            head.hidden.to(device).index_fill_(0, torch.tensor([1], device=device), torch.nan), head.weight.to(device)
        )
        for head in heads()
    )
    labels = torch.tensor([0, -100, 3, 4], device=device)
    for name, field in distillation_scores(student, teacher, labels, impl=impl)._asdict().items():
        assert field is None or field[1] == 0, name
        assert field is None or torch.isfinite(field).all(), name


def test_what_a_newcomer_gets_wrong_is_named() -> None:
    student, teacher = heads()
    with pytest.raises(TypeError, match=r"student.weight must be a tensor, got Linear. Use LinearHead\(hidden, linear"):
        distillation_loss(LinearHead(student.hidden, torch.nn.Linear(16, 5)), teacher)
    with pytest.raises(
        TypeError, match=r"student must be LinearHead .* got Tensor. Wrap it: LinearHead\(hidden, weight"
    ):
        distillation_loss(student.hidden, teacher)
    with pytest.raises(TypeError, match=r"teacher must be .* got Tensor. Wrap it: LinearHead\(hidden, weight"):
        distillation_loss(student, teacher.hidden)
    top = torch.randn(4, 5).log_softmax(-1).topk(2)  # values first, as torch.topk returns them
    with pytest.raises(TypeError, match=r"indices must be int64, got float32. Use TopKLogProbs\(indices, log_probs\)"):
        distillation_scores(student, TopKLogProbs(*top))
    for hidden in (None, [1.0], student.hidden.numpy()):
        with pytest.raises(TypeError, match=r"student.hidden must be a tensor, got \w+. Use torch.as_tensor"):
            distillation_loss(LinearHead(hidden, student.weight), teacher)
    for is_on in (False, True):
        with torch.autocast("cpu", enabled=is_on), pytest.raises(TypeError, match=r"student.bias must be a tensor"):
            distillation_loss(LinearHead(student.hidden, student.weight, [1.0]), teacher)
    with pytest.raises(TypeError, match=r"teacher.indices must be a tensor, got NoneType"):
        distillation_loss(student, TopKLogProbs(None, top[0]))
    for argument in ("temperature", "beta", "alpha", "label_smoothing", "normalizer"):
        for value in ("much", [0.5], torch.ones(2).numpy()):
            with pytest.raises(TypeError, match=rf"^distillation_loss: {argument} must be a number, got \w+"):
                distillation_loss(student, teacher, torch.zeros(4, dtype=torch.int64), **{argument: value})
    with pytest.raises(TypeError, match=r"ignore_index must be an int, got float"):
        distillation_loss(student, teacher, ignore_index=-1.5)
    with pytest.raises(TypeError, match=r"student.num_classes must be an int, got float"):
        distillation_loss(LinearHead(student.hidden, student.weight, num_classes=4.0), teacher)
    with pytest.raises(TypeError, match=r"student.softcap must be a number, got str"):
        distillation_loss(LinearHead(student.hidden, student.weight, softcap="30"), teacher)


def test_what_passed_once_is_not_remembered_of_anything_else() -> None:
    """Checks are skipped for what passed them: the same arguments but for one are checked, and cast, anew."""
    hidden, weight, labels = torch.randn(4, 8), torch.randn(6, 8), torch.randint(0, 6, (4,))
    head, teacher = LinearHead(hidden, weight), LinearHead(torch.randn(4, 3), torch.randn(6, 3))
    loss = distillation_loss(head, teacher, labels)
    assert torch.equal(distillation_loss(head, teacher, labels), loss)
    distillation_loss(LinearHead(hidden, weight, num_classes=6), teacher, labels)
    for wrong, error in (
        (lambda: distillation_loss(LinearHead(hidden, weight, num_classes=6.0), teacher, labels), TypeError),
        (lambda: distillation_loss(LinearHead(hidden[:3], weight), teacher, labels), ShapeError),
        (lambda: distillation_loss(LinearHead(hidden, weight, num_classes=7), teacher, labels), ShapeError),
        (lambda: distillation_loss(LinearHead(hidden.bfloat16(), weight), teacher, labels), TypeError),
        (lambda: distillation_loss(head, teacher, labels.int()), TypeError),
        (lambda: distillation_loss(head, teacher, labels + 6), ValueError),
        (lambda: distillation_loss(head, teacher, labels, temperature=-1.0), ValueError),
        (lambda: distillation_loss(LinearHead(hidden, weight, softcap=-1.0), teacher, labels), ValueError),
        (lambda: distillation_loss(head, teacher, labels, impl="fast"), ValueError),
    ):
        with pytest.raises(error):
            wrong()
    with torch.autocast("cpu", torch.bfloat16):
        low = distillation_loss(head, teacher, labels)
    assert torch.equal(
        low, distillation_loss(*(LinearHead(h.hidden.bfloat16(), h.weight.bfloat16()) for h in (head, teacher)))
    )
