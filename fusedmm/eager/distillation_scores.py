"""Distillation scores, wave by wave, from PyTorch's own operators.

Student and teacher lie together, as [2, rows, V], and most operators take both at once: of few classes the calls cost
as much as the passes. A wave is read about two dozen times, by operators that write to memory the waves share; one
exponential a head gives the roots of the probabilities (for the Hellinger distance), their squares the probabilities.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fusedmm.eager.distillation import LN_2, LOG2_E, Objective, divergence, with_bucket
from fusedmm.eager.products import compute_dtype
from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import (
    Scratch,
    counted_rows,
    of_all,
    of_wave,
    pair_logits,
    real_classes,
    wave_logits,
    waves,
)
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
    if num_rows == 0:
        return source.new_zeros((len(FIELDS), source.shape[0]), dtype=compute_dtype(source))
    scratch = Scratch(source, num_rows, shard.count, (2, 2, 2))
    parts: list[dict[str, Tensor]] = []
    for rows in waves(source.shape[0], shard.count, counted):
        wave_temperature = objective.temperature if temperature is None else temperature[rows, None]
        wave_labels = None if labels is None else of_wave(labels, rows)
        logits, *memory = scratch.take(rows)
        scale = 0.5 * LOG2_E / wave_temperature
        if isinstance(teacher, TopKLogProbs):
            wave_logits(student, rows, scale, logits[0])
            top = TopKLogProbs(teacher.indices[rows], teacher.log_probs[rows])
            sums = _top_sums(logits[0], top, wave_labels, wave_temperature, objective, second_pass, memory)
        else:
            pair_logits(student, teacher, rows, scale, logits)
            sums = _pair_sums(logits, wave_labels, wave_temperature, objective, second_pass, memory)
        parts.append(sums)
    fields = _fields({name: of_all([part[name][..., 0] for part in parts], source, None) for name in parts[0]})
    if isinstance(student, LinearHead):
        hidden = student.hidden if counted is None else student.hidden[counted]
        size = torch.linalg.vector_norm(hidden, dim=-1, dtype=compute_dtype(source))
        row_temperature = temperature if temperature is None or counted is None else temperature[counted]
        fields["grad_norm"] *= size / (objective.temperature if row_temperature is None else row_temperature)
    absent = torch.zeros_like(fields["grad_norm"])
    return of_all([torch.stack([fields.get(name, absent) for name in FIELDS])], source, counted)


def _pair_sums(
    logits: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    objective: Objective,
    second_pass: bool,
    memory: list[Tensor],
) -> dict[str, Tensor]:
    """What `_fields` needs of a wave, each [rows, 1] or [2, rows, 1], from half of its logits / ln 2 / temperature, of
    student and teacher [2, rows, V]; they and the two tensors like them in `memory` are overwritten.
    """
    shard, (roots, powers) = objective.shard, memory
    sums: dict[str, Tensor] = {}
    if second_pass:
        sums["divergence"], _ = divergence(2 * logits, objective.beta, shard, roots, wants_gradient=False)
    torch.exp2(shard.shift(logits), out=roots)
    sums["sizes"] = sizes = shard.row_sum(torch.mul(roots, roots, out=powers))
    (z, u), (p, t), (spare_p, root_t), (p_size, t_size) = logits, powers, roots, sizes
    of_sizes = t_size / p_size
    additive = {"roots": _square_sum(root_t.addcmul_(spare_p, of_sizes.sqrt(), value=-1.0), spare_p)}
    at_one = isinstance(temperature, float) and temperature == 1.0
    if labels is not None:
        sums["teacher_label"] = 2 * LN_2 * temperature * shard.at(u, *shard.local_labels(labels))
        sums["teacher_unit_size"] = (
            t_size if at_one else shard.row_sum(torch.mul(u, 2 * temperature, out=spare_p).exp2_())
        )
    student_top, teacher_top = shard.first_top(logits, roots)
    sums["agreement"] = (student_top == teacher_top).to(p.dtype)
    additive["means"] = torch.mul(powers, logits, out=roots).sum(-1, keepdim=True)
    ratio = u.sub_(z)
    additive["ratios"] = torch.mul(powers, ratio, out=roots).sum(-1, keepdim=True)
    between = t.addcmul_(p, of_sizes, value=-1.0)
    additive["square"] = _square_sum(between, spare_p)
    if second_pass:
        additive["absolute"] = between.abs_().sum(-1, keepdim=True)
    if labels is not None and at_one:
        sums |= _label_sums(z, p, p_size, labels, 2 * LN_2, shard, spare_p)
    elif labels is not None:
        sums |= _label_sums(z.mul_(2 * temperature), *shard.powers(z, p), labels, LN_2, shard, spare_p)
    return sums | shard.sums(additive)


def _square_sum(x: Tensor, spare: Tensor) -> Tensor:
    """Sum of squares of each row; the norm reads once, but does not vectorise where the classes are major."""
    if x.stride(-1) != 1:
        return torch.mul(x, x, out=spare).sum(-1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_()


def _top_sums(
    z: Tensor,
    teacher: TopKLogProbs,
    labels: Tensor | None,
    temperature: float | Tensor,
    objective: Objective,
    second_pass: bool,
    memory: list[Tensor],
) -> dict[str, Tensor]:
    """The same over the top-k classes and the bucket; what concerns the student alone over all classes."""
    shard, count, (powers, spare) = objective.shard, teacher.indices.shape[1], memory[0]
    p, p_size = shard.powers(shard.shift(z.mul_(2)), powers)
    alone = {"whole_size": p_size, "whole": torch.mul(p, z, out=spare).sum(-1, keepdim=True)}
    if labels is not None:
        own = z * temperature
        alone |= _label_sums(own, *shard.powers(own, powers), labels, LN_2, shard, spare)
    best = teacher.indices.gather(1, teacher.log_probs.argmax(-1, keepdim=True))
    alone["agreement"] = (shard.first_top(z, spare) == best).to(z.dtype)
    own, target, share = with_bucket(z, teacher, shard)
    p, t = torch.softmax(own * LN_2, -1), torch.softmax(target * LN_2, -1)
    between = (p - t).square_()
    if count < share.shape[1]:  # the bucket's gradient lies on its classes by their shares
        between[:, count:] *= share.square_().sum(-1, keepdim=True)
    alone["top_square"] = between.sum(-1, keepdim=True)
    alone["top_confidence"] = t[:, :count].amax(-1, keepdim=True)
    coarse = replace(objective, shard=Shard(p.shape[1], 0, p.shape[1]))
    logits = torch.stack([own, target]).mul_(0.5)
    memory = [torch.empty_like(logits), torch.empty_like(logits)]
    return _pair_sums(logits, None, 1.0, coarse, second_pass, memory) | alone


def _label_sums(
    z: Tensor, p: Tensor, size: Tensor, labels: Tensor, unit: float, shard: Shard, spare: Tensor
) -> dict[str, Tensor]:
    """What needs the labels, from shifted logits / `unit` at temperature 1, their powers and size; all but the size
    are overwritten.

    el2n comes from the other classes' probabilities, whose sum is 1 - p_y without cancellation.
    """
    index, mine = shard.local_labels(labels)
    label = shard.at(z, index, mine) * unit
    _put(p, index, mine, 0.0)
    _put(z, index, mine, -torch.inf)
    additive = {"others": p.sum(-1, keepdim=True), "others_square": _square_sum(p, spare)}
    runner_up = shard.max(z.amax(-1, keepdim=True)) * unit
    return {"unit_size": size, "label": label, "runner_up": runner_up} | shard.sums(additive)


def _put(x: Tensor, index: Tensor, mine: Tensor | None, value: float) -> None:
    """Write a value at `Shard.local_labels`."""
    x.scatter_(1, index, value if mine is None else torch.where(mine, value, x.gather(1, index)))


def _fields(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fields of all rows from the sums of all waves; logarithms of halves of logits, hence the factors 2."""
    sizes, (p_size, t_size) = sums["sizes"], sums["sizes"]
    confidence = 1 / sizes
    entropy = torch.addcdiv(sizes.log(), sums["means"], sizes, value=-2 * LN_2)
    kl = torch.addcdiv(torch.log(p_size / t_size), sums["ratios"], sizes, value=2 * LN_2)  # first -KL(p || t)
    fields = {
        "forward_kl": kl[1],
        "reverse_kl": -kl[0],
        "hellinger": 0.5 * sums["roots"] / t_size,  # 1 - sum sqrt(p t), without cancellation
        "student_entropy": entropy[0],
        "teacher_entropy": entropy[1],
        "student_confidence": confidence[0],
        "teacher_confidence": confidence[1],
        "agreement": sums["agreement"],
        "grad_norm": sums["square"].sqrt() / t_size,
    }
    if "top_square" in sums:
        fields |= {
            "student_entropy": sums["whole_size"].log() - LN_2 * sums["whole"] / sums["whole_size"],
            "student_confidence": 1 / sums["whole_size"],
            "teacher_confidence": sums["top_confidence"],
            "grad_norm": sums["top_square"].sqrt(),
        }
    if "absolute" in sums:
        fields |= {"divergence": sums["divergence"], "total_variation": 0.5 * sums["absolute"] / t_size}
    if "label" in sums:
        fields |= {
            "student_nll": sums["unit_size"].log() - sums["label"],
            "el2n": (sums["others_square"] + sums["others"].square()).sqrt() / sums["unit_size"],
            "margin": sums["label"] - sums["runner_up"],
        }
    if "teacher_label" in sums:
        fields["teacher_nll"] = sums["teacher_unit_size"].log() - sums["teacher_label"]
        fields["excess_loss"] = fields["student_nll"] - fields["teacher_nll"]
    return fields
