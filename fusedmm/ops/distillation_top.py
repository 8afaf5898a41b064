"""Distillation with Triton against a teacher's top-k classes: one sweep over the student's, then two heads of K + 1
logits that are in memory.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedmm.eager.distillation_scores import FIELDS
from fusedmm.eager.objective import Objective
from fusedmm.eager.shard import Shard
from fusedmm.heads import TopKLogProbs
from fusedmm.ops.distillation_pair import PairRows, launch_problem, weighted_losses, with_logits
from fusedmm.ops.distillation_waves import classes_a_rank

if TYPE_CHECKING:
    from fusedmm.kernels.distillation.heads import HeadTensors


@dataclass(frozen=True, eq=False)
class TopRows:
    """Some rows of a problem.

    Attributes:
        student: head as kernels take it.
        classes: [N, K] int32 numbers over all ranks, ascending in each row.
        log_probs: [N, K] of these classes.
        likeliest: [N] the teacher's most likely class; of equals the one that it names first.
        labels: [N], or None.
        temperature: [N] float32, or None for the objective's.
        objective: the rest.
    """

    student: "HeadTensors"
    classes: Tensor
    log_probs: Tensor
    likeliest: Tensor
    labels: Tensor | None
    temperature: Tensor | None
    objective: Objective

    @classmethod
    def of(
        cls,
        student: "HeadTensors",
        teacher: TopKLogProbs,
        labels: Tensor | None,
        temperature: Tensor | None,
        objective: Objective,
    ) -> "TopRows":
        """A problem from what a user gives: top-k classes in any order."""
        classes, order = teacher.indices.sort(-1)
        log_probs = teacher.log_probs.gather(1, order)
        likeliest = teacher.indices.gather(1, teacher.log_probs.argmax(-1, keepdim=True))[:, 0]
        classes = classes.to(torch.int32, memory_format=torch.contiguous_format)  # sorted in the layout that they had
        return cls(student, classes, log_probs, likeliest, labels, temperature, objective)

    def cut(self, rows: slice) -> "TopRows":
        """Rows of these."""
        return replace(
            self,
            student=self.student._replace(source=self.student.source[rows]),
            classes=self.classes[rows],
            log_probs=self.log_probs[rows],
            likeliest=self.likeliest[rows],
            labels=None if self.labels is None else self.labels[rows],
            temperature=None if self.temperature is None else self.temperature[rows],
        )

    def with_logits(self) -> "TopRows":
        """The same with the student's float32 logits, before bias and soft-cap, in memory."""
        return replace(self, student=with_logits(self.student))

    def scores(self, second_pass: bool) -> Tensor:
        """All of `fusedmm.eager.distillation_scores.FIELDS` [fields, N]; grad_norm without the norm of hidden;
        those that need the teacher's logit of the label hold no meaning.
        """
        from fusedmm.kernels.distillation.top_statistics import STUDENT_SCORES

        buckets, numbers = self._buckets(for_scores=True)
        fields = buckets.scores(second_pass)
        alone = dict(zip(STUDENT_SCORES, numbers, strict=True))
        gradient = replace(buckets, objective=buckets.objective._replace(beta=0.0))
        squares = gradient.tempered_gradient(gradient.divergence()[2]).square()
        # the bucket's gradient lies on its classes by their shares
        squares[:, self.classes.shape[1] :] *= alone.pop("rest_squares")[:, None]
        alone["grad_norm"] = squares.sum(-1).sqrt()
        alone["agreement"] = alone.pop("student_arg") == self.likeliest
        for name, value in alone.items():
            fields[FIELDS.index(name)] = value
        return fields

    def losses(self) -> tuple[Tensor, Tensor]:
        """Loss of every row [N], of no meaning where it is ignored, and what `grad_logits` needs [K + 7, N]: numbers of
        the student, and the gradient in the top-k classes and the bucket.
        """
        buckets, numbers = self._buckets(for_scores=False)
        divergence, _, statistics = buckets.divergence()
        gradient = buckets.tempered_gradient(statistics)
        alone, cross_entropy = numbers[:-1], numbers[-1]
        no_bucket = alone.new_zeros((self.classes.shape[1] + 1 - gradient.shape[1], alone.shape[1]))
        saved = torch.cat([alone, gradient.t(), no_bucket])
        return weighted_losses(divergence, cross_entropy, self.objective, self.temperature), saved

    def grad_logits(self, saved: Tensor, grad_rows: Tensor, columns: slice, out: Tensor) -> Tensor:
        """``grad_rows`` times the gradient in the student's logits of classes `columns`, written to `out`."""
        from fusedmm.kernels.distillation.top_gradient import top_gradient_logits

        problem = launch_problem(self.labels, self.temperature, self.objective)
        return top_gradient_logits(self.student, self.classes, saved, grad_rows, out, problem, columns=columns)

    def _buckets(self, *, for_scores: bool) -> tuple[PairRows, Tensor]:
        """Student and teacher over the top-k classes and the bucket, and numbers of the student.

        Their logits have a temperature of their own, of 1/2 or less (see `merge_top_statistics`).
        """
        from fusedmm.kernels.distillation.heads import HeadTensors
        from fusedmm.kernels.distillation.top_statistics import merge_top_statistics, top_statistics

        objective, shard = self.objective, self.objective.shard
        problem, split_classes = launch_problem(self.labels, self.temperature, objective), classes_a_rank(shard)
        state, top = top_statistics(
            self.student, self.classes, problem, for_scores=for_scores, split_classes=split_classes
        )
        states, tops = shard.gather(state, top)
        top = tops.amax(0)  # the logit of the rank that has the class
        own, target, numbers = merge_top_statistics(
            states.flatten(0, 1), top, self.classes, self.log_probs, problem, for_scores=for_scores
        )
        heads = HeadTensors(own, None, None, None), HeadTensors(target, None, None, None)
        columns, temperature = own.shape[1], 0.5 * min(objective.temperature, 1.0)
        rows = None if self.temperature is None else 0.5 * self.temperature.clamp(max=1.0)
        pair = Objective(Shard(columns, 0, columns), objective.beta, temperature=temperature)
        return PairRows(*heads, None, rows, pair), numbers
