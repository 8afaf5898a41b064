"""Waves of rows: the matmuls around a distillation, so that logits exist only for some rows at a time.

A wave has about `WAVE_ELEMENTS` logits, never fewer than `MIN_WAVE_ROWS` rows (below that the weight is read too often)
and, beyond `WHOLE_ELEMENTS`, never all rows. Logits and gradients are formed in float32 from inputs of any dtype
(float64 from float64): on CUDA by the matmul's own accumulator, elsewhere from a converted copy of a block of the
weight.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fusedmm.heads import Head, LinearHead

WAVE_ELEMENTS = 1 << 18
WHOLE_ELEMENTS = 1 << 16
MIN_WAVE_ROWS = 64
# A half-precision weight up to this size is converted once a call, a larger one in blocks, once a wave.
CONVERTED_ELEMENTS = 1 << 22
FINITE_MINIMUM = -1e30  # stands for -inf, so that a forbidden class gives 0 * 1e30 and not 0 * inf


def wave_rows(num_rows: int, num_classes: int) -> int:
    """Rows of one wave: a pure function of the sizes, so that results do not depend on the machine."""
    rows = max(MIN_WAVE_ROWS, WAVE_ELEMENTS // num_classes)
    if rows >= num_rows and num_rows * num_classes > WHOLE_ELEMENTS:
        rows = (num_rows + 1) // 2
    return max(1, min(rows, num_rows))


def waves(num_rows: int, num_classes: int) -> Iterator[slice]:
    """Slices of consecutive rows that cover all of them."""
    rows = wave_rows(num_rows, num_classes)
    return (slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, rows))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for every dtype but float64, which stays."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def convert_small(head: Head) -> Head:
    """The head with its weight in the compute dtype where that is cheap; CUDA multiplies half precision as it is."""
    if not isinstance(head, LinearHead) or head.weight.dtype == compute_dtype(head.weight) or head.weight.is_cuda:
        return head
    is_small = head.weight.numel() <= CONVERTED_ELEMENTS
    return replace(head, weight=head.weight.to(compute_dtype(head.weight))) if is_small else head


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in the compute dtype without rounding the product: [n, k] by [k, m]; written to `out` where given."""
    dtype = compute_dtype(a)
    if a.dtype == b.dtype == dtype:
        return torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    a = a.to(dtype)
    if b.dtype == dtype:
        return torch.mm(a, b, out=out)
    columns = max(1, CONVERTED_ELEMENTS // b.shape[0])
    for first in range(0, b.shape[1], columns):
        block = slice(first, min(first + columns, b.shape[1]))
        out[:, block] = a @ b[:, block].to(dtype)
    return out


def wave_logits(head: Head, rows: slice, num_classes: int) -> Tensor:
    """[rows, V] logits of a wave, soft-capped, in the compute dtype; memory of its own."""
    if isinstance(head, LinearHead):
        z = matmul(head.hidden[rows], head.weight[:num_classes].t())
        if head.bias is not None:
            z += head.bias[:num_classes]
    else:
        z = head.values[rows, :num_classes].to(compute_dtype(head.values)).clamp_min(FINITE_MINIMUM)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z


def pair_logits(student: Head, teacher: Head, rows: slice, num_classes: int) -> tuple[Tensor, Tensor]:
    """Logits of both heads in the student's compute dtype; one matmul where they share the weight, so that it is read
    once.
    """
    if not shares_weight(student, teacher):
        z = wave_logits(student, rows, num_classes)
        return z, wave_logits(teacher, rows, num_classes).to(z.dtype)
    assert isinstance(student, LinearHead)
    assert isinstance(teacher, LinearHead)
    both = replace(student, hidden=torch.cat([student.hidden[rows], teacher.hidden[rows]]))
    z = wave_logits(both, slice(None), num_classes)
    count = z.shape[0] // 2
    return z[:count], z[count:]


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
    once.
    """

    def __init__(self, head: Head, num_classes: int, needs: tuple[bool, bool, bool]) -> None:
        self.head, self.num_classes = head, num_classes
        self.needs_input, self.needs_weight, self.needs_bias = needs
        source = head.hidden if isinstance(head, LinearHead) else head.values
        self.dtype = compute_dtype(source)
        self.input = (
            torch.empty_like(source, memory_format=torch.contiguous_format)
            if self.needs_input
            else source.new_empty((0,))
        )
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, rows: slice, grad_logits: Tensor, z: Tensor) -> None:
        """Take in the gradient of one wave's soft-capped logits `z`; `grad_logits` is overwritten."""
        head = self.head
        if head.softcap is not None:
            grad_logits.mul_(1 - (z / head.softcap).square_())
        if not isinstance(head, LinearHead):
            if self.needs_input:
                self.input[rows, : self.num_classes] = grad_logits
                self.input[rows, self.num_classes :] = 0
            return
        if self.needs_input:
            weight = head.weight[: self.num_classes]
            if grad_logits.dtype == weight.dtype == self.input.dtype:
                torch.mm(grad_logits, weight, out=self.input[rows])
            else:
                self.input[rows] = _grad_hidden(grad_logits, weight)
        if self.needs_weight:
            hidden = head.hidden[rows].to(self.dtype)
            if self.weight is None:
                self.weight = grad_logits.t() @ hidden
            else:
                self.weight.addmm_(grad_logits.t(), hidden)
        if self.needs_bias:
            total = grad_logits.sum(0)
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
        block = slice(first, min(first + classes, weight.shape[0]))
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
