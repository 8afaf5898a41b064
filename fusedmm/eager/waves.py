"""Waves of rows: the matmuls around a distillation, so that logits exist only for some rows at a time.

A wave has about `WAVE_ELEMENTS` logits, never fewer than `MIN_WAVE_ROWS` rows (below that the weight is read too often)
and, beyond `WHOLE_ELEMENTS`, never all rows, unless classes are so few that logits are no larger than hidden states.
Ignored rows are in no wave. Logits and gradients are formed in float32 from inputs of any dtype (float64 from float64):
on CUDA by the matmul's own accumulator, elsewhere from a converted copy of a block of the weight.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fusedmm.heads import Head, LinearHead

WAVE_ELEMENTS = 1 << 19
WHOLE_ELEMENTS = 1 << 16
MIN_WAVE_ROWS = 64
# Up to so many classes a wave lies classes-major in memory, so that a vector holds rows: a reduction over 8 classes
# then takes a sixth of the time, over 2 a tenth.
FEW_CLASSES = 64
# A half-precision weight up to this size is converted once a call, a larger one in blocks, once a wave.
CONVERTED_ELEMENTS = 1 << 22
FINITE_MINIMUM = -1e30  # stands for -inf, so that a forbidden class gives 0 * 1e30 and not 0 * inf

Rows = slice | Tensor  # consecutive rows, or the numbers of some


def wave_rows(num_rows: int, num_classes: int) -> int:
    """Rows of one wave: a pure function of the sizes, so that results do not depend on the machine."""
    rows = max(MIN_WAVE_ROWS, WAVE_ELEMENTS // num_classes)
    if rows >= num_rows and num_classes > FEW_CLASSES and num_rows * num_classes > WHOLE_ELEMENTS:
        rows = (num_rows + 1) // 2
    return max(1, min(rows, num_rows))


def counted_rows(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Numbers of the rows that are not ignored, or None for all of them; where the labels are on a GPU this waits."""
    if labels is None or labels.numel() == 0:
        return None
    low, high = labels.aminmax()
    return (labels != ignore_index).nonzero()[:, 0] if low.item() <= ignore_index <= high.item() else None


def waves(num_rows: int, num_classes: int, counted: Tensor | None) -> Iterator[Rows]:
    """Waves that cover all rows, or those in `counted`."""
    if counted is not None:
        num_rows = counted.shape[0]
    step = wave_rows(num_rows, num_classes)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        yield rows if counted is None else counted[rows]


class Scratch:
    """Memory for the waves of one call in the compute dtype: pages that a wave has touched serve the next."""

    def __init__(self, source: Tensor, num_rows: int, num_classes: int, parts: int) -> None:
        self.classes = num_classes
        size, dtype = wave_rows(num_rows, num_classes) * num_classes, compute_dtype(source)
        if parts * size < num_rows * num_classes or num_classes <= FEW_CLASSES:  # one piece, which malloc keeps
            self.parts = source.new_empty((parts, size), dtype=dtype).unbind()
        else:
            self.parts = tuple(source.new_empty((size,), dtype=dtype) for _ in range(parts))

    def take(self, rows: Rows) -> list[Tensor]:
        """[rows, V] tensors, classes-major where they are few."""
        count = rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]
        return [_shaped(part[: count * self.classes], count, self.classes) for part in self.parts]


def _shaped(flat: Tensor, rows: int, classes: int) -> Tensor:
    return flat.view(classes, rows).t() if classes <= FEW_CLASSES else flat.view(rows, classes)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for every dtype but float64, which stays."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def real_classes(head: Head, num_classes: int) -> Head:
    """The head without padding, its weight in the compute dtype where that is cheap; CUDA multiplies half precision as
    it is.
    """
    if not isinstance(head, LinearHead):
        return replace(head, values=head.values[:, :num_classes])
    weight = head.weight[:num_classes]
    if not weight.is_cuda and weight.numel() <= CONVERTED_ELEMENTS:
        weight = weight.to(compute_dtype(weight))
    return replace(head, weight=weight, bias=None if head.bias is None else head.bias[:num_classes])


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """``scale * a @ b`` in the compute dtype without rounding the product: [n, k] by [k, m]; written to `out` where
    given.
    """
    dtype = compute_dtype(a)
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)
    if a.is_cuda and a.dtype == b.dtype != dtype:
        torch.mm(a, b, out_dtype=dtype, out=out)
        return out if scale == 1.0 else out.mul_(scale)
    a = a.to(dtype)
    columns = b.shape[1] if b.dtype == dtype else max(1, CONVERTED_ELEMENTS // b.shape[0])
    if columns >= b.shape[1]:
        return torch.addmm(out, a, b.to(dtype), beta=0.0, alpha=scale, out=out)
    for first in range(0, b.shape[1], columns):
        block = out[:, first : first + columns]
        torch.addmm(block, a, b[:, first : first + columns].to(dtype), beta=0.0, alpha=scale, out=block)
    return out


def wave_logits(head: Head, rows: Rows, scale: float | Tensor, out: Tensor) -> Tensor:
    """Write `scale` (a number or [rows, 1]) times the logits of a wave, soft-capped, to `out` [rows, V]. A number costs
    nothing where nothing stands between it and the matmul.
    """
    inner = scale if isinstance(scale, float) and isinstance(head, LinearHead) and head.softcap is None else 1.0
    if isinstance(head, LinearHead):
        z = matmul(head.hidden[rows], head.weight.t(), out, inner)
        if head.bias is not None:
            z.add_(head.bias, alpha=inner)
    else:
        z = out.copy_(head.values[rows]).clamp_min_(FINITE_MINIMUM)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z if inner is scale else z.mul_(scale)


def pair_logits(
    student: Head, teacher: Head, rows: Rows, scale: float | Tensor, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """`wave_logits` of both heads in the student's compute dtype; one matmul where they share the weight, so that it is
    read once.
    """
    if not shares_weight(student, teacher):
        z = wave_logits(student, rows, scale, out[0])
        if compute_dtype(teacher.source) == z.dtype:
            return z, wave_logits(teacher, rows, scale, out[1])
        own = torch.empty_like(out[1], dtype=compute_dtype(teacher.source))
        return z, out[1].copy_(wave_logits(teacher, rows, scale, own))
    assert isinstance(student, LinearHead)
    assert isinstance(teacher, LinearHead)
    hidden = torch.cat([student.hidden[rows], teacher.hidden[rows]])
    count, classes = hidden.shape[0], student.weight.shape[0]
    both = _shaped(out[0].new_empty((count * classes,)), count, classes)
    if isinstance(scale, Tensor):
        scale = torch.cat([scale, scale])
    wave_logits(replace(student, hidden=hidden), slice(None), scale, both)
    return both[: count // 2], both[count // 2 :]


def shares_weight(student: Head, teacher: Head) -> bool:
    """Whether the two heads are one: the same weight, bias and soft-cap, applied to two hidden states."""
    if not (isinstance(student, LinearHead) and isinstance(teacher, LinearHead)):
        return False
    return (
        _is_same(student.weight, teacher.weight)
        and _is_same(student.bias, teacher.bias)
        and student.softcap == teacher.softcap
    )


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )


class HeadGradient:
    """Gradients of a head, filled wave by wave from gradients of its logits; only those that are needed have memory.

    The weight's gradient is a sum over waves and kept in the compute dtype until the last one, so that it is rounded
    once. What multiplies all logits of a row is applied to them, or to the row's hidden state and its gradient where
    those are shorter.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], source: Tensor, *, is_partial: bool) -> None:
        """`head` without padding and `source` with it; `is_partial`: some rows are in no wave, their gradient is 0."""
        self.head, self.source = head, source
        self.needs_input, self.needs_weight, self.needs_bias = needs
        self.input = source.new_empty(source.shape if self.needs_input else (0,))
        if is_partial and self.needs_input:
            self.input.zero_()
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, rows: Rows, grad_logits: Tensor, row_scale: Tensor) -> None:
        """Take in ``row_scale * grad_logits`` of one wave: [rows, 1] and [rows, V]."""
        head = self.head
        if not isinstance(head, LinearHead):
            if self.needs_input:
                self.input[rows, : grad_logits.shape[1]] = (grad_logits * row_scale).to(self.input.dtype)
                self.input[rows, grad_logits.shape[1] :] = 0
            return
        is_scaled = grad_logits.shape[1] <= head.weight.shape[1]
        if is_scaled:
            grad_logits.mul_(row_scale)
        if self.needs_input:
            if isinstance(rows, slice) and grad_logits.dtype == head.weight.dtype == self.input.dtype:
                grad = torch.mm(grad_logits, head.weight, out=self.input[rows])
            else:
                grad = _grad_hidden(grad_logits, head.weight)
            if not is_scaled:
                grad.mul_(row_scale)
            if grad.dtype != self.input.dtype or not isinstance(rows, slice):
                self.input[rows] = grad.to(self.input.dtype)
        if self.needs_weight:
            hidden = head.hidden[rows].to(grad_logits.dtype) if is_scaled else head.hidden[rows] * row_scale
            if self.weight is None:
                self.weight = grad_logits.t() @ hidden
            else:
                self.weight.addmm_(grad_logits.t(), hidden)
        if self.needs_bias:
            total = grad_logits.sum(0) if is_scaled else grad_logits.t() @ row_scale[:, 0]
            self.bias = total if self.bias is None else self.bias.add_(total)

    def result(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in the dtypes and shapes of the inputs; an empty tensor stands for one that nobody asked for."""
        return (
            self.input,
            _padded(self.weight, weight, self.needs_weight, self.input),
            _padded(self.bias, bias, self.needs_bias, self.input),
        )


def _grad_hidden(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """``grad_logits @ weight``, the weight in blocks of classes where it has another dtype."""
    if weight.dtype == grad_logits.dtype:
        return grad_logits @ weight
    grad = grad_logits.new_zeros((grad_logits.shape[0], weight.shape[1]))
    classes = max(1, CONVERTED_ELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], classes):
        block = slice(first, first + classes)
        grad.addmm_(grad_logits[:, block], weight[block].to(grad.dtype))
    return grad


def _padded(gradient: Tensor | None, source: Tensor | None, needed: bool, like: Tensor) -> Tensor:
    """A gradient in its input's dtype; the classes beyond `num_classes` get 0."""
    if not needed or source is None:
        return like.new_empty((0,))
    if gradient is None:  # no rows
        return torch.zeros_like(source, memory_format=torch.contiguous_format)
    if gradient.shape == source.shape:
        return gradient.to(source.dtype)
    padded = torch.zeros_like(source, memory_format=torch.contiguous_format)
    padded[: gradient.shape[0]] = gradient
    return padded
