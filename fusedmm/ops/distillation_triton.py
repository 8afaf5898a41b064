"""Distillation with Triton: the statistics, mixture and gradient kernels around matmuls of PyTorch.

* Scores and the forward of "lean": the statistics kernel over the heads themselves; no logits in memory, O(N) numbers
  are kept.
* "fast": waves of rows. Logits by two matmuls into float32, the same kernels over them, the gradient in the matmuls'
  dtype, two matmuls more. 10 bytes a logit of a wave.
* Backward of "lean": waves of rows, and of each ranges of classes: the gradient kernel over the heads, two matmuls.
  2 bytes a logit of a range; hidden's gradient in float32 for a wave.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fusedmm.eager.distillation import Objective
from fusedmm.eager.distillation_scores import FIELDS, PAIR_FIELDS
from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import WHOLE_ELEMENTS, matmul, shares_weight
from fusedmm.heads import Head, LinearHead, Teacher, TopKLogProbs

if TYPE_CHECKING:
    from fusedmm.kernels.distillation.tiles import HeadTensors

Needs = tuple[bool, bool, bool]

FAST_ELEMENTS = 100 << 20  # logits of a wave of rows: 1 GiB at 10 bytes each
RANGE_ELEMENTS = 8 << 20  # logits of a range of classes: 16 MiB at 2 bytes each
RANGE_INPUT_BYTES = 24 << 20  # hidden's gradient of a wave in float32, before it is rounded
RANGE_ROWS = 16384
ROUNDED_SUMS = 12  # waves after each of which a bfloat16 weight gradient may be rounded (0.5 % in all); else float32
FLOAT16_SCALE = 64.0  # keeps gradients of probabilities near 1e-6 out of float16's subnormals


def scores(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    second_pass: bool,
) -> Tensor:
    """All fields of `fusedmm.eager.distillation_scores.FIELDS` [fields, N] float32; those that do not apply hold no
    meaning.
    """
    heads = _tensors(student, teacher, objective)
    saved, fields = _statistics(*heads, labels, temperature, objective, for_scores=True)
    if isinstance(student, LinearHead):
        size = torch.linalg.vector_norm(student.hidden, dim=-1, dtype=torch.float32)
        if labels is not None:
            size = torch.where(labels == objective.ignore_index, 0.0, size)
        fields[PAIR_FIELDS.index("grad_norm")].mul_(size).div_(
            objective.temperature if temperature is None else temperature
        )
    if second_pass:
        values, sums = _mixture(*heads, saved, temperature, objective)
        for name, field in (("divergence", values), ("total_variation", sums[2])):
            fields[FIELDS.index(name)] = (
                field if labels is None else torch.where(labels == objective.ignore_index, 0.0, field)
            )
    return fields


def rows(
    student: Head, teacher: Teacher, labels: Tensor | None, temperature: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Loss of every row [N], 0 where it is ignored, and the statistics that `backward` needs [16, N]."""
    heads = _tensors(student, teacher, objective)
    return _loss_rows(*heads, labels, temperature, objective)


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
    student_head, teacher_head = _tensors(student, teacher, objective)
    num_rows = student_head.source.shape[0]
    wave_rows = fast_rows(num_rows, _classes_a_rank(objective.shard))
    gradient = _Gradient(student_head, objective, needs, waves=-(-num_rows // wave_rows), is_cut=False)
    result = student_head.source.new_empty((num_rows,), dtype=torch.float32)
    for wave in _slices(num_rows, wave_rows):
        # A call of its own, so that a wave's logits are gone before the next wave's are formed.
        result[wave] = _fast_wave(
            student_head, teacher_head, wave, _of(labels, wave), _of(temperature, wave), grad_rows[wave], gradient
        )
    return result, gradient.result()


def _fast_wave(
    student: "HeadTensors",
    teacher: "HeadTensors",
    wave: slice,
    labels: Tensor | None,
    temperature: Tensor | None,
    grad_rows: Tensor,
    gradient: "_Gradient",
) -> Tensor:
    """Loss of a wave's rows; its gradient goes to the sums."""
    student_logits, teacher_logits = _wave_logits(student, teacher, wave)
    student = student._replace(source=student_logits, weight=None)
    teacher = teacher._replace(source=teacher_logits, weight=None)
    result, saved = _loss_rows(student, teacher, labels, temperature, gradient.objective)
    classes = slice(0, gradient.objective.shard.count)
    gradient.add(wave, classes, student, teacher, saved, grad_rows, labels, temperature)
    return result


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
    student_head, teacher_head = _tensors(student, teacher, objective)
    num_rows, classes = student_head.source.shape[0], objective.shard.count
    range_rows, columns = lean_sizes(num_rows, _classes_a_rank(objective.shard), student_head.source.shape[1])
    gradient = _Gradient(student_head, objective, needs, waves=-(-num_rows // range_rows), is_cut=columns < classes)
    for wave in _slices(num_rows, range_rows):
        heads = [head._replace(source=head.source[wave]) for head in (student_head, teacher_head)]
        saved = statistics[:, wave].contiguous()
        for block in _slices(classes, columns):
            gradient.add(
                wave, block, heads[0], heads[1], saved, grad_rows[wave], _of(labels, wave), _of(temperature, wave)
            )
    return gradient.result()


def fast_rows(num_rows: int, num_classes: int) -> int:
    """Rows of a wave of the fast path."""
    return min(max(num_rows, 1), max(128, FAST_ELEMENTS // num_classes // 128 * 128))


def lean_sizes(num_rows: int, num_classes: int, dim: int) -> tuple[int, int]:
    """Rows and classes of a range of the lean backward.

    Rows as many as fit `RANGE_INPUT_BYTES`, or as leave the weight's gradient no more than `ROUNDED_SUMS` parts; never
    all logits at once beyond `WHOLE_ELEMENTS`.
    """
    fitting = max(128, RANGE_INPUT_BYTES // (4 * dim) // 128 * 128)
    rows = max(1, min(num_rows, RANGE_ROWS, max(fitting, -(-num_rows // ROUNDED_SUMS))))
    columns = min(num_classes, max(128, RANGE_ELEMENTS // rows // 128 * 128))
    if columns == num_classes and rows == num_rows and num_rows * num_classes > WHOLE_ELEMENTS:
        rows = (num_rows + 1) // 2
    return rows, columns


def _ranks(shard: Shard) -> int:
    return 1 if shard.group is None else shard.group.size()


def _classes_a_rank(shard: Shard) -> int:
    """Classes by which all ranks of a sharded head choose the same waves, however unequal their shards."""
    return -(-shard.total // _ranks(shard))


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def _of(tensor: Tensor | None, wave: slice) -> Tensor | None:
    return None if tensor is None else tensor[wave]


def _tensors(student: Head, teacher: Teacher, objective: Objective) -> "tuple[HeadTensors, HeadTensors]":
    """Both heads as kernels take them; without a divergence the student stands in for a teacher that is not read."""
    from fusedmm.kernels.distillation.tiles import HeadTensors

    assert not isinstance(teacher, TopKLogProbs)
    if objective.alpha == 0.0:
        teacher = student
    student_head, teacher_head = (
        HeadTensors(head.hidden, head.weight, head.bias, head.softcap)
        if isinstance(head, LinearHead)
        else HeadTensors(head.values, None, None, head.softcap)
        for head in (student, teacher)
    )
    return student_head, teacher_head


def _wave_logits(student: "HeadTensors", teacher: "HeadTensors", wave: slice) -> tuple[Tensor, Tensor]:
    """float32 logits of a wave before bias and soft-cap, one matmul where the heads share their weight; logits that
    exist are passed on.
    """
    if (
        student.weight is not None
        and teacher.weight is not None
        and shares_weight(LinearHead(student.source, student.weight), LinearHead(teacher.source, teacher.weight))
    ):
        both = matmul(torch.cat([student.source[wave], teacher.source[wave]]), student.weight.t())
        return both[: both.shape[0] // 2], both[both.shape[0] // 2 :]
    student_logits, teacher_logits = (
        head.source[wave] if head.weight is None else matmul(head.source[wave], head.weight.t())
        for head in (student, teacher)
    )
    return student_logits, teacher_logits


def _statistics(
    student: "HeadTensors",
    teacher: "HeadTensors",
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    *,
    for_scores: bool,
) -> tuple[Tensor, Tensor]:
    """Saved statistics [16, N], and scores or losses, of all ranks' classes."""
    from fusedmm.kernels.distillation.statistics import merge_statistics, statistics

    shard = objective.shard
    ranks = _ranks(shard)
    state = statistics(
        student,
        teacher,
        labels=labels,
        row_temperature=temperature,
        temperature=objective.temperature,
        num_classes=shard.count,
        first_class=shard.first,
        for_scores=for_scores,
        split_classes=_classes_a_rank(shard),
    )
    if shard.group is not None:
        states = [torch.empty_like(state) for _ in range(ranks)]
        dist.all_gather(states, state, group=shard.group)
        state = torch.cat(states)
    return merge_statistics(
        state,
        labels=labels,
        row_temperature=temperature,
        temperature=objective.temperature,
        total_classes=shard.total,
        ignore_index=objective.ignore_index,
        label_smoothing=objective.label_smoothing,
        for_scores=for_scores,
    )


def _mixture(
    student: "HeadTensors", teacher: "HeadTensors", saved: Tensor, temperature: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Divergence against the mixture [N], and the sums of the second pass; the mean log-ratios go into `saved`."""
    from fusedmm.kernels.distillation.mixture import mixture_sums

    beta, odds = objective.beta, objective.beta / (1 - objective.beta)
    sums = objective.shard.sum(
        mixture_sums(
            student,
            teacher,
            saved,
            row_temperature=temperature,
            temperature=objective.temperature,
            beta=beta,
            num_classes=objective.shard.count,
        )
    )
    student_top = -math.log1p(-beta) - torch.log1p(odds * torch.exp2((saved[8] - saved[15]).clamp(max=86.0)))
    teacher_top = -math.log(beta) - torch.log1p(torch.exp2((saved[15] - saved[9]).clamp(max=86.0)) / odds)
    torch.neg(sums[:2], out=saved[10:12])
    return (1 - beta) * (student_top + sums[0]) + beta * (teacher_top + sums[1]), sums


def _loss_rows(
    student: "HeadTensors",
    teacher: "HeadTensors",
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """Loss of every row and its saved statistics."""
    saved, losses = _statistics(student, teacher, labels, temperature, objective, for_scores=False)
    if objective.beta in (0.0, 1.0):
        divergence = losses[int(objective.beta)]
    else:
        divergence = _mixture(student, teacher, saved, temperature, objective)[0]
    scale = objective.temperature if temperature is None else temperature
    result = divergence * (objective.alpha * scale * scale)
    if objective.alpha != 1.0:
        result += (1 - objective.alpha) * losses[2]
    return result if labels is None else torch.where(labels == objective.ignore_index, 0.0, result), saved


class _Gradient:
    """Gradients of the student's head from ranges of rows and classes of the gradient of its logits.

    Hidden's is a sum over classes: complete with the last range of a wave, where it is rounded to its dtype. The
    weight's and the bias's are sums over waves. They are kept in float32, except a bfloat16 weight gradient of at most
    `ROUNDED_SUMS` parts, which would double the memory of the largest tensor.
    """

    def __init__(self, head: "HeadTensors", objective: Objective, needs: Needs, *, waves: int, is_cut: bool) -> None:
        self.head, self.objective, self.needs = head, objective, needs
        source, weight = head.source, head.weight
        self.scale = FLOAT16_SCALE if source.dtype == torch.float16 and weight is not None else 1.0
        self.buffer = source.new_empty((0,))
        self.input = self._zeros(source, needs[0], source.dtype)
        is_rounded = source.dtype == torch.bfloat16 and waves <= ROUNDED_SUMS
        self.weight = self._zeros(weight, needs[1], source.dtype if is_rounded else torch.float32)
        self.bias = self._zeros(head.bias, needs[2], torch.float32)
        # Every rank of a sharded head takes the same dtype: its classes may fit one range where another's do not.
        in_parts = is_cut or self.scale != 1.0 or objective.shard.group is not None
        self.keeps_partial = needs[0] and weight is not None and source.dtype != torch.float32 and in_parts
        self.partial = source.new_empty((0,), dtype=torch.float32)
        self.counted = source.new_empty((0,))

    def _zeros(self, source: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor:
        shape = source.shape if source is not None and needed else (0,)
        return torch.zeros(shape, dtype=dtype, device=self.head.source.device)

    def add(
        self,
        wave: slice,
        block: slice,
        student: "HeadTensors",
        teacher: "HeadTensors",
        saved: Tensor,
        grad_rows: Tensor,
        labels: Tensor | None,
        temperature: Tensor | None,
    ) -> None:
        """Form the gradient of the logits of rows `wave` and classes `block`, and take it into the sums; `student` and
        `teacher` hold the rows of the wave only. The ranges of a wave come one after the other.
        """
        from fusedmm.kernels.distillation.gradient import gradient_logits

        objective = self.objective
        if labels is not None:
            grad_rows = torch.where(labels == objective.ignore_index, 0.0, grad_rows)
            labels = None if objective.alpha == 1.0 else labels  # that is all they say without cross entropy
        shape = (wave.stop - wave.start, block.stop - block.start)
        if self.buffer.numel() < shape[0] * shape[1]:
            self.buffer = self.head.source.new_empty(shape[0] * shape[1])
        grad_logits = gradient_logits(
            student,
            teacher,
            saved,
            grad_rows.contiguous(),
            self.buffer[: shape[0] * shape[1]].view(shape),
            labels=labels,
            row_temperature=temperature,
            temperature=objective.temperature,
            beta=objective.beta,
            alpha=objective.alpha,
            label_smoothing=objective.label_smoothing,
            grad_scale=self.scale,
            num_classes=objective.shard.count,
            first_class=objective.shard.first,
            total_classes=objective.shard.total,
            ignore_index=objective.ignore_index,
            columns=block,
        )
        weight = self.head.weight
        if weight is None:
            if self.needs[0]:
                self.input[wave, block] = grad_logits
            return
        if self.needs[0]:
            self._add_input(wave, block, grad_logits, weight)
        if self.needs[1]:
            if block.start == 0:  # 0 * NaN is NaN: what a row that does not count holds must not reach the sum
                self.counted = self.counted.new_empty((0,))  # frees the former wave's
                self.counted = self.head.source[wave].masked_fill((grad_rows == 0.0)[:, None], 0.0)
            _accumulate(self.weight[block], grad_logits.t(), self.counted, is_sum=wave.start > 0)
        if self.needs[2]:
            self.bias[block] += grad_logits.sum(0, dtype=torch.float32)

    def _add_input(self, wave: slice, block: slice, grad_logits: Tensor, weight: Tensor) -> None:
        """Take a range into hidden's gradient; the last one of a wave completes it."""
        total = self.input[wave]
        if self.keeps_partial:
            if self.partial.numel() == 0:
                self.partial = torch.empty(total.shape, dtype=torch.float32, device=total.device)
            total = self.partial[: total.shape[0]]
        _accumulate(total, grad_logits, weight[block], is_sum=block.start > 0)
        if block.stop == self.objective.shard.count:
            self.objective.shard.sum(total)
            if self.keeps_partial:
                self.input[wave] = total if self.scale == 1.0 else total.div_(self.scale)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three gradients in the dtypes of their inputs, hidden's summed over ranks."""
        if self.scale != 1.0:
            self.weight.div_(self.scale)
            self.bias.div_(self.scale)
        dtype = self.head.source.dtype
        return self.input, self.weight.to(dtype), self.bias.to(dtype)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, is_sum: bool) -> None:
    """``total = a @ b``, or plus the former total, in place; the product is not rounded before it is added."""
    if total.is_cuda and total.dtype != a.dtype:
        if is_sum:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif total.dtype == a.dtype and (total.is_cuda or total.dtype == torch.float32):
        torch.addmm(total, a, b, beta=1.0 if is_sum else 0.0, out=total)
    else:
        product = matmul(a, b)
        total.copy_(product + total if is_sum else product)
