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

from fusedmm.eager.distillation_scores import FIELDS
from fusedmm.heads import LinearHead, TopKLogProbs
from fusedmm.ops.distillation_op import Problem
from fusedmm.ops.distillation_pair import PairRows, head_tensors
from fusedmm.ops.distillation_sums import HeadSums, Needs
from fusedmm.ops.distillation_top import TopRows
from fusedmm.ops.distillation_waves import classes_a_rank, fast_rows, lean_sizes, slices


def scores(problem: Problem, second_pass: bool) -> Tensor:
    """All fields of `fusedmm.eager.distillation_scores.FIELDS` [fields, N] float32; those that do not apply hold no
    meaning, ignored rows are 0.
    """
    fields = _rows(problem).scores(second_pass)
    student, labels, temperature = problem.student, problem.labels, problem.row_temperature
    if isinstance(student, LinearHead):
        size = torch.linalg.vector_norm(student.hidden, dim=-1, dtype=torch.float32)
        fields[FIELDS.index("grad_norm")].mul_(size).div_(
            problem.objective.temperature if temperature is None else temperature
        )
    return fields if labels is None else fields.masked_fill_(labels == problem.objective.ignore_index, 0.0)


def rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss of every row [N], 0 where it is ignored, and the statistics that `backward` needs, [16, N], or [K + 7, N]
    for a top-k teacher.
    """
    losses, saved = _rows(problem).losses()
    return _counted(losses, problem), saved


def fast(problem: Problem, grad_rows: Tensor, needs: Needs) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Loss of every row, and the gradient of ``(grad_rows * loss).sum()`` in the student's input, weight and bias;
    empty where not needed.
    """
    whole, shard, num_rows = _rows(problem), problem.objective.shard, grad_rows.shape[0]
    wave_rows = fast_rows(num_rows, classes_a_rank(shard))
    grad_rows = _counted(grad_rows, problem)
    waves = -(-num_rows // wave_rows)
    sums = HeadSums(whole.student, shard, needs, grad_rows, waves=waves, is_cut=False)
    result = grad_rows.new_empty((num_rows,), dtype=torch.float32)
    for wave in slices(num_rows, wave_rows):
        # A call of its own, so that a wave's logits are gone before the next wave's are formed.
        result[wave] = _fast_wave(whole.cut(wave), wave, sums)
    return _counted(result, problem), sums.result()


def _fast_wave(rows: PairRows | TopRows, wave: slice, sums: HeadSums) -> Tensor:
    """Loss of a wave's rows; its gradient goes to the sums."""
    formed = rows.with_logits()
    losses, saved = formed.losses()
    sums.add(formed, saved, wave, slice(0, rows.objective.shard.count))
    return losses


def backward(problem: Problem, grad_rows: Tensor, statistics: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``(grad_rows * loss).sum()`` in the student's input, weight and bias from saved statistics; the
    logits are formed again, tile by tile.
    """
    whole, shard, num_rows = _rows(problem), problem.objective.shard, grad_rows.shape[0]
    classes = shard.count
    range_rows, columns = lean_sizes(num_rows, classes_a_rank(shard), problem.student.source.shape[1])
    grad_rows = _counted(grad_rows, problem)
    waves = -(-num_rows // range_rows)
    sums = HeadSums(whole.student, shard, needs, grad_rows, waves=waves, is_cut=columns < classes)
    for wave in slices(num_rows, range_rows):
        wave_rows, saved = whole.cut(wave), statistics[:, wave].contiguous()
        for block in slices(classes, columns):
            sums.add(wave_rows, saved, wave, block)
    return sums.result()


def _rows(problem: Problem) -> PairRows | TopRows:
    """The problem as kernels take it; without a divergence the student stands in for a teacher that is not read."""
    student, teacher = head_tensors(problem.student), problem.teacher
    asked = problem.labels, problem.row_temperature, problem.objective
    if problem.objective.alpha == 0.0:
        return PairRows(student, student, *asked)
    if isinstance(teacher, TopKLogProbs):
        return TopRows.of(student, teacher, *asked)
    return PairRows(student, head_tensors(teacher), *asked)


def _counted(rows: Tensor, problem: Problem) -> Tensor:
    """Numbers of rows, 0 where they are ignored."""
    labels, ignored = problem.labels, problem.objective.ignore_index
    return rows if labels is None else torch.where(labels == ignored, 0.0, rows)
