"""The registered operators behind distillation: scores, losses of rows, the loss with its gradient, and the gradient
alone.

All share one argument list, the "problem" laid flat: the tensors of both heads, then numbers. ``impl`` ("triton" or
"eager") is one of them, so that a call means the same on every device. Each has a fake for `torch.compile` and export;
the two losses have a hand-written autograd function, in `fusedmm.ops.distillation_autograd`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from fusedmm.eager import distillation as eager
from fusedmm.eager import distillation_scores as eager_scores
from fusedmm.eager.objective import Objective
from fusedmm.eager.products import compute_dtype
from fusedmm.eager.shard import Shard
from fusedmm.heads import Head, LinearHead, Logits, Teacher, TopKLogProbs
from fusedmm.ops.autocast import without_autocast
from fusedmm.ops.dispatch import is_batched, is_watched
from fusedmm.ops.distillation_inputs import Inputs

Triple = tuple[Tensor, Tensor, Tensor]

TENSORS, ARGUMENTS = 9, 21  # of a problem laid flat: how many tensors lead it, and all
fragment = library.Library("fusedmm", "FRAGMENT")
_PROBLEM = (
    "Tensor student, Tensor? student_weight, Tensor? student_bias, "
    "Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_indices, "
    "Tensor? labels, Tensor? row_temperature, float student_softcap, float teacher_softcap, "
    "float temperature, float beta, float alpha, float label_smoothing, "
    "int ignore_index, int total_classes, int first_class, int num_classes, str group, str impl"
)
_NEEDS = "bool needs_input, bool needs_weight, bool needs_bias"
fragment.define(f"distillation_scores({_PROBLEM}, bool second_pass) -> Tensor")
fragment.define(f"distillation_rows({_PROBLEM}) -> (Tensor, Tensor)")
fragment.define(f"distillation_fast({_PROBLEM}, Tensor grad_rows, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)")
fragment.define(
    f"distillation_backward({_PROBLEM}, Tensor grad_rows, Tensor statistics, {_NEEDS}) -> (Tensor, Tensor, Tensor)"
)


class Problem(NamedTuple):
    """What an operator is asked, in the form that its implementations take."""

    student: Head
    teacher: Teacher
    labels: Tensor | None
    row_temperature: Tensor | None
    objective: Objective
    impl: str

    @property
    def tensors(self) -> list[Tensor | None]:
        """All of them, as they lead a registered operator's arguments."""
        indices = self.teacher.indices if isinstance(self.teacher, TopKLogProbs) else None
        return [*head_tensors(self.student), *head_tensors(self.teacher), indices, self.labels, self.row_temperature]

    def flat(self) -> list[Any]:
        """Arguments of a registered operator."""
        student, teacher, objective = self.student, self.teacher, self.objective
        shard = objective.shard
        numbers = [
            student.softcap or 0.0,
            0.0 if isinstance(teacher, TopKLogProbs) else teacher.softcap or 0.0,
            objective.temperature,
            objective.beta,
            objective.alpha,
            objective.label_smoothing,
            objective.ignore_index,
            shard.total,
            shard.first,
            shard.count,
        ]
        return [*self.tensors, *numbers, "" if shard.group is None else shard.group.group_name, self.impl]


def problem_of(
    inputs: Inputs, *, beta: float, alpha: float = 1.0, label_smoothing: float = 0.0, ignore_index: int, all_count: bool
) -> Problem:
    """The problem of checked inputs."""
    objective = Objective(inputs.shard, beta, alpha, inputs.temperature, label_smoothing, ignore_index, all_count)
    return _problem(inputs.student, inputs.teacher, inputs.labels, inputs.row_temperature, objective, inputs.impl)


def _problem(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    row_temperature: Tensor | None,
    objective: Objective,
    impl: str,
) -> Problem:
    labels, row_temperature = (t if t is None else t.contiguous() for t in (labels, row_temperature))  # for kernels
    return Problem(student, teacher, labels, row_temperature, objective, impl)


def head_tensors(head: Teacher) -> list[Tensor | None]:
    match head:
        case LinearHead():
            return [head.hidden, head.weight, head.bias]
        case Logits():
            return [head.values, None, None]
        case TopKLogProbs():
            return [head.log_probs, None, None]


def of_rows(number: Tensor | float, source: Tensor) -> Tensor:
    """[N] in the compute dtype from one number for all rows of a tensor; a tensor as it is."""
    if isinstance(number, Tensor):
        return number
    return source.new_full((source.shape[0],), number, dtype=compute_dtype(source))


def weighted_sum(losses: Tensor, row_scale: Tensor | float) -> Tensor:
    """Sum of the losses of all rows [N], each times its scale, or one for all."""
    return torch.dot(losses, of_rows(row_scale, losses))


def rebuild(arguments: tuple[Any, ...]) -> Problem:
    """The problem of a registered operator's arguments."""
    student, student_weight, student_bias, values, weight, bias, indices, labels, row_temperature = arguments[:TENSORS]
    student_softcap, softcap, temperature, beta, alpha, smoothing, ignore_index, total, first, count, group, impl = (
        arguments[TENSORS:]
    )
    shard = Shard(total, first, count, _resolve_process_group(group) if group else None)
    objective = Objective(shard, beta, alpha, temperature, smoothing, ignore_index)
    teacher: Teacher = _head(values, weight, bias, softcap) if indices is None else TopKLogProbs(indices, values)
    own = _head(student, student_weight, student_bias, student_softcap)
    return _problem(own, teacher, labels, row_temperature, objective, impl)


def _head(source: Tensor, weight: Tensor | None, bias: Tensor | None, softcap: float) -> Head:
    if weight is None:
        return Logits(source, softcap=softcap or None)
    return LinearHead(source, weight, bias, softcap=softcap or None)


def _split(arguments: tuple[Any, ...], extra: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return arguments[:-extra], arguments[-extra:]


def _scores(problem: Problem, second_pass: bool) -> dict[str, Tensor]:
    if problem.impl == "triton":
        from fusedmm.ops import distillation_triton

        fields = distillation_triton.scores(problem, second_pass)
        return dict(zip(eager_scores.FIELDS, fields.unbind(0), strict=True))
    return eager_scores.scores(*problem[:5], second_pass)


def _rows(problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.impl == "triton":
        from fusedmm.ops import distillation_triton

        return distillation_triton.rows(problem)
    losses, _ = eager.loss(*problem[:5])
    return losses, losses.new_empty((0, losses.shape[0]))


def _fast(
    problem: Problem, grad_rows: Tensor | float, needs_input: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = needs_input, needs_weight, needs_bias
    if problem.impl == "triton":
        from fusedmm.ops import distillation_triton

        losses, gradients = distillation_triton.fast(problem, of_rows(grad_rows, problem.student.source), needs)
    else:
        losses, gradients = eager.loss(*problem[:5], grad_rows, needs)
    return weighted_sum(losses, grad_rows), *gradients


def _backward(
    problem: Problem,
    grad_rows: Tensor,
    statistics: Tensor,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Triple:
    needs = needs_input, needs_weight, needs_bias
    if problem.impl == "triton":
        from fusedmm.ops import distillation_triton

        return distillation_triton.backward(problem, grad_rows, statistics, needs)
    return eager.loss(*problem[:5], grad_rows.contiguous(), needs)[1]


def _fake_scores(*arguments: Any) -> Tensor:
    problem, _ = _split(arguments, 1)
    student: Tensor = problem[0]
    return student.new_empty((len(eager_scores.FIELDS), student.shape[0]), dtype=compute_dtype(problem[0]))


def _fake_rows(*problem: Any) -> tuple[Tensor, Tensor]:
    rows = problem[0].new_empty((problem[0].shape[0],), dtype=compute_dtype(problem[0]))
    return rows, rows.new_empty((_saved_statistics(problem), rows.shape[0]))


def _saved_statistics(problem: tuple[Any, ...]) -> int:
    """Rows of statistics that the Triton forward keeps for its backward."""
    indices, alpha = problem[6], problem[TENSORS + 4]
    if problem[-1] != "triton":
        return 0
    return 16 if indices is None or alpha == 0.0 else indices.shape[1] + 7


def _fake_gradients(problem: tuple[Any, ...], needs: tuple[bool, ...]) -> Triple:
    def empty(source: Tensor | None, needed: bool) -> Tensor:
        like: Tensor = problem[0]
        return source.new_empty(source.shape) if needed and source is not None else like.new_empty((0,))

    return empty(problem[0], needs[0]), empty(problem[1], needs[1]), empty(problem[2], needs[2])


def _fake_fast(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, (_, *needs) = _split(arguments, 4)
    return problem[0].new_empty((), dtype=compute_dtype(problem[0])), *_fake_gradients(problem, tuple(needs))


def _fake_backward(*arguments: Any) -> Triple:
    problem, (_, _, *needs) = _split(arguments, 5)
    return _fake_gradients(problem, tuple(needs))


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "distillation_scores": _scores,
    "distillation_rows": _rows,
    "distillation_fast": _fast,
    "distillation_backward": _backward,
}


def implement(name: str, problem: Problem, *extra: Any) -> Any:
    """What an operator computes, past the dispatcher and below autograd; with autocast off, for heads are cast before
    the operator and no product inside rounds again; on the GPU of its tensors, where Triton would launch on the current
    one.
    """
    source = problem.student.source
    with (
        torch._C._AutoDispatchBelowAutograd(),
        without_autocast(source),
        torch.cuda.device_of(source) if source.is_cuda else nullcontext(),
    ):
        return _IMPLEMENTATIONS[name](problem, *extra)


def below_autograd(name: str, arguments: tuple[Any, ...], upstream: tuple[Tensor, ...] = ()) -> Any:
    """The registered operator, below autograd; past the dispatcher where nothing traces, records or transforms the
    call, nor batches the gradients from ``upstream``, as that takes as long as a small problem.
    """
    with torch._C._AutoDispatchBelowAutograd():
        if is_watched(arguments[:TENSORS]) or is_batched(upstream):
            return getattr(torch.ops.fusedmm, name)(*arguments)
        return registered(name)(*arguments)


def registered(name: str) -> Callable[..., Any]:
    """The implementation, taking the arguments of the registered operator."""

    def run(*arguments: Any) -> Any:
        return implement(name, rebuild(arguments[:ARGUMENTS]), *arguments[ARGUMENTS:])

    def scores(*arguments: Any) -> Tensor:
        fields = run(*arguments)
        absent = torch.zeros_like(fields["forward_kl"])
        return torch.stack([fields.get(name, absent) for name in eager_scores.FIELDS])

    return scores if name == "distillation_scores" else run


for _name, _fake in (
    ("distillation_scores", _fake_scores),
    ("distillation_rows", _fake_rows),
    ("distillation_fast", _fake_fast),
    ("distillation_backward", _fake_backward),
):
    fragment.impl(_name, registered(_name), "CompositeExplicitAutograd")
    library.register_fake(f"fusedmm::{_name}", _fake, lib=fragment)
