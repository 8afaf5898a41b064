"""Distillation scores and losses of two heads whose logits are never formed as a whole."""

import math
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fusedmm.eager.distillation_scores import LABEL_FIELDS, SECOND_PASS_FIELDS
from fusedmm.eager.products import compute_dtype
from fusedmm.eager.shard import Shard
from fusedmm.heads import Head, LinearHead, Logits, Teacher, TopKLogProbs
from fusedmm.ops import distillation_autograd
from fusedmm.ops.distillation_inputs import Inputs, check_constant, check_fraction, check_inputs
from fusedmm.ops.distillation_op import problem_of, weighted_sum
from fusedmm.reference import distillation as reference
from fusedmm.shapes import FLOATS, as_number, check_device, check_dtype, check_shapes, check_type

MEMORIES = ("fast", "lean")
REDUCTIONS = ("mean", "sum", "none")


class DistillationScores(NamedTuple):
    """How far a student is from its teacher, row by row: each field [N] float32 (float64 for float64 heads), or None
    where it does not apply.

    With p the student's and t the teacher's probabilities at the temperature, and z the student's logits:

    Attributes:
        forward_kl: ``sum t (log t - log p)``.
        reverse_kl: ``sum p (log p - log t)``.
        hellinger: ``1 - sum sqrt(p t)``.
        student_entropy: ``-sum p log p``.
        teacher_entropy: ``-sum t log t``; of the top-k classes and the bucket for a top-k teacher.
        student_confidence: ``max p``.
        teacher_confidence: ``max t``.
        agreement: 1 where both have the same argmax, else 0.
        grad_norm: ``norm(p - t)``, for a `LinearHead` times ``norm(hidden) / temperature``: the norm of the row's
            gradient in the weight under forward KL.
        student_nll: ``-log p_y`` at temperature 1; this and the next four need labels.
        teacher_nll: ``-log t_y`` at temperature 1; None for a top-k teacher, which may not know it.
        excess_loss: ``student_nll - teacher_nll``: reducible holdout loss (RHO-LOSS, Rho-1, DoReMi).
        el2n: ``norm(p - onehot(y))`` at temperature 1.
        margin: ``z_y - max_{v != y} z_v`` at temperature 1; inf where there is but one class.
        divergence: the generalised Jensen-Shannon divergence at `beta`, where beta is given.
        total_variation: ``sum abs(p - t) / 2``, where 0 < beta < 1, as it needs the same second pass.
    """

    forward_kl: Tensor
    reverse_kl: Tensor
    hellinger: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_confidence: Tensor
    teacher_confidence: Tensor
    agreement: Tensor
    grad_norm: Tensor
    student_nll: Tensor | None
    teacher_nll: Tensor | None
    excess_loss: Tensor | None
    el2n: Tensor | None
    margin: Tensor | None
    divergence: Tensor | None
    total_variation: Tensor | None


def distillation_scores(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    beta: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> DistillationScores:
    """Score every row of a batch by how student and teacher differ; forward only, all fields from one pass over both
    heads.

    Args:
        student: `LinearHead` or `Logits` of N rows.
        teacher: `LinearHead`, `Logits` or `TopKLogProbs` of the same rows; its hidden size may differ.
        labels: [N] int64, or None. A label that is no class is refused on a CPU; on a GPU, where to look is to wait, it
            is not noticed.
        temperature: positive number, or [N] tensor; divides the logits of both.
        beta: which divergence to compute beside the fixed fields, see `distillation_loss`; between 0 and 1 exclusive it
            costs a second pass.
        ignore_index: rows with this label are 0 in every field.
        impl: "auto" (Triton on CUDA, eager elsewhere), "triton", "eager" or "reference".

    Returns:
        `DistillationScores`; nothing in it has a gradient.

    Raises:
        TypeError, ShapeError, ValueError, NotImplementedError: as the message says.

    Under `torch.autocast` hidden states, weights and biases are taken in its dtype, as `torch.nn.functional.linear`
    does; all after the matmul is float32.

    Cost: ``2 N V (Ds + Dt)`` FLOPs (twice that with a second pass), ``2 N V Ds`` for a top-k teacher. Bytes: the
        weights once for every block of rows, O(N) extra memory; eager holds one wave of logits.

    Source: RHO-LOSS, Mindermann et al. 2022, eq. 3; el2n and GraNd, Paul et al. 2021; generalised JSD, Agarwal et al.
        2024 (GKD), eq. 1.
    """
    op = "distillation_scores"
    if beta is not None:
        beta = check_fraction(op, "beta", beta)
    inputs = check_inputs(op, student, teacher, labels, temperature, impl)
    all_count = _check_labels(op, inputs, ignore_index)
    second_pass = beta is not None and 0.0 < beta < 1.0
    if inputs.impl == "reference":
        fields = reference.scores(*_whole(inputs), num_classes=inputs.shard.total, beta=beta, ignore_index=ignore_index)
        return _named({name: field.detach().to(compute_dtype(inputs.rows)) for name, field in fields.items()})
    problem = problem_of(inputs, beta=beta or 0.0, ignore_index=ignore_index, all_count=all_count)
    given = distillation_autograd.scores(problem, second_pass, is_unwatched=inputs.has_passed)
    if beta is not None and not second_pass:
        given["divergence"] = given["forward_kl"] if beta == 0.0 else given["reverse_kl"]
    absent: tuple[str, ...] = () if second_pass else SECOND_PASS_FIELDS if beta is None else ("total_variation",)
    if labels is None:
        absent += LABEL_FIELDS
    elif isinstance(teacher, TopKLogProbs):
        absent += ("teacher_nll", "excess_loss")
    for name in absent:
        given.pop(name, None)
    return _named(given)


def _named(fields: dict[str, Tensor]) -> DistillationScores:
    """Scores by name; those that do not apply are None."""
    return DistillationScores(*map(fields.get, DistillationScores._fields))  # type: ignore[arg-type]


def distillation_loss(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    memory: str = "fast",
    impl: str = "auto",
) -> Tensor:
    """Distil a teacher into a student, with a share of cross entropy, without ever forming the logits of all rows.

    With p and t the probabilities of student and teacher at the temperature T::

        mix    = beta * t + (1 - beta) * p
        D      = beta * KL(t || mix) + (1 - beta) * KL(p || mix)       # beta == 0: KL(t || p); beta == 1: KL(p || t)
        loss_n = alpha * T**2 * D + (1 - alpha) * cross_entropy(student logits, labels, label_smoothing)
        loss   = (row_weight * loss_n).sum() / normalizer

    Args:
        student: `LinearHead` or `Logits` of N rows; its tensors get gradients.
        teacher: `LinearHead`, `Logits` or `TopKLogProbs` of the same rows; frozen unless its tensors require grad (then
            memory must be "lean").
        labels: [N] int64; needed where alpha < 1, else only for `ignore_index`.
        beta: 0 is forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence.
        temperature: positive number, or [N] tensor without gradient.
        alpha: share of the divergence, 0 to 1; at 0 the teacher is not read.
        label_smoothing: of the cross entropy, 0 to 1.
        row_weight: [N] floating point without gradient, or None for 1; a row of weight 0 is ignored as well.
        ignore_index: rows with this label count nothing and have no gradient, whatever they hold, NaN included.
        reduction: "mean", "sum" or "none" ([N], where the gradient of every row may differ).
        normalizer: what "mean" divides by; default the sum of the weights of the rows that count. Under data
            parallelism pass the sum over ranks. A tensor of 0 means that no row counts anywhere: the loss is 0.
        memory: "fast" takes the gradient in the forward, wave by wave; "lean" keeps O(N) numbers and forms the logits
            again in the backward. Reduction "none" always does the latter.
        impl: "auto" (Triton on CUDA, eager elsewhere), "triton", "eager" or "reference".

    Returns:
        Scalar, or [N] for "none"; float32 (float64 for float64 heads). With no row that counts it is 0.

    Raises:
        TypeError, ShapeError, ValueError, NotImplementedError: as the message says.

    A head with `group` has its classes split over ranks: every rank must call, gets the same loss, and the gradient of
    hidden is the sum over ranks; O(N) numbers are exchanged, no logits ("reference" gathers the heads). Under
    `torch.autocast` hidden states, weights and biases are taken in its dtype, as `torch.nn.functional.linear` does; all
    after the matmul is float32. Differentiable once: the backward of a gradient is refused.

    Cost: fast ``2 N V (3 Ds + Dt)`` FLOPs with both gradients, without a weight gradient ``2 N V (2 Ds + Dt)``; lean
        ``2 N V (2 Ds + 2 Dt)`` more at most ``2 N V (Ds + Dt)`` for the second pass of 0 < beta < 1. A top-k teacher
        has Dt = 0 and no second pass. Bytes: a wave of logits is written once and read once a pass; no buffer for a
        gradient that nobody asked for.

    Source: Hinton et al. 2015 (the factor T**2); Agarwal et al. 2024 (GKD), eq. 1.
    """
    op = "distillation_loss"
    beta, alpha = check_fraction(op, "beta", beta), check_fraction(op, "alpha", alpha)
    label_smoothing = check_fraction(op, "label_smoothing", label_smoothing)
    if memory not in MEMORIES:
        raise ValueError(f"{op}: memory must be one of {', '.join(map(repr, MEMORIES))}, got {memory!r}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}.")
    if alpha < 1.0 and labels is None:
        raise ValueError(
            f"{op}: labels must be given where alpha < 1, got None with alpha={alpha}. "
            "The rest of the loss is cross entropy."
        )
    if normalizer is not None and reduction != "mean":
        raise ValueError(f'{op}: normalizer divides reduction="mean" only, got reduction={reduction!r}. Leave it out.')
    inputs = check_inputs(op, student, teacher, labels, temperature, impl)
    all_count = _check_labels(op, inputs, ignore_index) and row_weight is None
    _check_weights(op, inputs, row_weight, normalizer)
    if row_weight is not None:  # a row of weight 0 is ignored: what it holds, NaN too, is not looked at
        counts = int(ignore_index == 0) if labels is None else labels
        inputs = inputs._replace(labels=torch.where(row_weight == 0, ignore_index, counts))
    row_scale = _row_scale(inputs, row_weight, ignore_index, reduction, normalizer, all_count=all_count)
    if memory == "fast" and not isinstance(inputs.teacher, TopKLogProbs) and True in _needs(inputs.teacher):
        raise ValueError(
            f'{op}: teacher must not require grad with memory="fast", got one that does. '
            'Detach it, or pass memory="lean".'
        )
    if inputs.impl == "reference":
        rows = reference.loss(
            *_whole(inputs),
            num_classes=inputs.shard.total,
            beta=beta,
            alpha=alpha,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
        rows = rows * row_scale
        return (rows if reduction == "none" else rows.sum()).to(compute_dtype(inputs.rows))
    if all_count and alpha == 1.0:  # then labels say nothing
        inputs = inputs._replace(labels=None)
    problem = problem_of(
        inputs,
        beta=beta,
        alpha=alpha,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        all_count=all_count,
    )
    needs, is_unwatched = _needs(inputs.student), inputs.has_passed and row_weight is None
    if memory == "fast" and reduction != "none" and True in needs:
        return distillation_autograd.loss(problem, row_scale, needs, is_unwatched=is_unwatched)
    rows = distillation_autograd.losses(problem, is_unwatched=is_unwatched)
    return rows * row_scale if reduction == "none" else weighted_sum(rows, row_scale)


def _check_weights(op: str, inputs: Inputs, row_weight: Tensor | None, normalizer: float | Tensor | None) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"{op}: normalizer must be a number or a tensor of one, got shape {list(normalizer.shape)}. Sum it "
                "first."
            )
        check_constant(op, "normalizer", normalizer)
    elif normalizer is not None and not 0 < abs(as_number(op, "normalizer", normalizer)) < math.inf:
        raise ValueError(
            f"{op}: normalizer must be finite and not 0, got {normalizer}. Leave it out to divide by the sum of the "
            "weights, or pass a tensor, where 0 gives 0."
        )
    if row_weight is None:
        return
    check_shapes(op, {"row_weight": (row_weight, ("row",))}, {"row": inputs.rows.shape[0]})
    check_dtype(op, "row_weight", row_weight, FLOATS, ". Use row_weight.float().")
    check_device(op, {"student": inputs.rows, "row_weight": row_weight})
    check_constant(op, "row_weight", row_weight)


def _row_scale(
    inputs: Inputs,
    row_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    *,
    all_count: bool,
) -> Tensor | float:
    """What the loss of every row is multiplied by: [N], 0 where it is ignored, or one number for all."""
    num_rows, dtype = inputs.rows.shape[0], compute_dtype(inputs.rows)
    is_mean = reduction == "mean" and normalizer is None
    if all_count and not isinstance(normalizer, Tensor):
        scale = 1.0 / (max(num_rows, 1) if is_mean else normalizer or 1.0)
        return scale if isinstance(scale, float) else inputs.rows.new_full((num_rows,), scale, dtype=dtype)  # traced
    weight = inputs.rows.new_ones((num_rows,), dtype=dtype) if row_weight is None else row_weight.to(dtype)
    if inputs.labels is not None:
        weight = torch.where(inputs.labels == ignore_index, 0.0, weight)
    if is_mean:
        total = weight.sum()
        return weight / torch.where(total == 0, 1.0, total)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(dtype).reshape(())
        return weight / torch.where(normalizer == 0, torch.inf, normalizer)
    return weight / (normalizer or 1.0)


def _check_labels(op: str, inputs: Inputs, ignore_index: int) -> bool:
    """Refuse labels that are no class, where reading them waits for nothing: on a CPU. Returns whether it is known that
    no row is ignored.
    """
    check_type(op, "ignore_index", ignore_index, int, "It is the label of rows that do not count.")
    labels, classes = inputs.labels, inputs.shard.total
    if isinstance(inputs.teacher, TopKLogProbs):
        _check_indices(op, inputs.teacher.indices, classes)
    if labels is None:
        return True
    if not labels.is_cpu or torch.compiler.is_compiling() or labels.numel() == 0:
        return False
    lowest, highest = labels.aminmax()
    low, high = lowest.item(), highest.item()
    if low < 0 or high >= classes:
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        if bool(wrong.any()):
            raise ValueError(
                f"{op}: labels must be 0 to {classes - 1} or ignore_index={ignore_index}, got {int(labels[wrong][0])}. "
                "Give rows without a label ignore_index."
            )
    return not low <= ignore_index <= high


def _check_indices(op: str, indices: Tensor, classes: int) -> None:
    """Refuse classes of a top-k teacher that are none, where reading them waits for nothing."""
    if not indices.is_cpu or torch.compiler.is_compiling() or indices.numel() == 0:
        return
    low, high = (bound.item() for bound in indices.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{op}: teacher.indices must be 0 to {classes - 1}, got {low if low < 0 else high}. A slot that is not "
            "used has any class, and log_probs of -inf."
        )


def _whole(inputs: Inputs) -> tuple[Head, Teacher, Tensor | None, Tensor]:
    """Arguments of the reference: heads with the classes of all ranks, the temperature as a float64 tensor."""
    if inputs.row_temperature is not None:
        temperature = inputs.row_temperature.double()
    else:
        temperature = inputs.rows.new_full((inputs.rows.shape[0],), inputs.temperature, dtype=torch.float64)
    student, shard = cast(Head, _whole_head(inputs.student, inputs.shard)), inputs.shard
    return student, _whole_head(inputs.teacher, shard), inputs.labels, temperature


def _whole_head(head: Teacher, shard: Shard) -> Teacher:
    if shard.group is None or isinstance(head, TopKLogProbs):
        return head
    if isinstance(head, Logits):
        return replace(head, values=shard.whole(head.values.double().T).T)
    bias = None if head.bias is None else shard.whole(head.bias.double())
    return replace(head, weight=shard.whole(head.weight.double()), bias=bias)


def _needs(head: Head) -> tuple[bool, bool, bool]:
    """Whether input, weight and bias get a gradient."""
    if not torch.is_grad_enabled():
        return False, False, False
    if not isinstance(head, LinearHead):
        return head.values.requires_grad, False, False
    return head.hidden.requires_grad, head.weight.requires_grad, head.bias is not None and head.bias.requires_grad
