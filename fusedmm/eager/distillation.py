"""Distillation losses, wave by wave, from PyTorch's own operators: the CPU path.

Logits exist for one wave of rows at a time, in memory that the waves share. Passes over them are what costs: a loss
takes eight to twelve simple ones and one exponential a head, in base 2. Differences of logits are taken before they are
weighted (``t * (log t - log p)``, not ``sum t log t - sum t log p``), so that a student close to its teacher loses
nothing to cancellation.
"""

import math

import torch
from torch import Tensor

from fusedmm.eager import distillation_small
from fusedmm.eager.objective import Objective
from fusedmm.eager.products import LN_2, LOG2_E, compute_dtype
from fusedmm.eager.shard import Shard, put
from fusedmm.eager.waves import (
    CERTAIN,
    FINITE_MINIMUM,
    HeadGradient,
    Scratch,
    clear_forbidden,
    of_all,
    of_wave,
    pair_logits,
    real_classes,
    wave_logits,
    waves,
)
from fusedmm.heads import Head, LinearHead, Teacher, TopKLogProbs

EXP2_LIMIT = 120.0  # of a log-ratio: its probability no longer counts long before, and no power overflows
# Of a wave's logits [rows, V], and what each row is yet to be multiplied by [rows, 1].
WaveGradient = tuple[Tensor, Tensor]


def loss(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    grad_rows: Tensor | float | None = None,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Loss of every row, and with `grad_rows` the gradient of ``(grad_rows * loss).sum()`` in the student's input,
    weight and bias.

    Args:
        student, teacher, labels: as in `fusedmm.distillation_loss`.
        temperature: [N] in the compute dtype, or None for the objective's.
        objective: the rest.
        grad_rows: upstream gradient of every row, [N] or one number for all; None for no gradient.
        needs: which of input (hidden or logits), weight and bias want one.

    Returns:
        [N] loss in the compute dtype, 0 where a row is ignored, and three gradients, empty where not needed.

    Cost: with hidden sizes Ds and Dt ``2 N V (Ds + Dt)`` FLOPs for the logits and ``2 N V Ds`` for each of the two
        gradients; a wave's logits five times. Ignored rows cost nothing.
    """
    counted = objective.counted_rows(labels)
    if counted is None and distillation_small.suits(student, teacher, temperature, objective):
        assert isinstance(student, LinearHead)
        return distillation_small.loss(student, teacher, labels, objective, grad_rows, needs)
    source, shard, alpha = student.source, objective.shard, objective.alpha
    weight, bias = (student.weight, student.bias) if isinstance(student, LinearHead) else (None, None)
    student = real_classes(student, shard.count)
    teacher = teacher if isinstance(teacher, TopKLogProbs) else real_classes(teacher, shard.count)
    num_rows = source.shape[0] if counted is None else counted.shape[0]
    gradient = HeadGradient(student, needs, source, is_partial=counted is not None)
    if num_rows == 0:
        return source.new_zeros((source.shape[0],), dtype=compute_dtype(source)), gradient.result(weight, bias)
    is_pair = alpha != 0.0 and not isinstance(teacher, TopKLogProbs)
    spare = 0 if not is_pair else 1 if objective.beta in (0.0, 1.0) else 2
    scratch = Scratch(source, num_rows, shard.count, (1 + is_pair, spare))
    parts = []
    for rows in waves(source.shape[0], shard.count, counted):
        wave_temperature = objective.temperature if temperature is None else temperature[rows, None]
        scale = LOG2_E if alpha == 0.0 else LOG2_E / wave_temperature
        logits, memory = scratch.take(rows)
        target: TopKLogProbs | None = None
        if is_pair:
            assert not isinstance(teacher, TopKLogProbs)
            pair_logits(student, teacher, rows, scale, logits)
        else:
            wave_logits(student, rows, scale, logits[0])
            if isinstance(teacher, TopKLogProbs):
                target = TopKLogProbs(teacher.indices[rows], teacher.log_probs[rows])
        slope = None
        if student.softcap is not None and grad_rows is not None:
            slope = 1 - (logits[0] / (student.softcap * scale)).square_()
        losses, wave_gradient = wave_loss(
            logits,
            target,
            None if labels is None or alpha == 1.0 else of_wave(labels, rows),
            wave_temperature,
            objective,
            memory,
            wants_gradient=grad_rows is not None,
        )
        parts.append(losses[:, 0])
        if grad_rows is not None and wave_gradient is not None:
            grad_logits, factor = wave_gradient
            if slope is not None:
                grad_logits.mul_(slope)
            clear_forbidden(grad_logits, losses, student, rows)
            given = of_wave(grad_rows, rows)[:, None] if isinstance(grad_rows, Tensor) else grad_rows
            gradient.add(rows, grad_logits, factor * given)
    grad_input, grad_weight, grad_bias = gradient.result(weight, bias)
    if needs[0] and isinstance(student, LinearHead):
        shard.sum(grad_input)
    return of_all(parts, source, counted), (grad_input, grad_weight, grad_bias)


def wave_loss(
    logits: Tensor,
    target: TopKLogProbs | None,
    labels: Tensor | None,
    temperature: float | Tensor,
    objective: Objective,
    memory: Tensor,
    *,
    wants_gradient: bool,
) -> tuple[Tensor, WaveGradient | None]:
    """Loss [rows, 1] of a wave and its gradient.

    Args:
        logits: student's and, where there is one, teacher's logits / ln 2 / temperature [1 or 2, rows, V], at
            temperature 1 where alpha is 0; overwritten.
        target: what a top-k teacher knows.
        labels: [rows], none of them ignored.
        temperature: a number or [rows, 1].
        objective: the rest.
        memory: [1, rows, V] beside a teacher's logits, [2, rows, V] for 0 < beta < 1.
        wants_gradient: whether it is taken.
    """
    alpha = objective.alpha
    if alpha == 0.0:
        assert labels is not None
        return _cross_entropy(logits[0], labels, objective, wants_gradient=wants_gradient)
    cross_entropy, cross_gradient = None, None
    if alpha != 1.0:
        assert labels is not None
        cross_entropy, cross_gradient = _cross_entropy(
            logits[0] * temperature, labels, objective, wants_gradient=wants_gradient
        )
    if target is not None:
        rows, gradient = _top_divergence(logits[0], target, objective, wants_gradient=wants_gradient)
    else:
        rows, gradient = divergence(logits, objective.beta, objective.shard, memory, wants_gradient=wants_gradient)
    if isinstance(temperature, Tensor) or temperature != 1.0 or alpha != 1.0:
        rows = rows * (alpha * temperature * temperature)
        if gradient is not None:
            gradient = gradient[0], gradient[1] * (alpha * temperature)
    if cross_entropy is None:
        return rows, gradient
    rows = rows + (1 - alpha) * cross_entropy
    if gradient is None or cross_gradient is None:
        return rows, None
    factor = (1 - alpha) * cross_gradient[1]
    return rows, (cross_gradient[0].addcmul_(gradient[0], gradient[1] / factor), factor)


def divergence(
    logits: Tensor, beta: float, shard: Shard, memory: Tensor, *, wants_gradient: bool
) -> tuple[Tensor, WaveGradient | None]:
    """Generalised Jensen-Shannon divergence [rows, 1] of logits / ln 2 of student and teacher [2, rows, V], and its
    gradient in the student's logits; both are overwritten, as is `memory`.

    With p and t the probabilities of student and teacher, mix their mixture and ``s = log(mix / ((1 - beta) p))``::

        beta = 0   sum t (log t - log p)                            p - t
        beta = 1   sum p (log p - log t)                            p (log p - log t - sum p (log p - log t))
        between    beta KL(t || mix) + (1 - beta) KL(p || mix)      (1 - beta) p (sum p s - s)

    s is log1p of the odds of the teacher, beta t to (1 - beta) p: where those are small, so is it, and keeps its
    digits; so does ``log(mix / (beta t))``, log1p of the inverse, where they are large.
    """
    z, u = shard.shift(logits)
    ratio = torch.sub(u, z, out=memory[0])
    powers, sizes = shard.powers(logits, logits)
    (p, t), (p_size, t_size) = powers, sizes
    log_sizes = torch.log2(p_size / t_size)  # log2(t / p) is ratio + log_sizes
    top = _saturated_top(p, p_size) if wants_gradient else None
    if beta == 0.0:
        mean = shard.row_sum(ratio.mul_(t)) / t_size
        rows = mean.add_(log_sizes).mul_(LN_2)
        if not wants_gradient:
            return rows, None
        return rows, (_balance(t.addcmul_(p, t_size / p_size, value=-1.0), top, shard), -1 / t_size)
    if beta == 1.0:
        mean = shard.row_sum(torch.mul(p, ratio, out=t)) / p_size
        rows = -LN_2 * (mean + log_sizes)
        if not wants_gradient:
            return rows, None
        return rows, (_balance(ratio.sub_(mean).mul_(p), top, shard), -LN_2 / p_size)
    ratio.add_(log_sizes + math.log2(beta / (1 - beta))).clamp_(-EXP2_LIMIT, EXP2_LIMIT)
    odds = torch.exp2(ratio, out=memory[1])
    of_teacher = torch.reciprocal(odds, out=ratio).log1p_().mul_(t).sum(-1, keepdim=True)  # t log(mix / (beta t))
    log_share = odds.log1p_()  # s
    of_student = torch.mul(p, log_share, out=t).sum(-1, keepdim=True)
    of_teacher, of_student = shard.sum(torch.stack([of_teacher / t_size, of_student / p_size]))
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    rows = entropy - beta * of_teacher - (1 - beta) * of_student
    if not wants_gradient:
        return rows, None
    return rows, (_balance(log_share.sub_(of_student).mul_(p), top, shard), (beta - 1) / p_size)


def _saturated_top(p: Tensor, size: Tensor) -> Tensor | None:
    """1 at the class that saturates its row, else 0, from powers of which the largest is 1; None where no row is."""
    saturated = size < 1 / CERTAIN  # the same on all ranks
    return p.floor().mul_(saturated.to(p.dtype)) if bool(saturated.any()) else None


def _balance(grad: Tensor, top: Tensor | None, shard: Shard) -> Tensor:
    """Make saturated rows of a gradient sum to 0, as a gradient of logits does, at the class that saturates them.

    Where p rounds to 1 that entry is the difference of two numbers near 1, and all is lost; the others are exact.
    """
    return grad if top is None else grad.addcmul_(top, shard.row_sum(grad), value=-1.0)


def with_bucket(z: Tensor, teacher: TopKLogProbs, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """Logits / ln 2 of student and teacher over the top-k classes and the rest as one bucket [rows, K+1], on every
    rank, and the share of the rest that each of this rank's classes has [rows, V], in the memory of the student's
    logits `z`.

    The student's rest is a sum over the other classes, not 1 minus the sum, which would cancel for a confident
    student. With as many top-k classes as there are there is no bucket.
    """
    index, mine = shard.local(teacher.indices)
    top = shard.at(z, index, mine)
    log_probs = teacher.log_probs.double().clamp_min(FINITE_MINIMUM)
    others = put(z, index, mine, -math.inf)  # below what -inf counts as, which a temperature divides
    if top.shape[1] == shard.total:
        return top, (log_probs * LOG2_E).to(z.dtype), others
    largest = shard.max(others.amax(-1, keepdim=True))
    share, size = shard.powers(others.sub_(largest), others)
    rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1.0)).clamp_min(FINITE_MINIMUM)
    log_probs = torch.cat([log_probs, rest], -1)
    return torch.cat([top, largest + size.log2()], -1), (log_probs * LOG2_E).to(z.dtype), share.div_(size)


def _top_divergence(
    z: Tensor, teacher: TopKLogProbs, objective: Objective, *, wants_gradient: bool
) -> tuple[Tensor, WaveGradient | None]:
    """`divergence` against a top-k teacher: the gradient of the bucket is spread over its classes by their shares."""
    shard, top = objective.shard, teacher.indices.shape[1]
    own, target, share = with_bucket(z, teacher, shard)
    logits, buckets = torch.stack([own, target]), Shard(own.shape[1], 0, own.shape[1])
    rows, gradient = divergence(
        logits, objective.beta, buckets, torch.empty_like(logits), wants_gradient=wants_gradient
    )
    if gradient is None:
        return rows, None
    coarse, factor = gradient
    if top < shard.total:
        share.mul_(coarse[:, top:])
    return rows, (put(share, *shard.local(teacher.indices), coarse[:, :top]), factor)


def _cross_entropy(
    z: Tensor, labels: Tensor, objective: Objective, *, wants_gradient: bool
) -> tuple[Tensor, WaveGradient | None]:
    """Cross entropy with label smoothing [rows, 1] of logits / ln 2, and its gradient in the logits; `z` is
    overwritten.
    """
    shard, smoothing = objective.shard, objective.label_smoothing
    index, mine = shard.local(labels[:, None])
    label = (1 - smoothing) * shard.at(shard.shift(z), index, mine)
    if smoothing:
        label += (smoothing / shard.total) * shard.row_sum(z)
    p, size = shard.powers(z, z)
    rows = LN_2 * (size.log2() - label)
    if not wants_gradient:
        return rows, None
    top = _saturated_top(p, size)
    if smoothing:
        p.sub_(size * (smoothing / shard.total))
    hit = (smoothing - 1) * size
    p.scatter_add_(1, index, hit if mine is None else torch.where(mine, hit, 0.0))
    return rows, (_balance(p, top, shard), 1 / size)
