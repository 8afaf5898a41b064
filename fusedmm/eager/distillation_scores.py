"""Distillation scores, wave by wave, from PyTorch's own operators.

A wave is read about two dozen times, by operators that write to memory the waves share; one exponential a head gives
the roots of the probabilities (for the Hellinger distance), their squares the probabilities.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fusedmm.eager.distillation import LN_2, LOG2_E, Objective, divergence, with_bucket
from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import Scratch, compute_dtype, counted_rows, pair_logits, real_classes, wave_logits, waves
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
    scratch = Scratch(source, num_rows, shard.count, 6)
    result = source.new_zeros((len(FIELDS), source.shape[0]), dtype=compute_dtype(source))
    absent = result.new_zeros(())
    for rows in waves(source.shape[0], shard.count, counted):
        wave_temperature = objective.temperature if temperature is None else temperature[rows, None]
        wave_labels = None if labels is None else labels[rows]
        z, u, *memory = scratch.take(rows)
        scale = LOG2_E / wave_temperature
        if isinstance(teacher, TopKLogProbs):
            wave_logits(student, rows, scale, z)
            top = TopKLogProbs(teacher.indices[rows], teacher.log_probs[rows])
            fields = _top_fields(z, top, wave_labels, wave_temperature, objective, second_pass, memory)
        else:
            z, u = pair_logits(student, teacher, rows, scale, (z, u))
            fields = _pair_fields(z, u, wave_labels, wave_temperature, objective, second_pass, memory)
        if isinstance(student, LinearHead):
            hidden = student.hidden[rows].to(result.dtype)
            fields["grad_norm"] *= torch.linalg.vector_norm(hidden, dim=-1, keepdim=True) / wave_temperature
        every = [fields[name] if name in fields else absent.expand(z.shape[0], 1) for name in FIELDS]
        result[:, rows] = torch.cat(every, -1).t()
    return result


def _pair_fields(
    z: Tensor,
    u: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    objective: Objective,
    second_pass: bool,
    memory: list[Tensor],
) -> dict[str, Tensor]:
    """All fields [rows, 1] from logits / ln 2 / temperature of student and teacher; they and the four tensors in
    `memory` are overwritten.
    """
    shard, (p, t, root_p, root_t) = objective.shard, memory
    fields: dict[str, Tensor] = {}
    if second_pass:
        fields["divergence"], _ = divergence(z.clone(), u.clone(), objective.beta, shard, memory, wants_gradient=False)
    p_size, t_size = _powers(z, p, root_p, shard), _powers(u, t, root_t, shard)
    of_sizes = t_size / p_size
    between_roots = root_p.mul_(of_sizes.sqrt()).sub_(root_t)
    sums = [between_roots.mul_(between_roots).sum(-1, keepdim=True)]
    spare = root_p

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.mul(x, y, out=spare).sum(-1, keepdim=True)

    if labels is not None:
        if isinstance(temperature, float) and temperature == 1.0:
            fields |= _label_fields(z, (p, p_size), (u, t_size), labels, shard, spare)
        else:
            own, target = shard.shift(z * temperature), shard.shift(u * temperature)
            powers, target_size = shard.powers(own, root_t), shard.powers(target, spare)[1]
            fields |= _label_fields(own, powers, (target, target_size), labels, shard, spare)
    sums += [product(p, z), product(t, u)]
    agreement = shard.first_top(z, spare) == shard.first_top(u, spare)
    ratio = u.sub_(z)
    sums += [product(t, ratio), product(p, ratio)]
    between = p.mul_(of_sizes).sub_(t)
    sums.append(product(between, between))
    if second_pass:
        sums.append(between.abs_().sum(-1, keepdim=True))
    roots, mean_z, mean_u, ratio_t, ratio_p, square, *absolute = shard.sum(torch.stack(sums))
    log_sizes = torch.log2(p_size / t_size)
    fields |= {
        "forward_kl": LN_2 * (ratio_t / t_size + log_sizes),
        "reverse_kl": -LN_2 * (ratio_p / p_size + log_sizes),
        "hellinger": 0.5 * roots / t_size,  # 1 - sum sqrt(p t), without cancellation
        "student_entropy": LN_2 * (p_size.log2() - mean_z / p_size),
        "teacher_entropy": LN_2 * (t_size.log2() - mean_u / t_size),
        "student_confidence": 1 / p_size,
        "teacher_confidence": 1 / t_size,
        "agreement": agreement.to(p.dtype),
        "grad_norm": square.sqrt() / t_size,
    }
    if second_pass:
        fields["total_variation"] = 0.5 * absolute[0] / t_size
    return fields


def _powers(z: Tensor, powers: Tensor, root: Tensor, shard: Shard) -> Tensor:
    """`Shard.powers` of shifted logits, by way of their roots; returns the size."""
    torch.mul(shard.shift(z), 0.5, out=root).exp2_()
    return shard.row_sum(torch.mul(root, root, out=powers))


def _top_fields(
    z: Tensor,
    teacher: TopKLogProbs,
    labels: Tensor | None,
    temperature: float | Tensor,
    objective: Objective,
    second_pass: bool,
    memory: list[Tensor],
) -> dict[str, Tensor]:
    """Comparisons over the top-k classes and the bucket; what concerns the student alone over all classes."""
    shard, count, spare = objective.shard, teacher.indices.shape[1], memory[1]
    p, p_size = shard.powers(shard.shift(z), memory[0])
    alone = {
        "student_entropy": LN_2 * (p_size.log2() - torch.mul(p, z, out=spare).sum(-1, keepdim=True) / p_size),
        "student_confidence": 1 / p_size,
    }
    if labels is not None:
        own = z * temperature
        alone |= _label_fields(own, shard.powers(own, memory[0]), None, labels, shard, spare)
    best = teacher.indices.gather(1, teacher.log_probs.argmax(-1, keepdim=True))
    alone["agreement"] = (shard.first_top(z, spare) == best).to(p.dtype)
    own, target, share = with_bucket(z, teacher, shard)
    p, t = torch.softmax(own * LN_2, -1), torch.softmax(target * LN_2, -1)
    between = (p - t).square_()
    if count < share.shape[1]:  # the bucket's gradient lies on its classes by their shares
        between[:, count:] *= share.square_().sum(-1, keepdim=True)
    alone["grad_norm"] = between.sum(-1, keepdim=True).sqrt()
    alone["teacher_confidence"] = t[:, :count].amax(-1, keepdim=True)
    coarse = replace(objective, shard=Shard(p.shape[1], 0, p.shape[1]))
    return _pair_fields(own, target, None, 1.0, coarse, second_pass, [torch.empty_like(p) for _ in range(4)]) | alone


def _label_fields(
    z: Tensor,
    powers: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    shard: Shard,
    spare: Tensor,
) -> dict[str, Tensor]:
    """What needs the labels, each [rows, 1], from shifted logits / ln 2 at temperature 1, their powers and size, and
    the teacher's shifted logits and size; `spare` alone is changed in the end.

    el2n comes from the other classes' probabilities, whose sum is 1 - p_y without cancellation.
    """
    p, size = powers
    index, mine = shard.local_labels(labels)
    own_logit, own_power = z.gather(1, index), p.gather(1, index)
    label = shard.at(z, index, mine)
    _put(p, index, mine, 0.0)
    others, others_square = shard.sum(
        torch.stack([p.sum(-1, keepdim=True), torch.mul(p, p, out=spare).sum(-1, keepdim=True)])
    )
    p.scatter_(1, index, own_power)
    _put(z, index, mine, -torch.inf)
    runner_up = shard.max(z.amax(-1, keepdim=True))
    z.scatter_(1, index, own_logit)
    fields = {
        "student_nll": LN_2 * (size.log2() - label),
        "el2n": (others_square + others.square()).sqrt() / size,
        "margin": LN_2 * (label - runner_up),
    }
    if teacher is not None:
        u, teacher_size = teacher
        fields["teacher_nll"] = LN_2 * (teacher_size.log2() - shard.at(u, index, mine))
        fields["excess_loss"] = fields["student_nll"] - fields["teacher_nll"]
    return fields


def _put(x: Tensor, index: Tensor, mine: Tensor | None, value: float) -> None:
    """Write a value at `Shard.local_labels`."""
    x.scatter_(1, index, value if mine is None else torch.where(mine, value, x.gather(1, index)))
