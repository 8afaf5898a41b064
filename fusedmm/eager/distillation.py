"""Distillation row by row from PyTorch's own operators: the CPU path, and the path of top-k teachers.

Logits exist for one wave of rows at a time. Differences of log-probabilities are taken before they are weighted (``t *
(log t - log p)``, not ``sum t log t - sum t log p``), so that a student close to its teacher loses nothing to
cancellation, and identical heads give exactly 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import (
    FINITE_MINIMUM,
    HeadGradient,
    compute_dtype,
    convert_small,
    pair_logits,
    wave_logits,
    waves,
)
from fusedmm.heads import Head, LinearHead, Teacher, TopKLogProbs

EXP_LIMIT = 60.0  # of a ratio in an exponential: its probability no longer counts long before, and nothing overflows


@dataclass(frozen=True)
class Objective:
    """What a loss is made of, apart from tensors.

    Attributes:
        shard: this rank's classes.
        beta, alpha, label_smoothing, ignore_index: as in `fusedmm.distillation_loss`.
        temperature: of every row, where no [N] tensor is given.
    """

    shard: Shard
    beta: float = 0.0
    alpha: float = 1.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100


def loss(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    grad_rows: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Loss of every row, and with `grad_rows` the gradient of ``(grad_rows * loss).sum()`` in the student's input,
    weight and bias.

    Args:
        student, teacher, labels: as in `fusedmm.distillation_loss`.
        temperature: [N] in the compute dtype, or None for the objective's.
        objective: the rest.
        grad_rows: [N] upstream gradient of every row, None for no gradient.
        needs: which of input (hidden or logits), weight and bias want one.

    Returns:
        [N] loss in the compute dtype, 0 where a row is ignored, and three gradients, empty where not needed.

    Cost: with hidden sizes Ds and Dt ``2 N V (Ds + Dt)`` FLOPs for the logits and ``2 N V Ds`` for each of the two
        gradients; the wave's logits, a handful of times.
    """
    source = student.hidden if isinstance(student, LinearHead) else student.values
    weight, bias = (student.weight, student.bias) if isinstance(student, LinearHead) else (None, None)
    student, count = convert_small(student), objective.shard.count
    teacher = teacher if isinstance(teacher, TopKLogProbs) else convert_small(teacher)
    result = source.new_empty((source.shape[0],), dtype=compute_dtype(source))
    gradient = HeadGradient(student, count, needs)
    for rows in waves(source.shape[0], count):
        if isinstance(teacher, TopKLogProbs) or objective.alpha == 0.0:
            student_logits, teacher_logits = wave_logits(student, rows, count), None
        else:
            student_logits, teacher_logits = pair_logits(student, teacher, rows, count)
        top = (teacher.indices[rows], teacher.log_probs[rows]) if isinstance(teacher, TopKLogProbs) else None
        result[rows], grad_logits = wave_loss(
            student_logits,
            teacher_logits,
            top,
            None if labels is None else labels[rows],
            objective.temperature if temperature is None else temperature[rows],
            objective,
            None if grad_rows is None else grad_rows[rows],
        )
        if grad_logits is not None:
            gradient.add(rows, grad_logits, student_logits)
    grad_input, grad_weight, grad_bias = gradient.result(weight, bias)
    if needs[0] and isinstance(student, LinearHead):
        objective.shard.sum(grad_input)
    return result, (grad_input, grad_weight, grad_bias)


def wave_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    top: tuple[Tensor, Tensor] | None,
    labels: Tensor | None,
    temperature: float | Tensor,
    objective: Objective,
    grad_rows: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Loss [rows] of a wave, and with `grad_rows` its gradient in the student's logits [rows, V]."""
    alpha, shard = objective.alpha, objective.shard
    valid = None if labels is None else labels != objective.ignore_index
    if grad_rows is not None and valid is not None:
        grad_rows = torch.where(valid, grad_rows, 0.0)
    rows, grad_logits, student_log = None, None, None
    if alpha != 0.0:
        if top is not None:
            rows, grad_logits = _top_divergence(student_logits, *top, temperature, objective, grad_rows)
        else:
            assert teacher_logits is not None
            student_log = shard.log_softmax(tempered(student_logits, temperature))
            teacher_log = shard.log_softmax(tempered(teacher_logits, temperature))
            rows, grad_logits = divergence(
                student_log,
                teacher_log,
                objective.beta,
                shard,
                None if grad_rows is None else grad_rows * (alpha * temperature),
            )
        rows = rows * (alpha * temperature * temperature)
    if alpha != 1.0:
        assert labels is not None
        assert valid is not None
        if student_log is None or not (isinstance(temperature, float) and temperature == 1.0):
            student_log = shard.log_softmax(student_logits)
        cross_entropy, grad_cross = _cross_entropy(student_log, labels, valid, objective, grad_rows)
        cross_entropy = (1 - alpha) * cross_entropy
        rows = cross_entropy if rows is None else rows + cross_entropy
        grad_logits = grad_cross if grad_logits is None or grad_cross is None else grad_logits.add_(grad_cross)
    assert rows is not None  # alpha is not 0 or not 1
    return rows if valid is None else torch.where(valid, rows, 0.0), grad_logits


def _balance(grad: Tensor, dominant: Tensor, shard: Shard) -> Tensor:
    """Make each row of `grad` sum to 0, as a gradient of logits does, at the class with a probability above one half.

    Where p rounds to 1 that entry is the difference of two numbers near 1, and all is lost; the others are exact.
    """
    residual = shard.sum(grad.sum(-1, keepdim=True))
    return grad.sub_(dominant * residual)


def tempered(z: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits divided by the temperature of their row."""
    if isinstance(temperature, Tensor):
        return z / temperature[:, None]
    return z if temperature == 1.0 else z / temperature


def divergence(
    student_log: Tensor, teacher_log: Tensor, beta: float, shard: Shard, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Generalised Jensen-Shannon divergence of log-probabilities [rows, V], and `scale` [rows] times its gradient in
    the student's (tempered) logits.

    With p and t the probabilities and mix the mixture::

        beta = 0   sum t (log t - log p)                            p - t
        beta = 1   sum p (log p - log t) = K                        p (log p - log t - K)
        between    beta KL(t || mix) + (1 - beta) KL(p || mix)      (1 - beta) p (log p - log mix - KL(p || mix))
    """
    p = student_log.exp()
    if beta == 0.0:
        t = teacher_log.exp()
        rows = shard.sum((t * (teacher_log - student_log)).sum(-1))
        if scale is None:
            return rows, None
        return rows, _balance(torch.sub(p, t, out=t).mul_(scale[:, None]), p > 0.5, shard)
    if beta == 1.0:
        ratio = student_log - teacher_log
        rows = shard.sum((p * ratio).sum(-1))
        if scale is None:
            return rows, None
        return rows, _balance(ratio.sub_(rows[:, None]).mul_(p).mul_(scale[:, None]), p > 0.5, shard)
    ratio = teacher_log - student_log
    student_ratio, at_top = _mixture_ratio(student_log, ratio, beta, shard)
    teacher_ratio = torch.log1p(ratio.neg_().clamp_(max=EXP_LIMIT).expm1_().mul_(1 - beta)).neg_()  # log(t / mix)
    parts = shard.sum(torch.stack([(p * student_ratio).sum(-1), (teacher_log.exp() * teacher_ratio).sum(-1)]))
    rows = (1 - beta) * (parts[0] + at_top) + beta * parts[1]
    return rows, None if scale is None else student_ratio.sub_(parts[0][:, None]).mul_(p).mul_(
        (scale * (1 - beta))[:, None]
    )


def _mixture_ratio(student_log: Tensor, ratio: Tensor, beta: float, shard: Shard) -> tuple[Tensor, Tensor]:
    """log(p / mix) minus its value at the student's most likely class [rows, V], and that value [rows], from ``ratio =
    log t - log p``.

    With ``q = beta / (1 - beta) * t / p`` it is ``log((1 + q_top) / (1 + q))``. The difference is all that the gradient
    holds, and its size is that of the gap between heads that agree as well as that of the overlap of heads that do not,
    so neither may be subtracted from a constant.
    """
    top = shard.argmax(student_log)
    local, mine = shard.local_labels(top, torch.ones_like(top, dtype=torch.bool))
    ratio_top = shard.sum(torch.where(mine, ratio.gather(1, local[:, None])[:, 0], 0.0))[:, None]
    odds = beta / (1 - beta)
    q, q_top = ratio.clamp(max=EXP_LIMIT).exp_().mul_(odds), ratio_top.clamp(max=EXP_LIMIT).exp().mul_(odds)
    distance = ratio - ratio_top
    near = torch.log1p(distance.clamp(-1.0, 1.0).expm1_().mul_(-q_top).div_(1 + q))
    far = torch.log1p(q_top) - torch.log1p(q)
    at_top = -math.log1p(-beta) - torch.log1p(q_top[:, 0])
    return torch.where(distance.abs_() < 1.0, near, far), at_top


def with_bucket(
    student_logits: Tensor, indices: Tensor, log_probs: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the top-k classes and of the rest as one bucket: student and teacher [rows, K+1], and each
    class's log share of the rest [rows, V].

    The student's rest is a log-sum-exp over the other classes, not 1 minus the sum, which would cancel for a confident
    student. With K = V there is no bucket.
    """
    z = tempered(student_logits, temperature)
    top, log_probs = z.gather(1, indices), log_probs.to(z.dtype).clamp_min(FINITE_MINIMUM)
    others = z.scatter(1, indices, FINITE_MINIMUM)
    if indices.shape[1] == z.shape[1]:
        return torch.log_softmax(top, -1), log_probs, others
    rest = others.logsumexp(-1, keepdim=True)
    teacher_rest = (
        torch.log1p(-log_probs.double().exp().sum(-1, keepdim=True).clamp(max=1.0))
        .to(z.dtype)
        .clamp_min(FINITE_MINIMUM)
    )
    return (
        torch.log_softmax(torch.cat([top, rest], -1), -1),
        torch.cat([log_probs, teacher_rest], -1),
        others.sub_(rest),
    )


def _top_divergence(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    temperature: float | Tensor,
    objective: Objective,
    grad_rows: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`divergence` against a top-k teacher: the gradient of the bucket is spread over its classes by their shares."""
    student_log, teacher_log, share = with_bucket(student_logits, indices, log_probs, temperature)
    scale = None if grad_rows is None else grad_rows * (objective.alpha * temperature)
    rows, coarse = divergence(student_log, teacher_log, objective.beta, objective.shard, scale)
    if coarse is None:
        return rows, None
    top = indices.shape[1]
    if top == share.shape[1]:
        return rows, torch.empty_like(share).scatter_(1, indices, coarse)
    return rows, share.exp_().mul_(coarse[:, top:]).scatter_(1, indices, coarse[:, :top])


def _cross_entropy(
    log_probs: Tensor, labels: Tensor, valid: Tensor, objective: Objective, grad_rows: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy with label smoothing [rows] of log-probabilities, and ``(1 - alpha) * grad_rows`` times its
    gradient in the logits.
    """
    shard, smoothing = objective.shard, objective.label_smoothing
    target, mine = shard.local_labels(labels, valid)
    at_label = torch.where(mine, log_probs.gather(1, target[:, None])[:, 0], 0.0)
    rows = -(1 - smoothing) * at_label
    if smoothing:
        rows -= (smoothing / shard.total) * log_probs.sum(-1)
    rows = shard.sum(rows)
    if grad_rows is None:
        return rows, None
    scale = (1 - objective.alpha) * grad_rows
    grad = log_probs.exp()
    dominant = grad > 0.5
    if smoothing:
        grad -= smoothing / shard.total
    grad.mul_(scale[:, None])
    grad.scatter_add_(1, target[:, None], torch.where(mine, -(1 - smoothing) * scale, 0.0)[:, None])
    return rows, _balance(grad, dominant, shard)
