"""Losses and scores of few logits, all rows at once: there the calls of operators cost more than their passes.

PyTorch's fused softmax does in one call what a wave does in five. Of fewer classes than a vector holds it goes number
by number, ten times as slowly as a wave that lies classes-major. The rest is the same: differences of logarithms are
taken before they are weighted, and a saturated row's gradient is made to sum to 0. What is not common (soft-caps,
padding, ignored rows, split classes, temperatures by row) goes the way of the waves.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.eager.products import cast, compute_dtype, multiply
from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import FEW_CLASSES, FINITE_MINIMUM, WHOLE_ELEMENTS, clear_forbidden
from fusedmm.heads import LinearHead, Teacher

if TYPE_CHECKING:
    from fusedmm.eager.distillation import Objective

LOG2_E = 1 / math.log(2.0)
FEW_ELEMENTS = 1 << 18  # of logits with few classes, which may all be held
VECTOR = 16  # float32 numbers
SCALAR_ELEMENTS = 1 << 11  # of logits with fewer classes
SATURATED = math.log(8 / 9)  # log-probability of a top class beyond which 1 - p loses more than three bits


def suits(student: Teacher, teacher: Teacher, temperature: Tensor | None, objective: "Objective") -> bool:
    """Whether `loss` serves this."""
    if type(student) is not LinearHead or temperature is not None or objective.label_smoothing != 0.0:
        return False
    rows, classes = student.hidden.shape[0], student.weight.shape[0]
    limit = SCALAR_ELEMENTS if classes < VECTOR else FEW_ELEMENTS if classes <= FEW_CLASSES else WHOLE_ELEMENTS
    return (
        0 < rows * classes <= limit
        and _is_whole(student, objective.shard)
        and (objective.alpha == 0.0 or (objective.alpha == 1.0 and _are_alike(student, teacher, objective.shard)))
    )


def suits_scores(
    student: Teacher, teacher: Teacher, labels: Tensor | None, temperature: Tensor | None, objective: "Objective"
) -> bool:
    """Whether `scores` serves this."""
    if type(student) is not LinearHead or temperature is not None:
        return False
    rows, classes = student.hidden.shape[0], student.weight.shape[0]
    return (
        0 < rows * classes <= SCALAR_ELEMENTS * (1 if classes < VECTOR else 2)
        and (objective.temperature == 1.0 or labels is None)
        and _is_whole(student, objective.shard)
        and _are_alike(student, teacher, objective.shard)
    )


def _is_whole(head: LinearHead, shard: Shard) -> bool:
    return head.softcap is None and shard.group is None and head.weight.shape[0] == shard.count


def _are_alike(student: LinearHead, teacher: Teacher, shard: Shard) -> bool:
    return (
        type(teacher) is LinearHead
        and _is_whole(teacher, shard)
        and compute_dtype(teacher.hidden) == compute_dtype(student.hidden)
    )


def loss(
    student: LinearHead,
    teacher: Teacher,
    labels: Tensor | None,
    objective: "Objective",
    grad_rows: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """As `fusedmm.eager.distillation.loss`, of rows none of which is ignored."""
    temperature = 1.0 if objective.alpha == 0.0 else objective.temperature
    log_p = _log_probabilities(student, temperature)
    factor = None if grad_rows is None else (grad_rows if temperature == 1.0 else grad_rows * temperature)[:, None]
    if objective.alpha == 0.0:
        assert labels is not None
        rows, grad = _cross_entropy(log_p, labels, factor)
    else:
        assert isinstance(teacher, LinearHead)
        rows, grad = _divergence(log_p, _log_probabilities(teacher, temperature), objective.beta, factor)
        if temperature != 1.0:
            rows.mul_(temperature * temperature)
    empty = student.hidden.new_empty((0,))
    if grad is None:
        return rows, (empty, empty, empty)
    if log_p.amax().item() > SATURATED:
        top = log_p.gt_(SATURATED)  # 1 at a class that saturates its row, else 0
        grad.addcmul_(top, grad.sum(-1, keepdim=True), value=-1.0)
    clear_forbidden(grad, rows, student, slice(None))
    hidden, weight, dtype = student.hidden, student.weight, grad.dtype
    grad_input = cast(multiply(grad, cast(weight, dtype)), hidden.dtype) if needs[0] else empty
    grad_weight = cast(multiply(grad.t(), cast(hidden, dtype)), hidden.dtype) if needs[1] else empty
    grad_bias = cast(grad.sum(0), hidden.dtype) if needs[2] else empty
    return rows, (grad_input, grad_weight, grad_bias)


def scores(
    student: LinearHead, teacher: LinearHead, labels: Tensor | None, objective: "Objective"
) -> dict[str, Tensor]:
    """Fields of `fusedmm.eager.distillation_scores` by name, without a second pass, of rows none of which is ignored;
    grad_norm without the norm of hidden.
    """
    logits = torch.stack([_logits(head, objective.temperature) for head in (student, teacher)])
    logs = torch.log_softmax(logits, -1)
    probabilities = torch.exp(logs)
    (log_p, log_t), (p, t) = logs.unbind(), probabilities.unbind()
    entropy, teacher_entropy = torch.mul(probabilities, logs).sum(-1).neg_().unbind()
    reverse, forward = torch.mul(probabilities, log_t - log_p).sum(-1).unbind()
    student_confidence, teacher_confidence = probabilities.amax(-1).unbind()
    root_p, root_t = probabilities.sqrt().unbind()
    best, teacher_best = logits.argmax(-1).unbind()
    fields = {
        "forward_kl": forward,
        "reverse_kl": reverse.neg_(),
        "hellinger": root_t.sub_(root_p).square_().sum(-1).mul_(0.5),  # 1 - sum sqrt(p t), without cancellation
        "student_entropy": entropy,
        "teacher_entropy": teacher_entropy,
        "student_confidence": student_confidence,
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


def _logits(head: LinearHead, temperature: float) -> Tensor:
    dtype = compute_dtype(head.hidden)
    logits = multiply(cast(head.hidden, dtype), cast(head.weight, dtype).t())
    if head.bias is not None:
        logits.add_(cast(head.bias, dtype).clamp_min(FINITE_MINIMUM))
    if temperature != 1.0:
        logits.div_(temperature)
    return logits


def _log_probabilities(head: LinearHead, temperature: float) -> Tensor:
    return torch.log_softmax(_logits(head, temperature), -1)


def _powers(logarithms: Tensor) -> Tensor:
    """exp; of more than a few, in a third of its time."""
    if logarithms.numel() <= SCALAR_ELEMENTS:
        return torch.exp(logarithms)
    return torch.mul(logarithms, LOG2_E).exp2_()


def _cross_entropy(log_p: Tensor, labels: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[rows] and, with a factor [rows, 1], its gradient in the logits times that."""
    rows = F.nll_loss(log_p, labels, reduction="none")
    if factor is None:
        return rows, None
    return rows, _powers(log_p).mul_(factor).scatter_add_(1, labels[:, None], -factor)


def _divergence(log_p: Tensor, log_t: Tensor, beta: float, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same of the generalised Jensen-Shannon divergence, by the formulas of `fusedmm.eager.distillation`; `log_t`
    is overwritten.
    """
    if beta == 0.0:
        t = _powers(log_t)
        rows = log_t.sub_(log_p).mul_(t).sum(-1)
        if factor is None:
            return rows, None
        return rows, torch._log_softmax_backward_data(t.mul_(-factor), log_p, -1, log_p.dtype, out=log_t)
    p = _powers(log_p)
    if beta == 1.0:
        ratio = torch.sub(log_p, log_t, out=log_t)
        rows = (p * ratio).sum(-1)
        return rows, None if factor is None else torch._softmax_backward_data(ratio.mul_(factor), p, -1, p.dtype)
    t = _powers(log_t)
    odds = log_t.sub_(log_p).add_(math.log(beta / (1 - beta)))
    log_share = F.softplus(odds)
    of_teacher = F.softplus(odds.neg_()).mul_(t).sum(-1)
    of_student = torch.mul(p, log_share, out=t).sum(-1)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    rows = entropy - of_teacher.mul_(beta).add_(of_student, alpha=1 - beta)
    if factor is None:
        return rows, None
    return rows, torch._softmax_backward_data(log_share.mul_(factor * (beta - 1)), p, -1, p.dtype)
