"""Waves of rows: the matmuls around a distillation, so that logits exist only for some rows at a time.

A wave has about `WAVE_ELEMENTS` logits of two heads, a quarter of that where classes are few and caches serve, never
fewer than `MIN_WAVE_ROWS` rows (below that the weight is read too often) and, beyond `WHOLE_ELEMENTS`, never half of
all rows, unless classes are so few that logits are no larger than hidden states. Ignored rows are in no wave. Logits
and gradients are formed in float32 from inputs of any dtype (float64 from float64): on CUDA by the matmul's own
accumulator, elsewhere from a converted copy of a block of the weight.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fusedmm.eager.products import BLOCK_ELEMENTS, cast, class_blocks, compute_dtype, multiply
from fusedmm.heads import Head, LinearHead

WAVE_ELEMENTS = 1 << 20
WHOLE_ELEMENTS = 1 << 16
MIN_WAVE_ROWS = 64
# Up to so many classes a wave lies classes-major in memory, so that a vector holds rows: a reduction over 8 classes
# then takes a sixth of the time, over 2 a tenth.
FEW_CLASSES = 64
FINITE_MINIMUM = -1e30  # stands for -inf, so that a forbidden class gives 0 * 1e30 and not 0 * inf
CERTAIN = 8 / 9  # probability of a class from which 1 - p loses more than three bits: the row is saturated
FORBIDDEN_LOSS = 1e12  # beyond it a teacher or a label names what the student forbids, with 1e-18 of the mass or more

Rows = slice | Tensor  # consecutive rows, or the numbers of some


def wave_rows(num_rows: int, num_classes: int) -> int:
    """Rows of one wave: a pure function of the sizes, so that results do not depend on the machine."""
    rows = max(MIN_WAVE_ROWS, WAVE_ELEMENTS // ((8 if num_classes <= FEW_CLASSES else 2) * num_classes))
    if num_classes > FEW_CLASSES and num_rows * num_classes > WHOLE_ELEMENTS:
        rows = min(rows, -(-num_rows // 3))  # the logits of two heads then are fewer than those of all rows of one
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


def of_wave(x: Tensor, rows: Rows) -> Tensor:
    """The rows of a wave; `x` itself where the wave is all of it."""
    if isinstance(rows, slice) and rows.start == 0 and rows.stop == x.shape[0]:
        return x
    return x[rows]


def of_all(parts: list[Tensor], source: Tensor, counted: Tensor | None) -> Tensor:
    """What the waves gave, each [..., rows], for all rows of `source`: 0 where a row is in none."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if counted is None:
        return whole
    result = whole.new_zeros((*whole.shape[:-1], source.shape[0]))
    result[..., counted] = whole
    return result


class Scratch:
    """Memory for the waves of one call in the compute dtype: pages that a wave has touched serve the next."""

    def __init__(self, source: Tensor, num_rows: int, num_classes: int, counts: tuple[int, ...]) -> None:
        """`counts`: how many tensors like a head's logits lie together in each piece."""
        self.classes, self.counts = num_classes, counts
        self.height = wave_rows(num_rows, num_classes)
        size, total, dtype = self.height * num_classes, sum(counts), compute_dtype(source)
        if total * size < num_rows * num_classes:  # one allocation, which malloc keeps
            self.flat: tuple[Tensor, ...] = (source.new_empty((total * size,), dtype=dtype),)
        else:
            self.flat = tuple(source.new_empty((count * size,), dtype=dtype) for count in counts)

    def take(self, rows: Rows) -> tuple[Tensor, ...]:
        """[count, rows, V] tensors, classes-major where they are few."""
        height = rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]
        if len(self.flat) == 1:
            return torch.split(self._shaped(self.flat[0], sum(self.counts), height), list(self.counts))
        return tuple(self._shaped(flat, count, height) for flat, count in zip(self.flat, self.counts, strict=True))

    def _shaped(self, flat: Tensor, count: int, height: int) -> Tensor:
        if height != self.height:
            flat = flat[: count * height * self.classes]
        if self.classes <= FEW_CLASSES:
            return flat.view(self.classes, count, height).permute(1, 2, 0)
        return flat.view(count, height, self.classes)


def real_classes(head: Head, num_classes: int) -> Head:
    """The head without padding, its weight in the compute dtype where that is cheap; CUDA multiplies half precision as
    it is.
    """
    if not isinstance(head, LinearHead):
        return head if head.values.shape[1] == num_classes else replace(head, values=head.values[:, :num_classes])
    weight, bias = head.weight, head.bias
    if weight.shape[0] != num_classes:
        weight, bias = weight[:num_classes], None if bias is None else bias[:num_classes]
    if not weight.is_cuda and weight.numel() <= BLOCK_ELEMENTS:
        weight = cast(weight, compute_dtype(weight))
    return head if weight is head.weight else replace(head, weight=weight, bias=bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the compute dtype without rounding the product: [n, k] by [k, m]."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=compute_dtype(a))
    return _logits(a, b.t(), out, 1.0)


def _logits(hidden: Tensor, weight: Tensor, out: Tensor, scale: float) -> Tensor:
    """``scale * hidden @ weight.T``, the weight in blocks where it has another dtype, or is large."""
    if hidden.is_cuda and hidden.dtype == weight.dtype != out.dtype:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        return out if scale == 1.0 else out.mul_(scale)
    hidden = cast(hidden, out.dtype)
    for part, logits in class_blocks(weight, out):
        multiply(hidden, cast(part, out.dtype).t(), logits, scale)
    return out


def wave_logits(head: Head, rows: Rows, scale: float | Tensor, out: Tensor) -> Tensor:
    """Write `scale` (a number or [rows, 1]) times the logits of a wave, soft-capped, to `out` [rows, V]. A number costs
    nothing where nothing stands between it and the matmul.
    """
    inner = scale if isinstance(scale, float) and isinstance(head, LinearHead) and head.softcap is None else 1.0
    if isinstance(head, LinearHead):
        z = _logits(of_wave(head.hidden, rows), head.weight, out, inner)
        if head.bias is not None:
            z.add_(cast(head.bias, z.dtype).clamp_min(FINITE_MINIMUM), alpha=inner)
    else:
        z = out.copy_(of_wave(head.values, rows)).clamp_min_(FINITE_MINIMUM)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z if inner is scale else z.mul_(scale)


def pair_logits(student: Head, teacher: Head, rows: Rows, scale: float | Tensor, out: Tensor) -> Tensor:
    """`wave_logits` of student and teacher in the student's compute dtype [2, rows, V]; one matmul where they share the
    weight, so that it is read once.
    """
    # Where classes are major, MKL rounds the rows of an odd half otherwise: heads that are identical would differ.
    is_one_product = shares_weight(student, teacher) and (out.stride(-1) == 1 or out.shape[1] % 2 == 0)
    if not is_one_product:
        wave_logits(student, rows, scale, out[0])
        if compute_dtype(teacher.source) == out.dtype:
            wave_logits(teacher, rows, scale, out[1])
        else:
            own = torch.empty_like(out[1], dtype=compute_dtype(teacher.source))
            out[1].copy_(wave_logits(teacher, rows, scale, own))
        return out
    assert isinstance(student, LinearHead)
    assert isinstance(teacher, LinearHead)
    hidden = torch.cat([student.hidden[rows], teacher.hidden[rows]])
    if isinstance(scale, Tensor):
        scale = torch.cat([scale, scale])
    wave_logits(replace(student, hidden=hidden), slice(0, hidden.shape[0]), scale, out.flatten(0, 1))
    return out


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


def clear_forbidden(grad_logits: Tensor, losses: Tensor, head: Head, rows: Rows) -> None:
    """Give classes that the student forbids no gradient, in place: their logit counts as -1e30 whatever its input. Only
    where the losses of the wave, of any shape, say that there was one.
    """
    logits = head.bias if isinstance(head, LinearHead) else head.values
    if head.softcap is not None or logits is None:  # capped, the logit is not forbidden
        return
    if bool((losses > FORBIDDEN_LOSS).any()):
        logits = logits if isinstance(head, LinearHead) else of_wave(logits, rows)
        grad_logits.masked_fill_(cast(logits, grad_logits.dtype) < FINITE_MINIMUM, 0.0)  # half has no -1e30


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
            is_direct = isinstance(rows, slice) and grad_logits.dtype == self.input.dtype
            height, width = grad_logits.shape[0], self.input.shape[1]
            grad = self.input[rows] if is_direct else grad_logits.new_empty((height, width))
            for number, (part, its_grad) in enumerate(class_blocks(head.weight, grad_logits)):
                multiply(its_grad, part.to(grad.dtype), grad, add=number > 0)
            if not is_scaled:
                grad.mul_(row_scale)
            if not is_direct:
                self.input[rows] = grad.to(self.input.dtype)
        if self.needs_weight:
            hidden = of_wave(head.hidden, rows)
            hidden = hidden.to(grad_logits.dtype) if is_scaled else hidden * row_scale
            is_first = self.weight is None
            if self.weight is None:
                self.weight = grad_logits.new_empty(head.weight.shape)
            for part, its_grad in class_blocks(self.weight, grad_logits):
                multiply(its_grad.t(), hidden, part, add=not is_first)
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
