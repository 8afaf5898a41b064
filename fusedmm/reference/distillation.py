"""The definition of distillation scores and losses: float64, differentiable by autograd, the whole logits in memory.

Nothing here is fast; every other implementation is compared to it. Formulas as in `fusedmm.distillation_scores` and
`fusedmm.distillation_loss`.
"""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fusedmm.heads import LinearHead, Logits, Teacher, TopKLogProbs

_Teacher = TypeVar("_Teacher", LinearHead | Logits, Teacher)
FINITE_MINIMUM = -1e30  # stands for -inf, so that a forbidden class gives 0 * 1e30 and not 0 * inf


def logits(head: LinearHead | Logits, num_classes: int) -> Tensor:
    """[N, V] float64 logits of the first `num_classes` classes."""
    if isinstance(head, LinearHead):
        z = head.hidden.double() @ head.weight[:num_classes].double().T
        if head.bias is not None:
            z = z + head.bias[:num_classes].double()
    else:
        z = head.values[:, :num_classes].double()
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z.clamp_min(FINITE_MINIMUM)


def without_ignored(head: _Teacher, labels: Tensor | None, ignore_index: int) -> _Teacher:
    """The head with 0 in place of what ignored rows hold, which may be NaN."""
    if labels is None:
        return head
    ignored = (labels == ignore_index)[:, None]
    if isinstance(head, LinearHead):
        return replace(head, hidden=head.hidden.masked_fill(ignored, 0.0))
    if isinstance(head, Logits):
        return replace(head, values=head.values.masked_fill(ignored, 0.0))
    return replace(head, log_probs=head.log_probs.masked_fill(ignored, 0.0))


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """[N] generalised Jensen-Shannon divergence of log-probabilities [N, V]: KL(t || p) at beta 0, KL(p || t) at 1, in
    between against their mixture.
    """
    p, t = student.exp(), teacher.exp()
    if beta == 0.0:
        return (t * (teacher - student)).sum(-1)
    if beta == 1.0:
        return (p * (student - teacher)).sum(-1)
    mixture = (beta * t + (1 - beta) * p).clamp_min(torch.finfo(p.dtype).tiny).log()
    return beta * (t * (teacher - mixture)).sum(-1) + (1 - beta) * (p * (student - mixture)).sum(-1)


def log_probs(
    student: LinearHead | Logits, teacher: Teacher, temperature: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher over what both can tell apart: [N, V] classes, or [N, K+1] with the
    bucket of a top-k teacher last. Rounded log-probabilities whose sum is not 1 with that of the bucket are normalised.
    """
    full = torch.log_softmax(logits(student, num_classes) / temperature[:, None], -1)
    if not isinstance(teacher, TopKLogProbs):
        return full, torch.log_softmax(logits(teacher, num_classes) / temperature[:, None], -1)
    top = teacher.log_probs.double().clamp_min(FINITE_MINIMUM)
    if top.shape[1] == num_classes:
        return full.gather(1, teacher.indices), top.log_softmax(-1)
    rest = torch.ones_like(full, dtype=torch.bool).scatter(1, teacher.indices, False)
    others = full.masked_fill(~rest, -torch.inf)
    largest = others.detach().amax(-1, keepdim=True)  # may be -1e30, beside which the logarithm of a sum is lost
    student_rest = largest + (others - largest).logsumexp(-1, keepdim=True)
    teacher_rest = torch.log1p(-top.exp().sum(-1, keepdim=True).clamp_max(1.0))
    teacher_log = torch.cat([top, teacher_rest.clamp_min(FINITE_MINIMUM)], -1).log_softmax(-1)
    return torch.cat([full.gather(1, teacher.indices), student_rest], -1), teacher_log


def loss(
    student: LinearHead | Logits,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor,
    *,
    num_classes: int,
    beta: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """[N] float64 loss of every row, 0 where it is ignored; differentiable in every tensor of the heads."""
    student, teacher = without_ignored(student, labels, ignore_index), without_ignored(teacher, labels, ignore_index)
    rows = torch.zeros_like(temperature)
    if alpha != 0.0:
        rows = alpha * temperature.square() * divergence(*log_probs(student, teacher, temperature, num_classes), beta)
    if alpha != 1.0:
        assert labels is not None
        z = logits(student, num_classes)
        cross_entropy = torch.nn.functional.cross_entropy(
            z, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )
        rows = rows + (1 - alpha) * cross_entropy
    return rows if labels is None else rows.masked_fill(labels == ignore_index, 0.0)


def scores(
    student: LinearHead | Logits,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor,
    *,
    num_classes: int,
    beta: float | None,
    ignore_index: int,
) -> dict[str, Tensor]:
    """Fields of `DistillationScores` by name, [N] float64; those that do not apply are left out."""
    student, teacher = without_ignored(student, labels, ignore_index), without_ignored(teacher, labels, ignore_index)
    z = logits(student, num_classes)
    full = torch.log_softmax(z / temperature[:, None], -1)
    student_log, teacher_log = log_probs(student, teacher, temperature, num_classes)
    p, t = student_log.exp(), teacher_log.exp()
    teacher_top = t[:, : teacher.indices.shape[1]] if isinstance(teacher, TopKLogProbs) else t
    teacher_class = teacher_top.argmax(-1)
    if isinstance(teacher, TopKLogProbs):
        teacher_class = teacher.indices.gather(1, teacher_class[:, None])[:, 0]
    if isinstance(teacher, TopKLogProbs) and t.shape[1] > teacher.indices.shape[1]:
        share = full.exp().scatter(1, teacher.indices, 0.0)
        share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
        logits_gradient = ((p - t)[:, :-1].square().sum(-1) + (p - t)[:, -1].square() * share.square().sum(-1)).sqrt()
    else:
        logits_gradient = (p - t).norm(dim=-1)
    if isinstance(student, LinearHead):
        logits_gradient = logits_gradient * student.hidden.double().norm(dim=-1) / temperature
    fields = {
        "forward_kl": divergence(student_log, teacher_log, 0.0),
        "reverse_kl": divergence(student_log, teacher_log, 1.0),
        "hellinger": 1 - ((student_log + teacher_log) / 2).exp().sum(-1),
        "student_entropy": -(full.exp() * full).sum(-1),
        "teacher_entropy": -(t * teacher_log).sum(-1),
        "student_confidence": full.exp().amax(-1),
        "teacher_confidence": teacher_top.amax(-1),
        "agreement": (full.argmax(-1) == teacher_class).double(),
        "grad_norm": logits_gradient,
    }
    if beta is not None:
        fields["divergence"] = divergence(student_log, teacher_log, beta)
        if 0.0 < beta < 1.0:
            fields["total_variation"] = (p - t).abs().sum(-1) / 2
    if labels is None:
        return fields
    ignored = labels == ignore_index
    target = labels.masked_fill(ignored, 0)[:, None]
    unit = torch.log_softmax(z, -1)
    others = unit.exp().scatter(1, target, 0.0)
    fields["student_nll"] = -unit.gather(1, target)[:, 0]
    fields["el2n"] = (others.square().sum(-1) + others.sum(-1).square()).sqrt()
    fields["margin"] = z.gather(1, target)[:, 0] - z.scatter(1, target, -torch.inf).amax(-1)
    if not isinstance(teacher, TopKLogProbs):
        fields["teacher_nll"] = -torch.log_softmax(logits(teacher, num_classes), -1).gather(1, target)[:, 0]
        fields["excess_loss"] = fields["student_nll"] - fields["teacher_nll"]
    return {name: field.masked_fill(ignored, 0.0) for name, field in fields.items()}
