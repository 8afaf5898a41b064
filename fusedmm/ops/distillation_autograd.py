"""The registered operators of distillation as autograd sees them.

Where nothing needs a gradient the autograd functions are skipped, and where nothing watches the call, so is the
dispatcher.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedmm.eager.distillation_scores import FIELDS
from fusedmm.eager.products import cast, compute_dtype
from fusedmm.heads import TopKLogProbs
from fusedmm.ops.dispatch import apply_unwatched, is_batched, is_watched
from fusedmm.ops.distillation_op import (
    TENSORS,
    Problem,
    below_autograd,
    fragment,
    head_tensors,
    implement,
    of_rows,
    rebuild,
)
from fusedmm.ops.first_order import first_order


class _Fast(torch.autograd.Function):
    """The gradient is taken in the forward; the backward multiplies it by the one number that comes from upstream.

    The student's tensors are arguments, for autograd alone: all is in `run`, as an argument costs a microsecond.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        needs: Sequence[bool],
        run: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]],
    ) -> Tensor:
        loss, *gradients = run()
        ctx.save_for_backward(student, weight, bias, *gradients)  # the first for `first_order` alone
        ctx.set_materialize_grads(False)
        ctx.needs = needs
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 5
        # On a CPU a number is read for nothing, and the upstream of a loss is mostly 1: that saves a pass over the
        # largest tensors. Whoever changes such a gradient in place cannot run this backward again; autograd says so.
        is_plain = type(grad_loss) is Tensor and not is_batched((grad_loss,))
        is_one = is_plain and grad_loss.is_cpu and grad_loss.item() == 1.0
        gradients = [
            None if not needed else gradient if is_one else gradient * grad_loss
            for gradient, needed in zip(ctx.saved_tensors[3:], ctx.needs, strict=True)
        ]
        return (*gradients, None, None)


class _Rows(torch.autograd.Function):
    """Only O(N) is kept; the backward forms the logits again, for the student and, with the roles exchanged, for a
    teacher that wants a gradient.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        rows, statistics = below_autograd("distillation_rows", arguments)
        ctx.save_for_backward(statistics, *arguments[:TENSORS])
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.numbers = arguments[TENSORS:]
        return rows, statistics

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_rows: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        statistics, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * 6
        if grad_rows is not None:
            arguments = (*tensors, *ctx.numbers)
            if any(needs[:3]):
                gradients[:3] = _gradients(arguments, grad_rows, statistics, needs[:3])
            if any(needs[3:6]):
                problem = rebuild(arguments)
                exchanged = _exchange(problem)
                rows = cast(grad_rows * problem.objective.alpha, compute_dtype(exchanged.student.source))
                gradients[3:] = _gradients(exchanged.flat(), rows, _exchange_statistics(statistics), needs[3:6])
        return (*gradients, *([None] * (len(needs) - 6)))


def _gradients(
    arguments: Sequence[Any], grad_rows: Tensor, statistics: Tensor, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Of the student; None where not needed."""
    computed = below_autograd("distillation_backward", (*arguments, grad_rows, statistics, *needs), (grad_rows,))
    return [gradient if needed else None for gradient, needed in zip(computed, needs, strict=True)]


def _exchange(problem: Problem) -> Problem:
    """The same divergence with student and teacher exchanged (beta becomes 1 - beta) and without the cross entropy,
    which has no teacher.
    """
    assert not isinstance(problem.teacher, TopKLogProbs)  # it has no gradient
    objective = problem.objective._replace(beta=1.0 - problem.objective.beta, alpha=1.0)
    return problem._replace(student=problem.teacher, teacher=problem.student, objective=objective)


def _exchange_statistics(statistics: Tensor) -> Tensor:
    """Saved statistics of the exchanged heads: the first 12 rows are pairs of student and teacher; ratios of the two
    (rows 8, 9 and 15) change their sign.
    """
    if statistics.shape[0] == 0:
        return statistics
    pairs = statistics[:12].reshape(6, 2, -1).flip(1).reshape(12, -1)
    exchanged = torch.cat([pairs, statistics[12:]])
    exchanged[8:10].neg_()
    exchanged[15].neg_()
    return exchanged


def _wants_gradient(arguments: Sequence[Any]) -> bool:
    if forward_ad._current_level >= 0:  # refused by the autograd functions; without them tangents would be lost
        return True
    return torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in arguments[:6]
    )


def _fast(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients, of which only the loss has a history."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = below_autograd("distillation_fast", arguments)
    if not _wants_gradient(arguments):
        return result
    return _Fast.apply(*arguments[:3], arguments[-3:], lambda: result), *result[1:]  # type: ignore[no-untyped-call]


def _rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    if _wants_gradient(arguments):
        return _Rows.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return below_autograd("distillation_rows", arguments)  # type: ignore[no-any-return]


def scores(problem: Problem, second_pass: bool, *, is_unwatched: bool = False) -> dict[str, Tensor]:
    """Fields by name, those at least that apply. ``is_unwatched``, here and below: the caller knows that it is not."""
    if not is_unwatched and is_watched(problem.tensors):
        with torch.no_grad():
            fields = torch.ops.fusedmm.distillation_scores(*problem.flat(), second_pass)
        return dict(zip(FIELDS, fields, strict=True))
    return implement("distillation_scores", problem, second_pass)  # type: ignore[no-any-return]


def losses(problem: Problem, *, is_unwatched: bool = False) -> Tensor:
    """Loss of every row [N], whose backward forms the logits again."""
    if not is_unwatched and is_watched(problem.tensors):
        return torch.ops.fusedmm.distillation_rows(*problem.flat())[0]  # type: ignore[no-any-return]
    if _wants_gradient(problem.tensors):
        return apply_unwatched(_Rows, *problem.flat())[0]  # type: ignore[no-any-return]
    return implement("distillation_rows", problem)[0]  # type: ignore[no-any-return]


def loss(
    problem: Problem, row_scale: Tensor | float, needs: tuple[bool, bool, bool], *, is_unwatched: bool = False
) -> Tensor:
    """Sum of the losses of the rows times ``row_scale``, [N] or one for all, with the gradients that the student
    ``needs``, one at least, taken at once.
    """
    if not is_unwatched and is_watched(problem.tensors):
        rows = of_rows(row_scale, problem.student.source)
        return torch.ops.fusedmm.distillation_fast(*problem.flat(), rows, *needs)[0]  # type: ignore[no-any-return]
    run = partial(implement, "distillation_fast", problem, row_scale, *needs)
    return apply_unwatched(_Fast, *head_tensors(problem.student), needs, run)  # type: ignore[no-any-return]


fragment.impl("distillation_fast", _fast, "Autograd")
fragment.impl("distillation_rows", _rows, "Autograd")
