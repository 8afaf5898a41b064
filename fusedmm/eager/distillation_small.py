"""Losses of few logits, all rows at once: there the calls of operators cost more than their passes.

PyTorch's fused softmax does in one call what a wave does in five. Over fewer classes than a vector holds it goes number
by number, unless they are major, so that a vector holds rows. The rest is as in a wave: differences of logarithms are
taken before they are weighted, and a saturated row's gradient is made to sum to 0. What is not common (soft-caps,
padding, split classes, temperatures by row) is left to the waves, and so are ignored rows, which callers know of.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.eager.objective import Objective
from fusedmm.eager.products import LOG2_E, cast, compute_dtype, multiply
from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import CERTAIN, FEW_CLASSES, FINITE_MINIMUM, WHOLE_ELEMENTS, clear_forbidden
from fusedmm.heads import LinearHead, Teacher

FEW_ELEMENTS = 1 << 18  # of logits with few classes, which may all be held
VECTOR = 16  # float32 numbers
CALL_ELEMENTS = 1 << 11  # of logits, of which a pass costs no more than the call
SATURATED = math.log(CERTAIN)


def suits(student: Teacher, teacher: Teacher, row_temperature: Tensor | None, objective: Objective) -> bool:
    """Whether `loss` serves this, where no row is ignored."""
    if type(student) is not LinearHead or row_temperature is not None or objective.label_smoothing != 0.0:
        return False
    rows, classes = student.hidden.shape[0], student.weight.shape[0]
    return (
        0 < rows * classes <= (FEW_ELEMENTS if classes <= FEW_CLASSES else WHOLE_ELEMENTS)
        and is_whole(student, objective.shard)
        and (objective.alpha == 0.0 or are_alike(student, teacher, objective.shard))
    )


def is_whole(head: LinearHead, shard: Shard) -> bool:
    """Whether the logits are the product with all rows of the weight, and nothing after it but a bias."""
    return head.softcap is None and shard.group is None and head.weight.shape[0] == shard.count


def are_alike(student: LinearHead, teacher: Teacher, shard: Shard) -> bool:
    """Whether the teacher's logits can lie beside the student's."""
    return (
        type(teacher) is LinearHead
        and is_whole(teacher, shard)
        and compute_dtype(teacher.hidden) == compute_dtype(student.hidden)
    )


def logits_of(head: LinearHead, dim: int) -> Tensor:
    """Logits of a plain head: [V, N] where `dim`, that of the classes, is 0; else [N, V]."""
    dtype = compute_dtype(head.hidden)
    hidden, weight = cast(head.hidden, dtype), cast(head.weight, dtype)
    logits = multiply(weight, hidden.t()) if dim == 0 else multiply(hidden, weight.t())
    if head.bias is not None:
        logits.add_(cast(head.bias, dtype).clamp_min(FINITE_MINIMUM).unsqueeze(1 - dim))
    return logits


def loss(
    student: LinearHead,
    teacher: Teacher,
    labels: Tensor | None,
    objective: Objective,
    grad_rows: Tensor | float | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """As `fusedmm.eager.distillation.loss`, of rows none of which is ignored."""
    dim = 0 if student.weight.shape[0] < VECTOR else 1  # of the classes: major where they would not fill a vector
    alpha, temperature = objective.alpha, objective.temperature
    if isinstance(grad_rows, float):
        grad_rows = student.hidden.new_full((1,), grad_rows, dtype=compute_dtype(student.hidden))
    logits = logits_of(student, dim)
    wanted = dict.fromkeys([temperature] * (alpha != 0.0) + [1.0] * (alpha != 1.0))
    log_p = {t: _log_softmax(logits, t, dim) for t in wanted}
    parts = []
    if alpha != 0.0:
        assert isinstance(teacher, LinearHead)
        log_t = _log_softmax(logits_of(teacher, dim), temperature, dim)
        factor = None if grad_rows is None else _times(grad_rows, alpha * temperature).unsqueeze(dim)
        losses, grad = _divergence(log_p[temperature], log_t, objective.beta, factor, dim)
        parts.append((_times(losses, alpha * temperature * temperature), grad))
    if alpha != 1.0:
        assert labels is not None
        factor = None if grad_rows is None else _times(grad_rows, 1 - alpha).unsqueeze(dim)
        losses, grad = _cross_entropy(log_p[1.0], labels, factor, dim)
        parts.append((_times(losses, 1 - alpha), grad))
    rows, grad = parts[0]
    for more_rows, more_grad in parts[1:]:
        rows, grad = rows + more_rows, None if grad is None or more_grad is None else grad.add_(more_grad)
    empty = student.hidden.new_empty((0,))
    if grad is None:
        return rows, (empty, empty, empty)
    sharpest = log_p[min(log_p)]
    if sharpest.amax().item() > SATURATED:
        top = sharpest.gt_(SATURATED)  # 1 at a class that saturates its row, else 0
        grad.addcmul_(top, grad.sum(dim, keepdim=True), value=-1.0)
    grad = grad if dim == 1 else grad.t()
    clear_forbidden(grad, rows, student, slice(None))
    hidden, weight, dtype = student.hidden, student.weight, grad.dtype
    grad_input = cast(multiply(grad, cast(weight, dtype)), hidden.dtype) if needs[0] else empty
    grad_weight = cast(multiply(grad.t(), cast(hidden, dtype)), hidden.dtype) if needs[1] else empty
    grad_bias = cast(grad.sum(0), hidden.dtype) if needs[2] else empty
    return rows, (grad_input, grad_weight, grad_bias)


def _log_softmax(logits: Tensor, temperature: float, dim: int) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _powers(logarithms: Tensor) -> Tensor:
    """exp; of more than a few, in a third of its time."""
    if logarithms.numel() <= CALL_ELEMENTS:
        return torch.exp(logarithms)
    return torch.mul(logarithms, LOG2_E).exp2_()


def _cross_entropy(log_p: Tensor, labels: Tensor, factor: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """[N] and, with a factor of every row or of all, its gradient in the logits times that, classes in `dim`."""
    rows = F.nll_loss(log_p.transpose(dim, 1), labels, reduction="none")
    if factor is None:
        return rows, None
    index = labels.unsqueeze(dim)
    return rows, _powers(log_p).mul_(factor).scatter_add_(dim, index, -factor.expand(index.shape))


def _divergence(
    log_p: Tensor, log_t: Tensor, beta: float, factor: Tensor | None, dim: int
) -> tuple[Tensor, Tensor | None]:
    """The same of the generalised Jensen-Shannon divergence, by the formulas of `fusedmm.eager.distillation`; `log_t`
    is overwritten.
    """
    if beta == 0.0:
        t = _powers(log_t)
        rows = log_t.sub_(log_p).mul_(t).sum(dim)
        if factor is None:
            return rows, None
        return rows, torch._log_softmax_backward_data(t.mul_(-factor), log_p, dim, log_p.dtype, out=log_t)
    p = _powers(log_p)
    if beta == 1.0:
        ratio = torch.sub(log_p, log_t, out=log_t)
        rows = (p * ratio).sum(dim)
        return rows, None if factor is None else torch._softmax_backward_data(ratio.mul_(factor), p, dim, p.dtype)
    t = _powers(log_t)
    odds = log_t.sub_(log_p).add_(math.log(beta / (1 - beta)))
    log_share = F.softplus(odds)
    of_teacher = F.softplus(odds.neg_()).mul_(t).sum(dim)
    of_student = torch.mul(p, log_share, out=t).sum(dim)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    rows = entropy - of_teacher.mul_(beta).add_(of_student, alpha=1 - beta)
    if factor is None:
        return rows, None
    return rows, torch._softmax_backward_data(log_share.mul_(factor * (beta - 1)), p, dim, p.dtype)
