"""Distillation scores, wave by wave, from PyTorch's own operators."""

import torch
from torch import Tensor

from fusedmm.eager.distillation import Objective, divergence, tempered, with_bucket
from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import compute_dtype, convert_small, pair_logits, wave_logits, waves
from fusedmm.heads import Head, LinearHead, Teacher, TopKLogProbs

PAIR_FIELDS = (
    "forward_kl",
    "reverse_kl",
    "hellinger",
    "student_entropy",
    "teacher_entropy",
    "student_confidence",
    "teacher_confidence",
    "agreement",
    "grad_norm",
)
LABEL_FIELDS = ("student_nll", "teacher_nll", "excess_loss", "el2n", "margin")
SECOND_PASS_FIELDS = ("divergence", "total_variation")
FIELDS = PAIR_FIELDS + LABEL_FIELDS + SECOND_PASS_FIELDS


def scores(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    second_pass: bool,
) -> Tensor:
    """All fields [len(FIELDS), N] in the compute dtype; those that do not apply are 0.

    Args:
        student, teacher, labels: as in `fusedmm.distillation_scores`.
        temperature: [N] in the compute dtype, or None for the objective's.
        objective: the shard, the temperature, beta and ignore_index.
        second_pass: whether `SECOND_PASS_FIELDS` are wanted.

    Cost: ``2 N V (Ds + Dt)`` FLOPs; a wave's logits, a handful of times.
    """
    source = student.hidden if isinstance(student, LinearHead) else student.values
    student, count = convert_small(student), objective.shard.count
    teacher = teacher if isinstance(teacher, TopKLogProbs) else convert_small(teacher)
    result = source.new_zeros((len(FIELDS), source.shape[0]), dtype=compute_dtype(source))
    for rows in waves(source.shape[0], count):
        wave_temperature = objective.temperature if temperature is None else temperature[rows]
        fields: dict[str, Tensor]
        if isinstance(teacher, TopKLogProbs):
            student_logits, teacher_logits = wave_logits(student, rows, count), None
            fields = _top_fields(
                student_logits, teacher.indices[rows], teacher.log_probs[rows], wave_temperature, objective, second_pass
            )
        else:
            student_logits, teacher_logits = pair_logits(student, teacher, rows, count)
            fields = _pair_fields(student_logits, teacher_logits, wave_temperature, objective, second_pass)
        if isinstance(student, LinearHead):
            fields["grad_norm"] *= student.hidden[rows].to(result.dtype).norm(dim=-1) / wave_temperature
        if labels is not None:
            valid = labels[rows] != objective.ignore_index
            fields.update(_label_fields(student_logits, teacher_logits, labels[rows], valid, objective.shard))
        for name, field in fields.items():
            result[FIELDS.index(name), rows] = field
    return result if labels is None else result.masked_fill_(labels == objective.ignore_index, 0.0)


def _pair_fields(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor, objective: Objective, second_pass: bool
) -> dict[str, Tensor]:
    shard = objective.shard
    student_log = shard.log_softmax(tempered(student_logits, temperature))
    teacher_log = shard.log_softmax(tempered(teacher_logits, temperature))
    p, t = student_log.exp(), teacher_log.exp()
    ratio = teacher_log - student_log
    difference = p - t
    sums = shard.sum(
        torch.stack(
            [
                (t * ratio).sum(-1),
                -(p * ratio).sum(-1),
                0.5
                * ((0.5 * student_log).exp() - (0.5 * teacher_log).exp())
                .square()
                .sum(-1),  # 1 - sum sqrt(p t), without cancellation
                -(p * student_log).sum(-1),
                -(t * teacher_log).sum(-1),
                difference.square().sum(-1),
                0.5 * difference.abs().sum(-1),
            ]
        )
    )
    confidence = shard.max(torch.stack([p.amax(-1), t.amax(-1)]))
    agreement = shard.argmax(student_logits) == shard.argmax(teacher_logits)
    fields = {
        "forward_kl": sums[0],
        "reverse_kl": sums[1],
        "hellinger": sums[2],
        "student_entropy": sums[3],
        "teacher_entropy": sums[4],
        "student_confidence": confidence[0],
        "teacher_confidence": confidence[1],
        "agreement": agreement.to(p.dtype),
        "grad_norm": sums[5].sqrt(),
    }
    if second_pass:
        fields["divergence"] = divergence(student_log, teacher_log, objective.beta, shard, None)[0]
        fields["total_variation"] = sums[6]
    return fields


def _top_fields(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    temperature: float | Tensor,
    objective: Objective,
    second_pass: bool,
) -> dict[str, Tensor]:
    """Comparisons over the top-k classes and the bucket; what concerns the student alone over all classes."""
    whole, top = Shard(student_logits.shape[1], 0, student_logits.shape[1]), indices.shape[1]
    full = torch.log_softmax(tempered(student_logits, temperature), -1)
    student_log, teacher_log, share = with_bucket(student_logits, indices, log_probs, temperature)
    p, t = student_log.exp(), teacher_log.exp()
    difference = p - t
    spread = (
        share.exp().square().sum(-1) if top < share.shape[1] else 0.0
    )  # the bucket's gradient lies on its classes by their shares
    best = log_probs.argmax(-1)
    fields = {
        "forward_kl": divergence(student_log, teacher_log, 0.0, whole, None)[0],
        "reverse_kl": divergence(student_log, teacher_log, 1.0, whole, None)[0],
        "hellinger": 0.5 * ((0.5 * student_log).exp() - (0.5 * teacher_log).exp()).square().sum(-1),
        "student_entropy": -(full.exp() * full).sum(-1),
        "teacher_entropy": -(t * teacher_log).sum(-1),
        "student_confidence": full.amax(-1).exp(),
        "teacher_confidence": t[:, :top].amax(-1),
        "agreement": (full.argmax(-1) == indices.gather(1, best[:, None])[:, 0]).to(p.dtype),
        "grad_norm": (difference[:, :top].square().sum(-1) + difference[:, top:].square().sum(-1) * spread).sqrt(),
    }
    if second_pass:
        fields["divergence"] = divergence(student_log, teacher_log, objective.beta, whole, None)[0]
        fields["total_variation"] = 0.5 * difference.abs().sum(-1)
    return fields


def _label_fields(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, valid: Tensor, shard: Shard
) -> dict[str, Tensor]:
    """What needs the labels, all at temperature 1; el2n from the other classes' probabilities, whose sum is 1 - p_y
    without cancellation.
    """
    target, mine = shard.local_labels(labels, valid)
    at = target[:, None]
    student_log = shard.log_softmax(student_logits)
    p = student_log.exp()
    label_share = torch.where(mine, p.gather(1, at)[:, 0], 0.0)
    p.scatter_add_(1, at, -label_share[:, None])
    parts = [
        p.sum(-1),
        p.square_().sum(-1),
        -torch.where(mine, student_log.gather(1, at)[:, 0], 0.0),
        torch.where(mine, student_logits.gather(1, at)[:, 0], 0.0),
    ]
    if teacher_logits is not None:
        parts.append(-torch.where(mine, shard.log_softmax(teacher_logits).gather(1, at)[:, 0], 0.0))
    others, others_square, student_nll, label_logit, *rest = shard.sum(torch.stack(parts))
    runner_up = student_logits.scatter(1, at, torch.where(mine[:, None], -torch.inf, student_logits.gather(1, at)))
    fields = {
        "student_nll": student_nll,
        "el2n": (others_square + others.square()).sqrt(),
        "margin": label_logit - shard.max(runner_up.amax(-1)),
    }
    if rest:
        fields["teacher_nll"] = rest[0]
        fields["excess_loss"] = student_nll - rest[0]
    return fields
