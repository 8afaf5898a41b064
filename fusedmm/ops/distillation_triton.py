"""Distillation with Triton: scores, and losses with their gradient, around the kernels of `PairRows` or `TopRows` and
matmuls of PyTorch.

* Scores and the forward of "lean": kernels over the heads themselves; no logits in memory, O(N) numbers are kept.
* "fast": waves of rows. Logits by a matmul a head into float32, the same kernels over them, the gradient in the
  matmuls' dtype, two matmuls more. 10 bytes a logit of a wave.
* Backward of "lean": waves of rows, and of each ranges of classes: the gradient kernel over the heads, two matmuls.
  2 bytes a logit of a range; hidden's gradient in float32 for a wave.
"""

import torch
from torch import Tensor

from fusedmm.eager.distillation import Objective
from fusedmm.eager.distillation_scores import PAIR_FIELDS
from fusedmm.heads import Head, LinearHead, Teacher, TopKLogProbs
from fusedmm.ops.distillation_pair import PairRows, head_tensors
from fusedmm.ops.distillation_sums import HeadSums, Needs
from fusedmm.ops.distillation_top import TopRows
from fusedmm.ops.distillation_waves import classes_a_rank, fast_rows, lean_sizes, slices


def scores(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    second_pass: bool,
) -> Tensor:
    """All fields of `fusedmm.eager.distillation_scores.FIELDS` [fields, N] float32; those that do not apply hold no
    meaning, ignored rows are 0.
    """
    fields = _rows(student, teacher, labels, temperature, objective).scores(second_pass)
    if isinstance(student, LinearHead):
        size = torch.linalg.vector_norm(student.hidden, dim=-1, dtype=torch.float32)
        fields[PAIR_FIELDS.index("grad_norm")].mul_(size).div_(
            objective.temperature if temperature is None else temperature
        )
    return fields if labels is None else fields.masked_fill_(labels == objective.ignore_index, 0.0)


def rows(
    student: Head, teacher: Teacher, labels: Tensor | None, temperature: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Loss of every row [N], 0 where it is ignored, and the statistics that `backward` needs, [16, N], or [K + 7, N]
    for a top-k teacher.
    """
    losses, saved = _rows(student, teacher, labels, temperature, objective).losses()
    return _counted(losses, labels, objective), saved


def fast(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    grad_rows: Tensor,
    needs: Needs,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Loss of every row, and the gradient of ``(grad_rows * loss).sum()`` in the student's input, weight and bias;
    empty where not needed.
    """
    problem = _rows(student, teacher, labels, temperature, objective)
    num_rows = grad_rows.shape[0]
    wave_rows = fast_rows(num_rows, classes_a_rank(objective.shard))
    grad_rows = _counted(grad_rows, labels, objective)
    waves = -(-num_rows // wave_rows)
    sums = HeadSums(problem.student, objective.shard, needs, grad_rows, waves=waves, is_cut=False)
    result = grad_rows.new_empty((num_rows,), dtype=torch.float32)
    for wave in slices(num_rows, wave_rows):
        # A call of its own, so that a wave's logits are gone before the next wave's are formed.
        result[wave] = _fast_wave(problem.cut(wave), wave, sums)
    return _counted(result, labels, objective), sums.result()


def _fast_wave(problem: PairRows | TopRows, wave: slice, sums: HeadSums) -> Tensor:
    """Loss of a wave's rows; its gradient goes to the sums."""
    formed = problem.with_logits()
    losses, saved = formed.losses()
    sums.add(formed, saved, wave, slice(0, problem.objective.shard.count))
    return losses


def backward(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    grad_rows: Tensor,
    statistics: Tensor,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``(grad_rows * loss).sum()`` in the student's input, weight and bias from saved statistics; the
    logits are formed again, tile by tile.
    """
    problem = _rows(student, teacher, labels, temperature, objective)
    num_rows, classes = grad_rows.shape[0], objective.shard.count
    range_rows, columns = lean_sizes(num_rows, classes_a_rank(objective.shard), student.source.shape[1])
    grad_rows = _counted(grad_rows, labels, objective)
    waves = -(-num_rows // range_rows)
    sums = HeadSums(problem.student, objective.shard, needs, grad_rows, waves=waves, is_cut=columns < classes)
    for wave in slices(num_rows, range_rows):
        wave_rows, saved = problem.cut(wave), statistics[:, wave].contiguous()
        for block in slices(classes, columns):
            sums.add(wave_rows, saved, wave, block)
    return sums.result()


def _rows(
    student: Head, teacher: Teacher, labels: Tensor | None, temperature: Tensor | None, objective: Objective
) -> PairRows | TopRows:
    """The problem as kernels take it; without a divergence the student stands in for a teacher that is not read."""
    own = head_tensors(student)
    if objective.alpha == 0.0:
        return PairRows(own, own, labels, temperature, objective)
    if isinstance(teacher, TopKLogProbs):
        return TopRows.of(own, teacher, labels, temperature, objective)
    return PairRows(own, head_tensors(teacher), labels, temperature, objective)


def _counted(rows: Tensor, labels: Tensor | None, objective: Objective) -> Tensor:
    """Numbers of rows, 0 where they are ignored."""
    return rows if labels is None else torch.where(labels == objective.ignore_index, 0.0, rows)
