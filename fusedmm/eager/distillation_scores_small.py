"""Scores of few logits, all rows and both heads at once: what `fusedmm.eager.distillation_scores` does in waves, with
fewer calls of operators, which here cost more than their passes.

What is not common, as for losses (`fusedmm.eager.distillation_small`), and a second pass are left to the waves.
"""

import torch
from torch import Tensor

from fusedmm.eager import distillation_small
from fusedmm.eager.distillation_small import CALL_ELEMENTS, are_alike, is_whole, logits_of
from fusedmm.eager.objective import Objective
from fusedmm.eager.products import LN_2, LOG2_E, cast, compute_dtype, multiply, ones_to_sum
from fusedmm.eager.waves import FEW_CLASSES, FINITE_MINIMUM
from fusedmm.heads import LinearHead, Teacher

MKL_FLOPS = 1 << 25  # of a product: after other work, oneDNN would take longer to come into the caches than it saves


def suits(
    student: Teacher, teacher: Teacher, labels: Tensor | None, row_temperature: Tensor | None, objective: Objective
) -> bool:
    """Whether `scores` serves this, where no row is ignored."""
    if type(student) is not LinearHead or row_temperature is not None:
        return False
    rows, classes = student.hidden.shape[0], student.weight.shape[0]
    return (
        0 < rows * classes <= (distillation_small.FEW_ELEMENTS if classes <= FEW_CLASSES else CALL_ELEMENTS)
        and (objective.temperature == 1.0 or labels is None)
        and is_whole(student, objective.shard)
        and are_alike(student, teacher, objective.shard)
    )


def scores(student: LinearHead, teacher: LinearHead, labels: Tensor | None, objective: Objective) -> dict[str, Tensor]:
    """Fields of `fusedmm.eager.distillation_scores` by name, without a second pass, of rows none of which is ignored;
    grad_norm without the norm of hidden.

    Classes-major, so that a vector holds rows, the teacher's beside the student's, so that one operator takes both:
    [V, 2 N]. 4096 rows of 32 classes from 64 features: 34 MFLOP and one pass over 1 MiB of logits, 0.25 ms on a core
    of an EPYC (Zen 5); this takes 1.0 ms, 0.3 of them in the two matmuls and the rest in some 70 unfused operators, and
    1.7 after other work. Halving the rows, so that L2 holds them, costs more calls than it saves.
    """
    classes, rows = student.weight.shape[0], student.hidden.shape[0]
    if rows * classes <= CALL_ELEMENTS:
        return _scores_of_a_call(student, teacher, labels, objective)
    scale, unit = 0.5 * LOG2_E / objective.temperature, 2 * LN_2  # 2 ** log is the root of a power
    logs = student.hidden.new_empty((classes, 2 * rows), dtype=compute_dtype(student.hidden))
    log_p, log_t = logs.chunk(2, 1)
    _few_logits(student, scale, log_p)
    _few_logits(teacher, scale, log_t)
    logs.sub_(logs.amax(0))
    roots, ones = torch.empty_like(logs), ones_to_sum(logs, classes)
    best, teacher_best = objective.shard.first_top(logs.t(), roots.t()).chunk(2)
    torch.exp2(logs, out=roots)
    powers = roots * roots
    most = _sum(powers, ones).reciprocal_()  # powers times this are the probabilities
    offsets = most.log2().mul_(0.5)  # of logarithms of roots of probabilities from `logs`
    (confidence, teacher_confidence), (offset, teacher_offset) = most.chunk(2), offsets.chunk(2)
    p, t = powers.chunk(2, 1)
    root_p, root_t = roots.chunk(2, 1)
    if labels is not None:
        flat, index = logs.view(-1), torch.arange(rows, device=labels.device).add_(labels, alpha=2 * rows)
        label, teacher_label = flat.index_select(0, index), flat[rows:].index_select(0, index)
    share = teacher_confidence / confidence  # differences are of what sums to 1 / confidence
    torch.addcmul(root_p, root_t, share.sqrt(), value=-1, out=root_t)
    torch.addcmul(p, t, share, value=-1, out=root_p)
    square, distance = _sum(roots.mul_(roots), ones).chunk(2)
    entropy, teacher_entropy = (
        torch.addcmul(offsets, _sum(torch.mul(powers, logs, out=roots), ones), most).mul_(-unit).chunk(2)
    )
    ratio = log_t.sub_(log_p)
    torch.mul(p, ratio, out=root_p)
    torch.mul(t, ratio, out=root_t)
    reverse, forward = _sum(roots, ones).mul_(most).chunk(2)
    gap = share.log2_()  # more exact than a difference of offsets, and twice that
    fields = {
        "forward_kl": forward.add_(gap, alpha=0.5).mul_(unit),
        "reverse_kl": reverse.add_(gap, alpha=0.5).mul_(-unit),
        "hellinger": distance.mul_(confidence).mul_(0.5),  # 1 - sum sqrt(p t), without cancellation
        "student_entropy": entropy,
        "teacher_entropy": teacher_entropy,
        "student_confidence": confidence,
        "teacher_confidence": teacher_confidence,
        "agreement": (best == teacher_best).to(logs.dtype),
        "grad_norm": square.sqrt_().mul_(confidence),
    }
    if labels is not None:
        powers.view(-1).index_fill_(0, index, 0.0)
        torch.mul(p, p, out=t)
        others, squares = _sum(powers, ones).chunk(2)
        flat.index_fill_(0, index, -torch.inf)
        fields |= {
            "margin": (label - log_p.amax(0)).mul_(unit),
            "student_nll": (nll := label.add_(offset).mul_(-unit)),
            "teacher_nll": (teacher_nll := teacher_label.add_(teacher_offset).mul_(-unit)),
            "excess_loss": nll - teacher_nll,
            "el2n": torch.addcmul(squares, others, others).sqrt_().mul_(confidence),
        }
    return fields


def _scores_of_a_call(
    student: LinearHead, teacher: LinearHead, labels: Tensor | None, objective: Objective
) -> dict[str, Tensor]:
    """The same of so few logits that half as many operators, each slower, take less time."""
    logits = torch.stack([logits_of(student, 1), logits_of(teacher, 1)])
    if objective.temperature != 1.0:
        logits.div_(objective.temperature)
    logs = torch.log_softmax(logits, -1)
    probabilities = torch.exp(logs)
    (log_p, log_t), (p, t) = logs.unbind(), probabilities.unbind()
    entropy, teacher_entropy = torch.mul(probabilities, logs).sum(-1).neg_().unbind()
    reverse, forward = torch.mul(probabilities, log_t - log_p).sum(-1).unbind()
    confidence, teacher_confidence = probabilities.amax(-1).unbind()
    root_p, root_t = probabilities.sqrt().unbind()
    best, teacher_best = logits.argmax(-1).unbind()
    fields = {
        "forward_kl": forward,
        "reverse_kl": reverse.neg_(),
        "hellinger": root_t.sub_(root_p).square_().sum(-1).mul_(0.5),
        "student_entropy": entropy,
        "teacher_entropy": teacher_entropy,
        "student_confidence": confidence,
        "teacher_confidence": teacher_confidence,
        "agreement": (best == teacher_best).to(logs.dtype),
        "grad_norm": torch.linalg.vector_norm(t.sub_(p), dim=-1),
    }
    if labels is not None:
        index, z = labels[:, None], logits[0]
        nll, teacher_nll = logs.gather(-1, index.expand(2, -1, 1))[..., 0].neg_().unbind()
        others = p.scatter_(1, index, 0.0)
        fields |= {
            "student_nll": nll,
            "teacher_nll": teacher_nll,
            "excess_loss": nll - teacher_nll,
            "el2n": torch.hypot(others.sum(-1), torch.linalg.vector_norm(others, dim=-1)),
            "margin": z.gather(1, index)[:, 0] - z.scatter_(1, index, -torch.inf).amax(-1),
        }
    return fields


def _few_logits(head: LinearHead, scale: float, out: Tensor) -> None:
    """Write `scale` times the logits [V, N]."""
    weight, hidden = cast(head.weight, out.dtype), cast(head.hidden, out.dtype).t()
    if 2 * weight.numel() * hidden.shape[1] <= MKL_FLOPS:
        torch.addmm(out, weight, hidden, beta=0.0, alpha=scale, out=out)
    else:
        multiply(weight, hidden, out, scale)
    if head.bias is not None:
        out.add_((cast(head.bias, out.dtype).clamp_min(FINITE_MINIMUM) * scale)[:, None])


def _sum(x: Tensor, ones: Tensor | None) -> Tensor:
    """Sum over the classes of what is classes-major."""
    return x.sum(0) if ones is None else ones @ x
