"""Distillation with Triton against a teacher that gives logits: the statistics, mixture and gradient kernels over some
rows of both heads.

Scores and losses keep O(N) numbers; logits are in memory only where `with_logits` formed those of a wave.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedmm.eager.distillation_scores import FIELDS
from fusedmm.eager.objective import Objective
from fusedmm.eager.waves import matmul
from fusedmm.heads import Head, LinearHead
from fusedmm.ops.distillation_waves import classes_a_rank

if TYPE_CHECKING:
    from fusedmm.kernels.distillation.arguments import DistillationProblem
    from fusedmm.kernels.distillation.heads import HeadTensors


@dataclass(frozen=True, eq=False)
class PairRows:
    """Some rows of a problem.

    Attributes:
        student, teacher: heads as kernels take them.
        labels: [N], or None.
        temperature: [N] float32, or None for the objective's.
        objective: the rest.
    """

    student: "HeadTensors"
    teacher: "HeadTensors"
    labels: Tensor | None
    temperature: Tensor | None
    objective: Objective

    def cut(self, rows: slice) -> "PairRows":
        """Rows of these."""
        return replace(
            self,
            student=self.student._replace(source=self.student.source[rows]),
            teacher=self.teacher._replace(source=self.teacher.source[rows]),
            labels=None if self.labels is None else self.labels[rows],
            temperature=None if self.temperature is None else self.temperature[rows],
        )

    def with_logits(self) -> "PairRows":
        """The same with float32 logits, before bias and soft-cap, in memory: one matmul where the heads share their
        weight.
        """
        from fusedmm.kernels.distillation.heads import shares_weight

        student, teacher = self.student, self.teacher
        if student.weight is not None and shares_weight(student, teacher):
            both = matmul(torch.cat([student.source, teacher.source]), student.weight.t())
            count = student.source.shape[0]
            return replace(
                self,
                student=student._replace(source=both[:count], weight=None),
                teacher=teacher._replace(source=both[count:], weight=None),
            )
        return replace(self, student=with_logits(student), teacher=with_logits(teacher))

    def scores(self, second_pass: bool) -> Tensor:
        """All of `fusedmm.eager.distillation_scores.FIELDS` [fields, N]; grad_norm without the norm of hidden."""
        saved, fields = self._statistics(for_scores=True)
        if second_pass:
            values, sums = self._mixture(saved)
            fields[FIELDS.index("divergence")], fields[FIELDS.index("total_variation")] = values, sums[2]
        return fields

    def losses(self) -> tuple[Tensor, Tensor]:
        """Loss of every row [N], of no meaning where it is ignored, and the statistics that `grad_logits` needs
        [16, N].
        """
        divergence, cross_entropy, saved = self.divergence()
        return weighted_losses(divergence, cross_entropy, self.objective, self.temperature), saved

    def divergence(self) -> tuple[Tensor, Tensor, Tensor]:
        """Divergence and cross entropy of every row [N], and the statistics that `grad_logits` needs [16, N]."""
        saved, losses = self._statistics(for_scores=False)
        beta = self.objective.beta
        divergence = losses[int(beta)] if beta in (0.0, 1.0) else self._mixture(saved)[0]
        return divergence, losses[2], saved

    def grad_logits(self, saved: Tensor, grad_rows: Tensor, columns: slice, out: Tensor) -> Tensor:
        """``grad_rows`` times the gradient in the student's logits of classes `columns`, written to `out`."""
        from fusedmm.kernels.distillation.gradient import gradient_logits

        problem = launch_problem(self.labels, self.temperature, self.objective)
        return gradient_logits(self.student, self.teacher, saved, grad_rows, out, problem, columns=columns)

    def tempered_gradient(self, saved: Tensor) -> Tensor:
        """Gradient of every row's divergence in the student's logits / temperature [N, V] float32, all in memory; of an
        objective without cross entropy.
        """
        count, num_rows = self.objective.shard.count, saved.shape[1]
        inverse = saved.new_full((num_rows,), 1 / self.objective.temperature)
        if self.temperature is not None:
            inverse = 1 / self.temperature
        return self.grad_logits(saved, inverse, slice(0, count), saved.new_empty((num_rows, count)))

    def _statistics(self, *, for_scores: bool) -> tuple[Tensor, Tensor]:
        """Saved statistics [16, N], and scores or losses, of all ranks' classes."""
        from fusedmm.kernels.distillation.statistics import merge_statistics, statistics

        problem, shard = launch_problem(self.labels, self.temperature, self.objective), self.objective.shard
        split_classes = classes_a_rank(shard)
        state = statistics(self.student, self.teacher, problem, for_scores=for_scores, split_classes=split_classes)
        (states,) = shard.gather(state)
        return merge_statistics(states.flatten(0, 1), problem, for_scores=for_scores)

    def _mixture(self, saved: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence against the mixture [N], and the sums of the second pass; the mean log-ratios go into `saved`."""
        from fusedmm.kernels.distillation.mixture import mixture_sums
        from fusedmm.kernels.distillation.saved import GAP, STUDENT_RATIO, TEACHER_RATIO, mean_ratios

        beta, odds = self.objective.beta, self.objective.beta / (1 - self.objective.beta)
        problem = launch_problem(self.labels, self.temperature, self.objective)
        sums = self.objective.shard.sum(mixture_sums(self.student, self.teacher, saved, problem))
        student_ratio, teacher_ratio, gap = (saved[row.value] for row in (STUDENT_RATIO, TEACHER_RATIO, GAP))
        student_top = -math.log1p(-beta) - torch.log1p(odds * torch.exp2((student_ratio - gap).clamp(max=86.0)))
        teacher_top = -math.log(beta) - torch.log1p(torch.exp2((gap - teacher_ratio).clamp(max=86.0)) / odds)
        torch.neg(sums[:2], out=mean_ratios(saved))
        return (1 - beta) * (student_top + sums[0]) + beta * (teacher_top + sums[1]), sums


def weighted_losses(
    divergence: Tensor, cross_entropy: Tensor, objective: Objective, temperature: Tensor | None
) -> Tensor:
    """``alpha * T**2 * divergence + (1 - alpha) * cross_entropy``, [N]; the latter may be NaN where alpha is 1."""
    scale = objective.temperature if temperature is None else temperature
    result = divergence * (objective.alpha * scale * scale)
    if objective.alpha != 1.0:
        result += (1 - objective.alpha) * cross_entropy
    return result


def launch_problem(labels: Tensor | None, temperature: Tensor | None, objective: Objective) -> "DistillationProblem":
    """What is asked of some rows, as kernels take it."""
    from fusedmm.kernels.distillation.arguments import DistillationProblem

    shard = objective.shard
    return DistillationProblem(
        labels=labels,
        row_temperature=temperature,
        temperature=objective.temperature,
        num_classes=shard.count,
        first_class=shard.first,
        total_classes=shard.total,
        beta=objective.beta,
        alpha=objective.alpha,
        label_smoothing=objective.label_smoothing,
        ignore_index=objective.ignore_index,
    )


def head_tensors(head: Head) -> "HeadTensors":
    """A head as kernels take it."""
    from fusedmm.kernels.distillation.heads import HeadTensors

    if isinstance(head, LinearHead):
        return HeadTensors(head.hidden, head.weight, head.bias, head.softcap)
    return HeadTensors(head.values, None, None, head.softcap)


def with_logits(head: "HeadTensors") -> "HeadTensors":
    """The head with float32 logits, before bias and soft-cap, in place of hidden states and weight."""
    if head.weight is None:
        return head
    return head._replace(source=matmul(head.source, head.weight.t()), weight=None)
