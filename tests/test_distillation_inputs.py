"""Distillation at the edge of what it accepts: labels that are no class, weights of any sign, heads of two dtypes."""

import pytest
import torch
from torch import Tensor

from fusedmm import LinearHead, Logits, distillation_loss, distillation_scores


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
