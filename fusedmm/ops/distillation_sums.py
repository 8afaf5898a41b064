"""Gradients of a head as sums over waves of rows and ranges of classes of the gradient of its logits."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import matmul
from fusedmm.ops.distillation_waves import ROUNDED_SUMS, slices

if TYPE_CHECKING:
    from fusedmm.kernels.distillation.heads import HeadTensors

Needs = tuple[bool, bool, bool]

# Largest gradient of a row in float16, for which upstream gradients are multiplied by a power of two: a probability of
# 1e-6 is then no subnormal, and a log-ratio of 1000 does not overflow.
FLOAT16_ROW = 64.0
UNSCALED_ELEMENTS = 4 << 20  # of a float16 weight gradient, divided by that power at a time: 16 MiB in float32


class FormsGradient(Protocol):
    """Rows of a loss whose gradient in the student's logits can be formed for a range of classes."""

    def grad_logits(self, saved: Tensor, grad_rows: Tensor, columns: slice, out: Tensor) -> Tensor:
        """``grad_rows`` times the gradient of rows [N] in classes `columns`, written to `out` [N, columns]; `out`."""


class HeadSums:
    """Gradients of the student's head, filled range by range.

    Hidden's is a sum over classes: complete with the last range of a wave, where it is rounded to its dtype. The
    weight's and the bias's are sums over waves. They are kept in float32, except a half-precision weight gradient of at
    most `ROUNDED_SUMS` parts, which would double the memory of the largest tensor.

    float16 gradients are scaled: those of logits, so that the largest row has about `FLOAT16_ROW`; those of the weight,
    a sum over rows, by the number of rows less, so that none overflows that would not in the end.
    """

    def __init__(
        self, head: "HeadTensors", shard: Shard, needs: Needs, grad_rows: Tensor, *, waves: int, is_cut: bool
    ) -> None:
        """`grad_rows`: [N] upstream gradient of every row, 0 where it does not count; `is_cut`: into ranges of
        classes.
        """
        self.head, self.shard, self.needs = head, shard, needs
        source, weight = head.source, head.weight
        self.scale: Tensor | None = None
        self.weight_scale = 1.0
        self.grad_rows = grad_rows
        if source.dtype == torch.float16 and weight is not None and grad_rows.numel() > 0:
            self.scale = _float16_scale(grad_rows)
            self.weight_scale = 0.5 ** (grad_rows.numel() - 1).bit_length()
            self.grad_rows = grad_rows * self.scale
        self.buffer = source.new_empty((0,))
        self.input = self._zeros(source, needs[0], source.dtype)
        is_rounded = waves <= ROUNDED_SUMS
        self.weight = self._zeros(weight, needs[1], source.dtype if is_rounded else torch.float32)
        self.bias = self._zeros(head.bias, needs[2], torch.float32)
        # Every rank of a sharded head takes the same dtype: its classes may fit one range where another's do not.
        in_parts = is_cut or self.scale is not None or shard.group is not None
        self.keeps_partial = needs[0] and weight is not None and source.dtype != torch.float32 and in_parts
        self.partial = source.new_empty((0,), dtype=torch.float32)
        self.counted = source.new_empty((0,))

    def _zeros(self, source: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor:
        shape = source.shape if source is not None and needed else (0,)
        return torch.zeros(shape, dtype=dtype, device=self.head.source.device)

    def add(self, rows: FormsGradient, saved: Tensor, wave: slice, block: slice) -> None:
        """Form the gradient of the logits of rows `wave` (those that `rows` has) and classes `block`, and take it into
        the sums. The ranges of a wave come one after the other.
        """
        shape = (wave.stop - wave.start, block.stop - block.start)
        if self.buffer.numel() < shape[0] * shape[1]:
            self.buffer = self.head.source.new_empty(shape[0] * shape[1])
        grad_rows = self.grad_rows[wave].contiguous()
        grad_logits = rows.grad_logits(saved, grad_rows, block, self.buffer[: shape[0] * shape[1]].view(shape))
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
            accumulate(
                self.weight[block], grad_logits.t(), self.counted, is_sum=wave.start > 0, scale=self.weight_scale
            )
        if self.needs[2]:
            self.bias[block] += grad_logits.sum(0, dtype=torch.float32)

    def _add_input(self, wave: slice, block: slice, grad_logits: Tensor, weight: Tensor) -> None:
        """Take a range into hidden's gradient; the last one of a wave completes it."""
        total = self.input[wave]
        if self.keeps_partial:
            if self.partial.numel() == 0:
                self.partial = torch.empty(total.shape, dtype=torch.float32, device=total.device)
            total = self.partial[: total.shape[0]]
        accumulate(total, grad_logits, weight[block], is_sum=block.start > 0)
        if block.stop == self.shard.count:
            self.shard.sum(total)
            if self.keeps_partial:
                self.input[wave] = total if self.scale is None else total.div_(self.scale)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three gradients in the dtypes of their inputs, hidden's summed over ranks."""
        self.buffer = self.partial = self.counted = self.buffer.new_empty((0,))
        if self.scale is not None:
            factor = 1 / (self.scale * self.weight_scale)
            for block in slices(self.weight.shape[0], max(1, UNSCALED_ELEMENTS // self.head.source.shape[1])):
                self.weight[block] = self.weight[block].float().mul_(factor)
            self.bias.div_(self.scale)
        dtype = self.head.source.dtype
        return self.input, self.weight.to(dtype), self.bias.to(dtype)


def _float16_scale(grad_rows: Tensor) -> Tensor:
    """The power of two, on the device, that brings the largest of upstream gradients to about `FLOAT16_ROW`."""
    largest = grad_rows.abs().amax()
    power = torch.exp2(torch.log2(FLOAT16_ROW / largest).floor().clamp(-100, 100))
    return torch.where(largest > 0, power, 1.0)


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, is_sum: bool, scale: float = 1.0) -> None:
    """``total = scale * a @ b``, or plus the former total, in place; the product is not rounded before it is added."""
    if total.is_cuda and total.dtype != a.dtype:
        if is_sum or scale != 1.0:
            torch.addmm(total, a, b, beta=float(is_sum), alpha=scale, out_dtype=total.dtype, out=total)
        else:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif total.dtype == a.dtype and (total.is_cuda or total.dtype == torch.float32):
        torch.addmm(total, a, b, beta=float(is_sum), alpha=scale, out=total)
    else:
        product = matmul(a, b)
        if scale != 1.0:
            product.mul_(scale)
        total.copy_(product + total if is_sum else product)
