"""Distillation scores, wave by wave, from PyTorch's own operators.

Student and teacher lie together, as [2, rows, V], and most operators take both at once: of few classes the calls cost
as much as the passes. A wave is read about two dozen times, by operators that write to memory the waves share; one
exponential a head gives the roots of the probabilities (for the Hellinger distance), their squares the probabilities.
Sums over few classes are matrix products, which take half the time of a reduction. A view takes as long as a small
operator, hence few of them; the fields are taken from the sums of all waves.
"""

import torch
from torch import Tensor

from fusedmm.eager import distillation_scores_small as small
from fusedmm.eager.distillation import divergence, with_bucket
from fusedmm.eager.objective import Objective
from fusedmm.eager.products import LN_2, LOG2_E, compute_dtype, ones_to_sum
from fusedmm.eager.shard import Shard, put
from fusedmm.eager.waves import (
    Scratch,
    of_all,
    of_wave,
    pair_logits,
    real_classes,
    wave_logits,
    waves,
)
from fusedmm.heads import Head, LinearHead, Teacher, TopKLogProbs

LABEL_FIELDS = ("student_nll", "teacher_nll", "excess_loss", "el2n", "margin")
SECOND_PASS_FIELDS = ("divergence", "total_variation")
FIELDS = (
    "forward_kl",
    "reverse_kl",
    "hellinger",
    "student_entropy",
    "teacher_entropy",
    "student_confidence",
    "teacher_confidence",
    "agreement",
    "grad_norm",
    *LABEL_FIELDS,
    *SECOND_PASS_FIELDS,
)


def scores(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    second_pass: bool,
) -> dict[str, Tensor]:
    """Those of `FIELDS` that apply, each [N] in the compute dtype; ignored rows are 0.

    Args:
        student, teacher, labels: as in `fusedmm.distillation_scores`.
        temperature: [N] in the compute dtype, or None for the objective's.
        objective: the shard, the temperature, beta and ignore_index.
        second_pass: whether `SECOND_PASS_FIELDS` are wanted.

    Cost: ``2 N V (Ds + Dt)`` FLOPs; a wave's logits seven times. Ignored rows cost nothing.
    """
    source = student.source
    counted = objective.counted_rows(labels)
    if source.shape[0] == 0 or (counted is not None and counted.shape[0] == 0):
        zeros = source.new_zeros((len(FIELDS), source.shape[0]), dtype=compute_dtype(source))
        return dict(zip(FIELDS, zeros.unbind(), strict=True))
    if counted is None and not second_pass and small.suits(student, teacher, labels, temperature, objective):
        assert isinstance(student, LinearHead)
        assert isinstance(teacher, LinearHead)
        fields = small.scores(student, teacher, labels, objective)
    else:
        fields = _fields_of_waves(student, teacher, labels, temperature, objective, second_pass, counted)
    grad_norm = fields["grad_norm"]
    if isinstance(student, LinearHead):
        hidden = student.hidden if counted is None else student.hidden[counted]
        grad_norm.mul_(torch.linalg.vector_norm(hidden, dim=-1, dtype=grad_norm.dtype))
        if temperature is not None:
            grad_norm.div_(temperature if counted is None else temperature[counted])
        elif objective.temperature != 1.0:
            grad_norm.div_(objective.temperature)
    if counted is None:
        return fields
    return dict(zip(fields, of_all([torch.stack(list(fields.values()))], source, counted).unbind(), strict=True))


def _fields_of_waves(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    second_pass: bool,
    counted: Tensor | None,
) -> dict[str, Tensor]:
    """Fields by name of the rows in `counted`, or of all; grad_norm without the norm of hidden."""
    source, shard = student.source, objective.shard
    student = real_classes(student, shard.count)
    teacher = teacher if isinstance(teacher, TopKLogProbs) else real_classes(teacher, shard.count)
    scratch = Scratch(source, source.shape[0] if counted is None else counted.shape[0], shard.count, (2, 2, 2))
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
    if temperature is None:
        return _fields(sums, objective.temperature)
    return _fields(sums, temperature if counted is None else temperature[counted])


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
    shard, (roots, powers), ones = objective.shard, memory, _ones(logits)
    sums: dict[str, Tensor] = {}
    if second_pass:
        rows, _ = divergence(2 * logits, objective.beta, shard, roots, wants_gradient=False)
        sums["divergence"] = rows[:, 0]
    torch.exp2(shard.shift(logits), out=roots)
    sizes = shard.sum(_sum(torch.mul(roots, roots, out=powers), ones))
    (z, u), (p, t), (root_p, root_t), (p_size, t_size) = (x.unbind() for x in (logits, powers, roots, sizes))
    of_sizes = t_size / p_size
    weight = of_sizes[:, None]
    sums |= {"sizes": sizes, "of_sizes": of_sizes}
    additive = {"roots": _square_sum(root_t.addcmul_(root_p, weight.sqrt(), value=-1.0), root_p, ones)}
    if labels is not None:
        index, mine = shard.local(labels[:, None])
        sums["labels"] = shard.at(logits, index, mine)[..., 0]
        if isinstance(temperature, Tensor) or temperature != 1.0:
            sums["unit_sizes"] = shard.sum(_sum(torch.mul(logits, 2 * temperature, out=roots).exp2_(), ones))
            additive["others"] = _others(roots, index, mine, ones)
    student_top, teacher_top = shard.first_top(logits, roots).unbind()
    sums["agreement"] = student_top == teacher_top
    additive["means"] = _sum(torch.mul(powers, logits, out=roots), ones)
    additive["ratios"] = _sum(torch.mul(powers, u.sub_(z), out=roots), ones)
    between = t.addcmul_(p, weight, value=-1.0)
    additive["square"] = _square_sum(between, root_p, ones)
    if second_pass:
        additive["absolute"] = _sum(between.abs_(), ones)
    if labels is not None:
        if "unit_sizes" not in sums:
            additive["others"] = _others(powers, index, mine, ones)
        sums["runner_up"] = _runner_up(z, index, mine, shard)
    return sums | shard.sums(additive)


def _ones(x: Tensor) -> Tensor | None:
    """What sums the classes of `x` as a product with it, where they are major."""
    return None if x.stride(-1) == 1 else ones_to_sum(x, x.shape[-1])


def _sum(x: Tensor, ones: Tensor | None) -> Tensor:
    """Sum over the classes."""
    return x.sum(-1) if ones is None else x @ ones


def _square_sum(x: Tensor, spare: Tensor, ones: Tensor | None) -> Tensor:
    """Sum of squares over the classes; the norm reads once, but does not vectorise where they are major."""
    if ones is None:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
        return norm.square_()
    return torch.mul(x, x, out=spare) @ ones


def _others(powers: Tensor, index: Tensor, mine: Tensor | None, ones: Tensor | None) -> Tensor:
    """Sums over all classes but the label's, for el2n [2, rows]: of the first of `powers` [2, rows, V], which is
    1 - p_y without cancellation, and of its squares, for which the second makes room.
    """
    p, squares = powers.unbind()
    put(p, index, mine, 0.0)
    torch.mul(p, p, out=squares)
    return _sum(powers, ones)


def _runner_up(z: Tensor, index: Tensor, mine: Tensor | None, shard: Shard) -> Tensor:
    """Largest logit but the label's [rows]; `z` is overwritten."""
    return shard.max(put(z, index, mine, -torch.inf).amax(-1))


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
    shard, count, (powers, spare) = objective.shard, teacher.indices.shape[1], memory
    p, p_size = shard.powers(shard.shift(z.mul_(2)), powers[0])
    alone, additive = {"whole_size": p_size[:, 0]}, {"whole": torch.mul(p, z, out=spare[0]).sum(-1)}
    if labels is not None:
        index, mine = shard.local(labels[:, None])
        half = torch.mul(z, 0.5, out=spare[0])
        alone["labels"] = shard.at(half, index, mine).mT
        alone["runner_up"] = _runner_up(half, index, mine, shard)
        p, p_size = shard.powers(torch.mul(z, temperature, out=powers[0]), powers[0])
        alone["unit_sizes"] = p_size.mT
        additive["others"] = _others(powers, index, mine, _ones(powers))
    best = teacher.indices.gather(1, teacher.log_probs.argmax(-1, keepdim=True))
    alone["agreement"] = shard.first_top(z, spare[0]) == -best[:, 0]
    own, target, share = with_bucket(z, teacher, shard)
    p, t = torch.softmax(own * LN_2, -1), torch.softmax(target * LN_2, -1)
    additive["shares"] = share.square_().sum(-1)
    alone |= shard.sums(additive)
    between = (p - t).square_()
    if count < shard.total:  # the bucket's gradient lies on its classes by their shares
        between[:, count:] *= alone["shares"][:, None]
    alone["top_square"] = between.sum(-1)
    alone["top_confidence"] = t[:, :count].amax(-1)
    coarse = objective._replace(shard=Shard(p.shape[1], 0, p.shape[1]))
    logits = torch.stack([own, target]).mul_(0.5)
    memory = [torch.empty_like(logits), torch.empty_like(logits)]
    return _pair_sums(logits, None, 1.0, coarse, second_pass, memory) | alone


def _fields(sums: dict[str, Tensor], temperature: float | Tensor) -> dict[str, Tensor]:
    """Fields of all rows from the sums of all waves; logarithms of halves of logits, hence the factors 2."""
    sizes = sums["sizes"]
    log_sizes = sizes.log()
    student_confidence, teacher_confidence = sizes.reciprocal().unbind()
    entropy, teacher_entropy = torch.addcdiv(log_sizes, sums["means"], sizes, value=-2 * LN_2).unbind()
    reverse, forward = torch.addcdiv(sums["of_sizes"].log(), sums["ratios"], sizes, value=-2 * LN_2).unbind()
    fields = {
        "forward_kl": forward.neg_(),
        "reverse_kl": reverse,
        "hellinger": sums["roots"].mul_(0.5).mul_(teacher_confidence),  # 1 - sum sqrt(p t), without cancellation
        "student_entropy": entropy,
        "teacher_entropy": teacher_entropy,
        "student_confidence": student_confidence,
        "teacher_confidence": teacher_confidence,
        "agreement": sums["agreement"].to(sizes.dtype),
        "grad_norm": sums["square"].sqrt_().mul_(teacher_confidence),
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
        labels, unit = sums["labels"], 2 * LN_2 * temperature
        if "unit_sizes" in sums:
            sizes, log_sizes = sums["unit_sizes"], sums["unit_sizes"].log()
        student_nll, *teacher_nll = (log_sizes - labels * unit).unbind()
        others, squares = sums["others"].unbind()
        fields |= {
            "student_nll": student_nll,
            "el2n": torch.addcmul(squares, others, others).sqrt_().div_(sizes[0]),
            "margin": (labels[0] - sums["runner_up"]).mul_(unit),
        }
        if teacher_nll:
            fields |= {"teacher_nll": teacher_nll[0], "excess_loss": student_nll - teacher_nll[0]}
    return fields
