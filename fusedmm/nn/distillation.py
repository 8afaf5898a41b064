"""Distillation as modules: the loss of two heads, and what lies before the heads (features, modality mass)."""

import torch
from torch import Tensor, nn

from fusedmm.heads import Head, Teacher
from fusedmm.ops.distillation import distillation_loss
from fusedmm.shapes import ShapeError, check_dtype, check_shapes, check_tensor

KINDS = ("mse", "cosine")
MIN_MASS = 1e-6  # a student mass below counts as this, so that a modality it dropped costs much, not infinity


class DistillationLoss(nn.Module):
    """`fusedmm.distillation_loss` with its settings; no parameters.

    Args:
        beta, temperature, alpha, label_smoothing, ignore_index, reduction, memory, impl: as in
            `fusedmm.distillation_loss`.
    """

    def __init__(
        self,
        *,
        beta: float = 0.0,
        temperature: float = 1.0,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        memory: str = "fast",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.beta, self.temperature, self.alpha, self.label_smoothing = beta, temperature, alpha, label_smoothing
        self.ignore_index, self.reduction, self.memory, self.impl = ignore_index, reduction, memory, impl

    def forward(
        self,
        student: Head,
        teacher: Teacher,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss, see `fusedmm.distillation_loss`."""
        return distillation_loss(
            student,
            teacher,
            labels,
            beta=self.beta,
            temperature=self.temperature,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            row_weight=row_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
            memory=self.memory,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Settings that change the value."""
        names = ("beta", "temperature", "alpha", "label_smoothing")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class FeatureDistillation(nn.Module):
    """Distance of projected student states from teacher states, averaged over the tokens of a mask.

    Per token, with s the projected student's and t the teacher's state, in float32::

        mse      (s - t).square().mean()
        cosine   1 - cosine_similarity(s, t)

    Args:
        student_dim: size of the student's states.
        teacher_dim: size of the teacher's states; the projection is student_dim x teacher_dim without bias.
        kind: "mse" or "cosine".

    Source: Romero et al. 2015 (FitNets), eq. 3.
    """

    def __init__(self, student_dim: int, teacher_dim: int, kind: str = "mse") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"FeatureDistillation: kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
        self.kind = kind
        self.projection = nn.Linear(student_dim, teacher_dim, bias=False)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean distance; 0 where no token counts.

        Args:
            student: [..., student_dim].
            teacher: [..., teacher_dim]; gets no gradient.
            mask: [...] bool, the tokens that count, or None for all.
        """
        _check_leading("FeatureDistillation", student, teacher, mask)
        teacher = teacher.detach()
        if mask is not None:  # whatever stands in a hidden token, its gradient is 0
            student, teacher = (torch.where(mask[..., None], states, 0.0) for states in (student, teacher))
        s, t = self.projection(student).float(), teacher.float()
        check_shapes("FeatureDistillation", {"teacher": (t.flatten(0, -2), ("token", s.shape[-1]))})
        distance = (
            (s - t).square().mean(-1) if self.kind == "mse" else 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1)
        )
        return _masked_mean(distance, mask)


class MassMatching(nn.Module):
    """KL from the teacher's to the student's modality mass, per query: trains where a student looks. No parameters.

    ``(t * (t.log() - s.log())).sum(-1)`` with the masses averaged over heads, of which student and teacher may have
    different numbers, and divided by their sum. A query that sees nothing (mass 0) costs nothing.
    """

    def forward(self, student_mass: Tensor, teacher_mass: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean KL over the queries of the mask, natural logarithm.

        Args:
            student_mass: [total_q, Hs, M] float32, `AttentionOutput.mass` of the student.
            teacher_mass: [total_q, Ht, M]; gets no gradient.
            mask: [total_q] bool, the queries that count, or None for all.
        """
        check_tensor("MassMatching", "student_mass", student_mass)
        check_tensor("MassMatching", "teacher_mass", teacher_mass)
        check_shapes(
            "MassMatching",
            {
                "student_mass": (student_mass, ("query", "student_head", "modality")),
                "teacher_mass": (teacher_mass, ("query", "teacher_head", "modality")),
                "mask": (mask, ("query",)),
            },
        )
        s, t = student_mass.float().mean(1), teacher_mass.detach().float().mean(1)
        s_sum, t_sum = s.sum(-1, keepdim=True), t.sum(-1, keepdim=True)
        log_s = (s / s_sum.clamp_min(MIN_MASS)).clamp_min(MIN_MASS).log()
        t = t / t_sum.clamp_min(MIN_MASS)
        divergence = (torch.xlogy(t, t) - t * log_s).sum(-1)
        seen = (s_sum[:, 0] > 0) & (t_sum[:, 0] > 0)
        return _masked_mean(divergence, seen if mask is None else seen & mask)


def _check_leading(op: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    check_tensor(op, "student", student)
    check_tensor(op, "teacher", teacher)
    leading = student.shape[:-1]
    if teacher.shape[:-1] != leading:
        raise ShapeError(
            f"{op}: teacher must have the leading dimensions of student, {list(leading)}, "
            f"got {list(teacher.shape[:-1])}."
        )
    if mask is not None:
        if mask.shape != leading:
            raise ShapeError(f"{op}: mask must have shape {list(leading)}, got {list(mask.shape)}.")
        check_dtype(op, "mask", mask, (torch.bool,), ". Use mask.bool().")


def _masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.sum() / max(x.numel(), 1)
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp_min(1)
