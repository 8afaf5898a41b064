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
    sums = parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    fields = _fields(sums)
    if isinstance(student, LinearHead):
        hidden = student.hidden if counted is None else student.hidden[counted]
        fields["grad_norm"].mul_(torch.linalg.vector_norm(hidden, dim=-1, dtype=compute_dtype(source)))
        if temperature is not None:
            fields["grad_norm"].div_(temperature if counted is None else temperature[counted])
        elif objective.temperature != 1.0:
            fields["grad_norm"].div_(objective.temperature)
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
    """What `_fields` needs of a wave, each [rows] or [2, rows], from half of its logits / ln 2 / temperature of student
    and teacher [2, rows, V]; they and the two tensors like them in `memory` are overwritten.
    """
    shard, (roots, powers) = objective.shard, memory
    sums: dict[str, Tensor] = {}
    if second_pass:
        rows, _ = divergence(2 * logits, objective.beta, shard, roots, wants_gradient=False)
        sums["divergence"] = rows[:, 0]
    torch.exp2(shard.shift(logits), out=roots)
    sizes = shard.row_sum(torch.mul(roots, roots, out=powers))
    (z, u), (p, t), (root_p, root_t) = logits.unbind(), powers.unbind(), roots.unbind()
    p_size, t_size = sizes.unbind()
    of_sizes = t_size / p_size
    sums |= {"sizes": sizes[..., 0], "of_sizes": of_sizes[:, 0]}
    additive = {"roots": _square_sum(root_t.addcmul_(root_p, of_sizes.sqrt(), value=-1.0), root_p)}
    if labels is not None:
        index, mine = shard.local_labels(labels)
        unit = 2 * LN_2 * temperature
        sums["labels"] = shard.at(logits, index, mine).mul_(unit)[..., 0]
        if isinstance(temperature, Tensor) or temperature != 1.0:
            sums["unit_sizes"] = shard.row_sum(torch.mul(logits, 2 * temperature, out=roots).exp2_())[..., 0]
            additive |= _others(root_p, index, mine, root_t)
    student_top, teacher_top = shard.first_top(logits, roots).unbind()
    sums["agreement"] = (student_top == teacher_top).to(p.dtype)
    additive["means"] = torch.mul(powers, logits, out=roots).sum(-1)
    ratio = u.sub_(z)
    additive["ratios"] = torch.mul(powers, ratio, out=roots).sum(-1)
    between = t.addcmul_(p, of_sizes, value=-1.0)
    additive["square"] = _square_sum(between, root_p)
    if second_pass:
        additive["absolute"] = between.abs_().sum(-1)
    if labels is not None:
        if "unit_sizes" not in sums:
            additive |= _others(p, index, mine, root_p)
        sums["runner_up"] = (_runner_up(z, index, mine, shard) * unit)[:, 0]
    return sums | shard.sums(additive)


def _square_sum(x: Tensor, spare: Tensor) -> Tensor:
    """Sum of squares of each row; the norm reads once, but does not vectorise where the classes are major."""
    if x.stride(-1) != 1:
        return torch.mul(x, x, out=spare).sum(-1)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm.square_()


def _others(p: Tensor, index: Tensor, mine: Tensor | None, spare: Tensor) -> dict[str, Tensor]:
    """Sums over all classes but the label's, for el2n: of powers, which is 1 - p_y without cancellation, and of their
    squares; `p` is overwritten.
    """
    _put(p, index, mine, 0.0)
    return {"others": p.sum(-1), "others_square": _square_sum(p, spare)}


def _runner_up(z: Tensor, index: Tensor, mine: Tensor | None, shard: Shard) -> Tensor:
    """Largest logit but the label's [rows, 1]; `z` is overwritten."""
    _put(z, index, mine, -torch.inf)
    return shard.max(z.amax(-1, keepdim=True))


def _put(x: Tensor, index: Tensor, mine: Tensor | None, value: float) -> None:
    """Write a value at `Shard.local_labels`."""
    x.scatter_(1, index, value if mine is None else torch.where(mine, value, x.gather(1, index)))


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
    shard, count, (powers, spare) = objective.shard, teacher.indices.shape[1], memory[0].unbind()
    p, p_size = shard.powers(shard.shift(z.mul_(2)), powers)
    alone = {"whole_size": p_size[:, 0], "whole": torch.mul(p, z, out=spare).sum(-1)}
    if labels is not None:
        own, (index, mine), unit = z * temperature, shard.local_labels(labels), LN_2
        alone["labels"] = (shard.at(own, index, mine) * unit).mT
        p, p_size = shard.powers(own, powers)
        alone["unit_sizes"] = p_size.mT
        alone |= shard.sums(_others(p, index, mine, spare))
        alone["runner_up"] = (_runner_up(own, index, mine, shard) * unit)[:, 0]
    best = teacher.indices.gather(1, teacher.log_probs.argmax(-1, keepdim=True))
    alone["agreement"] = (shard.first_top(z, spare) == -best[:, 0]).to(z.dtype)
    own, target, share = with_bucket(z, teacher, shard)
    p, t = torch.softmax(own * LN_2, -1), torch.softmax(target * LN_2, -1)
    between = (p - t).square_()
    if count < share.shape[1]:  # the bucket's gradient lies on its classes by their shares
        between[:, count:] *= share.square_().sum(-1, keepdim=True)
    alone["top_square"] = between.sum(-1)
    alone["top_confidence"] = t[:, :count].amax(-1)
    coarse = replace(objective, shard=Shard(p.shape[1], 0, p.shape[1]))
    logits = torch.stack([own, target]).mul_(0.5)
    memory = [torch.empty_like(logits), torch.empty_like(logits)]
    return _pair_sums(logits, None, 1.0, coarse, second_pass, memory) | alone


def _fields(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fields of all rows from the sums of all waves; logarithms of halves of logits, hence the factors 2."""
    sizes, confidence = sums["sizes"], sums["sizes"].reciprocal()
    log_sizes = sizes.log()
    student_confidence, teacher_confidence = confidence.unbind()
    entropy, teacher_entropy = torch.addcdiv(log_sizes, sums["means"], sizes, value=-2 * LN_2).unbind()
    reverse, forward = torch.addcdiv(sums["of_sizes"].log(), sums["ratios"], sizes, value=-2 * LN_2).unbind()
    fields = {
        "forward_kl": -forward,
        "reverse_kl": reverse,
        "hellinger": sums["roots"].mul(0.5).mul_(teacher_confidence),  # 1 - sum sqrt(p t), without cancellation
        "student_entropy": entropy,
        "teacher_entropy": teacher_entropy,
        "student_confidence": student_confidence,
        "teacher_confidence": teacher_confidence,
        "agreement": sums["agreement"],
        "grad_norm": sums["square"].sqrt().mul_(teacher_confidence),
    }
    if "top_square" in sums:
        fields |= {
            "student_entropy": sums["whole_size"].log() - LN_2 * sums["whole"] / sums["whole_size"],
            "student_confidence": 1 / sums["whole_size"],
            "teacher_confidence": sums["top_confidence"],
            "grad_norm": sums["top_square"].sqrt(),
        }
    if "absolute" in sums:
        fields |= {"divergence": sums["divergence"], "total_variation": 0.5 * sums["absolute"] * teacher_confidence}
    if "labels" in sums:
        nll = (sums["unit_sizes"].log() if "unit_sizes" in sums else log_sizes) - sums["labels"]
        student_size = sums.get("unit_sizes", sizes)[0]
        others = sums["others"]
        fields |= {
            "student_nll": nll[0],
            "el2n": torch.addcmul(sums["others_square"], others, others).sqrt_().div_(student_size),
            "margin": sums["labels"][0] - sums["runner_up"],
        }
        if nll.shape[0] == 2:
            fields |= {"teacher_nll": nll[1], "excess_loss": nll[0] - nll[1]}
    return fields
