"""Distillation scores, wave by wave, from PyTorch's own operators.

A wave is read about two dozen times, by operators that write to memory the waves share; one exponential a head gives
the roots of the probabilities (for the Hellinger distance), their squares the probabilities.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fusedmm.eager.distillation import LN_2, LOG2_E, Objective, divergence, untempered, with_bucket
from fusedmm.eager.shard import Shard, Softmax
from fusedmm.eager.waves import Scratch, counted_rows, pair_logits, real_classes, wave_logits, waves
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
    """All fields [len(FIELDS), N] in the compute dtype; those that do not apply are 0, as are ignored rows.

    Args:
        student, teacher, labels: as in `fusedmm.distillation_scores`.
        temperature: [N] in the compute dtype, or None for the objective's.
        objective: the shard, the temperature, beta and ignore_index.
        second_pass: whether `SECOND_PASS_FIELDS` are wanted.

    Cost: ``2 N V (Ds + Dt)`` FLOPs; a wave's logits seven times. Ignored rows cost nothing.
    """
    source, shard = student.source, objective.shard
    student = real_classes(student, shard.count)
    teacher = teacher if isinstance(teacher, TopKLogProbs) else real_classes(teacher, shard.count)
    counted = counted_rows(labels, objective.ignore_index)
    num_rows = source.shape[0] if counted is None else counted.shape[0]
    scratch = [Scratch(source, num_rows, shard.count) for _ in range(7)]
    result = torch.zeros((len(FIELDS), source.shape[0]), dtype=scratch[0].flat.dtype, device=source.device)
    absent = result.new_zeros(())
    for rows in waves(source.shape[0], shard.count, counted):
        wave_temperature = objective.temperature if temperature is None else temperature[rows, None]
        scale = LOG2_E / wave_temperature
        z, p, root_p, u, t, root_t, spare = (each.take(rows) for each in scratch)
        target: Softmax | TopKLogProbs
        if isinstance(teacher, TopKLogProbs):
            own = _softmax(wave_logits(student, rows, scale, z), root_p, p, shard)
            target = TopKLogProbs(teacher.indices[rows], teacher.log_probs[rows])
        else:
            z, u = pair_logits(student, teacher, rows, scale, (z, u))
            own, target = _softmax(z, root_p, p, shard), _softmax(u, root_t, t, shard)
        fields: dict[str, Tensor] = {}
        if labels is not None:
            fields = _label_fields(own, target, labels[rows], wave_temperature, shard, spare)
        if isinstance(target, TopKLogProbs):
            fields |= _top_fields(own, target, objective, second_pass, spare)
        else:
            fields |= _pair_fields(own, target, (root_p, root_t), objective, second_pass, spare)
        if isinstance(student, LinearHead):
            hidden = student.hidden[rows].to(result.dtype)
            fields["grad_norm"] = fields["grad_norm"] * torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            fields["grad_norm"] = fields["grad_norm"] / wave_temperature
        every = [fields.get(name, absent).expand(z.shape[0], 1) for name in FIELDS]
        result[:, rows] = torch.cat(every, -1).t()
    return result


def _softmax(z: Tensor, root: Tensor, powers: Tensor, shard: Shard) -> Softmax:
    """`Shard.softmax` of logits / ln 2, and the roots of its powers in `root`."""
    z.sub_(shard.max(z.amax(-1, keepdim=True)))
    torch.mul(z, 0.5, out=root).exp2_()
    torch.mul(root, root, out=powers)
    return Softmax(z, powers, shard.row_sum(powers))


def _pair_fields(
    student: Softmax,
    teacher: Softmax,
    roots: tuple[Tensor, Tensor],
    objective: Objective,
    second_pass: bool,
    spare: Tensor,
) -> dict[str, Tensor]:
    """Comparisons over all classes, each [rows, 1]; softmaxes and roots are overwritten."""
    (z, p, p_size), (u, t, t_size), shard = student, teacher, objective.shard
    fields: dict[str, Tensor] = {}
    if second_pass:
        copies = [Softmax(each.shifted.clone(), each.powers.clone(), each.size) for each in (student, teacher)]
        fields["divergence"], _ = divergence(copies[0], copies[1], objective.beta, shard, wants_gradient=False)

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.mul(x, y, out=spare).sum(-1, keepdim=True)

    mean_z, mean_u = product(p, z), product(t, u)
    agreement = shard.first_top(z, spare) == shard.first_top(u, spare)
    ratio = u.sub_(z)
    ratio_t, ratio_p = product(t, ratio), product(p, ratio)
    of_sizes = t_size / p_size
    between_roots = roots[0].mul_(of_sizes.sqrt()).sub_(roots[1])
    between = p.mul_(of_sizes).sub_(t)
    sums = [mean_z, mean_u, ratio_t, ratio_p, product(between_roots, between_roots), product(between, between)]
    if second_pass:
        sums.append(between.abs_().sum(-1, keepdim=True))
    mean_z, mean_u, ratio_t, ratio_p, roots_square, square, *absolute = shard.sum(torch.stack(sums))
    log_sizes = torch.log2(p_size / t_size)
    fields |= {
        "forward_kl": LN_2 * (ratio_t / t_size + log_sizes),
        "reverse_kl": -LN_2 * (ratio_p / p_size + log_sizes),
        "hellinger": 0.5 * roots_square / t_size,  # 1 - sum sqrt(p t), without cancellation
        "student_entropy": LN_2 * (p_size.log2() - mean_z / p_size),
        "teacher_entropy": LN_2 * (t_size.log2() - mean_u / t_size),
        "student_confidence": 1 / p_size,
        "teacher_confidence": 1 / t_size,
        "agreement": agreement.to(p_size.dtype),
        "grad_norm": square.sqrt() / t_size,
    }
    if second_pass:
        fields["total_variation"] = 0.5 * absolute[0] / t_size
    return fields


def _top_fields(
    student: Softmax, teacher: TopKLogProbs, objective: Objective, second_pass: bool, spare: Tensor
) -> dict[str, Tensor]:
    """Comparisons over the top-k classes and the bucket; what concerns the student alone over all classes."""
    z, p, p_size = student
    shard, count = objective.shard, teacher.indices.shape[1]
    entropy = LN_2 * (p_size.log2() - torch.mul(p, z, out=spare).sum(-1, keepdim=True) / p_size)
    best = teacher.indices.gather(1, teacher.log_probs.argmax(-1, keepdim=True))
    agreement = (shard.first_top(z, spare) == best).to(p.dtype)
    own, target, share = with_bucket(student, teacher, shard)
    confidence = target.powers[:, :count].amax(-1, keepdim=True) / target.size
    between = (own.powers / own.size - target.powers / target.size).square_()
    if count < share.shape[1]:  # the bucket's gradient lies on its classes by their shares
        between[:, count:] *= share.square_().sum(-1, keepdim=True)
    roots, coarse = (own.powers.sqrt(), target.powers.sqrt()), own.powers.shape[1]
    objective = replace(objective, shard=Shard(coarse, 0, coarse))
    fields = _pair_fields(own, target, roots, objective, second_pass, torch.empty_like(own.powers))
    return fields | {
        "student_entropy": entropy,
        "student_confidence": 1 / p_size,
        "teacher_confidence": confidence,
        "agreement": agreement,
        "grad_norm": between.sum(-1, keepdim=True).sqrt(),
    }


def _label_fields(
    student: Softmax,
    teacher: Softmax | TopKLogProbs,
    labels: Tensor,
    temperature: float | Tensor,
    shard: Shard,
    spare: Tensor,
) -> dict[str, Tensor]:
    """What needs the labels, all at temperature 1, each [rows, 1]; el2n from the other classes' probabilities, whose
    sum is 1 - p_y without cancellation. The softmaxes are left as they are.
    """
    if isinstance(temperature, Tensor) or temperature != 1.0:
        student = untempered(student, temperature, shard)
        teacher = teacher if isinstance(teacher, TopKLogProbs) else untempered(teacher, temperature, shard)
    z, p, size = student
    index, mine = shard.local_labels(labels)
    label = shard.at(z, index, mine)
    own_label, own_power = z.gather(1, index), p.gather(1, index)
    _put(p, index, mine, 0.0)
    sums = [p.sum(-1, keepdim=True), torch.mul(p, p, out=spare).sum(-1, keepdim=True)]
    p.scatter_(1, index, own_power)
    _put(z, index, mine, -torch.inf)
    runner_up = shard.max(z.amax(-1, keepdim=True))
    z.scatter_(1, index, own_label)
    others, others_square = shard.sum(torch.stack(sums))
    fields = {
        "student_nll": LN_2 * (size.log2() - label),
        "el2n": (others_square + others.square()).sqrt() / size,
        "margin": LN_2 * (label - runner_up),
    }
    if isinstance(teacher, Softmax):
        fields["teacher_nll"] = LN_2 * (teacher.size.log2() - shard.at(teacher.shifted, index, mine))
        fields["excess_loss"] = fields["student_nll"] - fields["teacher_nll"]
    return fields


def _put(x: Tensor, index: Tensor, mine: Tensor | None, value: float) -> None:
    """Write a value at `Shard.local_labels`."""
    if mine is None:
        x.scatter_(1, index, value)
    else:
        x.scatter_(1, index, torch.where(mine, value, x.gather(1, index)))
