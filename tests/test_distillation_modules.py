"""Modules beside the heads: each against its formula, with masks and gradients."""

import pytest
import torch

from fusedmm import LinearHead, distillation_loss
from fusedmm.nn.distillation import DistillationLoss, FeatureDistillation, MassMatching


def test_loss_module_is_the_function() -> None:
    student, teacher = (LinearHead(torch.randn(7, 8), torch.randn(9, 8)) for _ in range(2))
    labels, weight = torch.randint(0, 9, (7,)), torch.rand(7)
    module = DistillationLoss(beta=0.3, temperature=2.0, alpha=0.5, label_smoothing=0.1)
    expected = distillation_loss(
        student, teacher, labels, beta=0.3, temperature=2.0, alpha=0.5, label_smoothing=0.1, row_weight=weight
    )
    assert torch.equal(module(student, teacher, labels, row_weight=weight), expected)
    assert "beta=0.3" in repr(module)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_feature_distillation(kind: str) -> None:
    module = FeatureDistillation(6, 10, kind)
    student, teacher = torch.randn(3, 5, 6), torch.randn(3, 5, 10, requires_grad=True)
    mask = torch.rand(3, 5) < 0.5
    projected = (student @ module.projection.weight.T)[mask]
    t = teacher[mask]
    by_hand = (
        (projected - t).square().mean(-1)
        if kind == "mse"
        else 1 - (projected * t).sum(-1) / (projected.norm(dim=-1) * t.norm(dim=-1))
    )
    poisoned = teacher.detach().masked_fill(~mask[..., None], torch.inf)  # what the mask hides does not reach the loss
    loss = module(student, poisoned, mask)
    torch.testing.assert_close(loss, by_hand.mean().detach())
    loss.backward()
    assert torch.isfinite(module.projection.weight.grad).all()
    module(student, teacher).backward()
    assert teacher.grad is None
    assert module(student, teacher, torch.zeros(3, 5, dtype=torch.bool)).item() == 0
    assert module.projection(torch.randn(6)).dtype == torch.float32


def test_mass_matching_is_kl_between_mean_masses() -> None:
    student, teacher = torch.rand(9, 4, 3).softmax(-1), torch.rand(9, 2, 3).softmax(-1)
    teacher[0, :, 1] = 0  # a modality that the teacher does not look at
    student[1] = 0  # a query that sees nothing
    student.requires_grad_()
    s, t = student.detach().mean(1), teacher.mean(1) / teacher.mean(1).sum(-1, keepdim=True)
    rows = torch.where(t > 0, t * (t / s).log(), 0.0).sum(-1)
    keep = torch.tensor([True, False, True] * 3)
    loss = MassMatching()(student, teacher, keep)
    torch.testing.assert_close(loss, rows[keep].mean().detach())
    loss.backward()
    assert torch.isfinite(student.grad).all()
    assert MassMatching()(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_modules_tell_mistakes() -> None:
    with pytest.raises(ValueError, match="FeatureDistillation: kind must be one of"):
        FeatureDistillation(3, 3, "l1")
    with pytest.raises(ValueError, match="FeatureDistillation: teacher must have the leading dimensions"):
        FeatureDistillation(3, 3)(torch.randn(2, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match="FeatureDistillation: mask must have shape"):
        FeatureDistillation(3, 3)(torch.randn(2, 3), torch.randn(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="FeatureDistillation: teacher must have shape"):
        FeatureDistillation(3, 5)(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(TypeError, match="FeatureDistillation: teacher must be a tensor, got list"):
        FeatureDistillation(3, 3)(torch.randn(2, 3), [1.0])
    with pytest.raises(TypeError, match="MassMatching: teacher_mass must be a tensor, got NoneType"):
        MassMatching()(torch.rand(2, 1, 3), None)
    with pytest.raises(ValueError, match="MassMatching: teacher_mass has modality"):
        MassMatching()(torch.rand(2, 1, 3), torch.rand(2, 1, 4))
