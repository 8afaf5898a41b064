"""Products of matrices in the compute dtype: what losses, scores and attention on a CPU spend most of their time in.

MKL, which `torch.mm` calls, runs its widest kernels on its maker's chips only; oneDNN, which PyTorch carries too, uses
what the chip has: 200 GFLOP/s against 92 on one core of an EPYC (Zen 5). It is asked where the product is large enough
to pay for its 16 microseconds a call.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# exp2 takes a quarter of the time of exp: exponents are in base 2, what is returned is natural.
LN_2 = math.log(2.0)
LOG2_E = 1 / LN_2
HAS_ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
ONEDNN_FLOPS = 1 << 22  # half of what it takes to pay for turning `a`
ONEDNN_DEPTH = 32  # length of the sums below which it is no faster
# A weight is converted, and laid out anew by oneDNN, in blocks of so many elements: the copy of one at a time is held.
BLOCK_ELEMENTS = 1 << 22


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for every dtype but float64, which stays."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, without a call where it has it."""
    return x if x.dtype == dtype else x.to(dtype)


def class_blocks(weight: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A weight [V, D] and what has its classes as columns [rows, V], block by block of the classes."""
    classes = weight.shape[0]
    if weight.numel() <= BLOCK_ELEMENTS:
        yield weight, logits
        return
    step = max(1, BLOCK_ELEMENTS // weight.shape[1])
    for first in range(0, classes, step):
        yield weight[first : first + step], logits[:, first : first + step]


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None, scale: float = 1.0, *, add: bool = False) -> Tensor:
    """``out = scale * a @ b``, or ``out += scale * a @ b``: [n, k] by [k, m], all of one dtype."""
    if not _suits_onednn(a, b):
        if out is None:
            return torch.mm(a, b)
        return torch.addmm(out, a, b, beta=float(add), alpha=scale, out=out)
    # It wants the left operand in rows and gives rows; the right one it lays out anew in any case.
    if out is None:
        return linear(a, b.t())
    if out.stride(0) == 1 or (a.stride(1) != 1 and out.numel() < a.numel()):
        left, right, target = b.t(), a, out.t()
    else:
        left, right, target = a, b.t(), out
    product = linear(left, right)
    if add:
        target.add_(product, alpha=scale)
    else:
        torch.mul(product, scale, out=target)
    return out


def linear(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.t()`` by oneDNN, which takes a loop a thousand times slower where the right one has gaps."""
    if not (right.is_contiguous() or right.t().is_contiguous()):
        right = right.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return product


def has_onednn(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `linear` is there for a dtype beside a tensor, and MKL what it is compared with."""
    return dtype == torch.float32 and x.is_cpu and HAS_ONEDNN and torch._C._get_mkldnn_enabled()


def ones_to_sum(x: Tensor, count: int) -> Tensor | None:
    """As many ones: their product with classes-major logits like `x` is the sum over classes, in half the time of a
    reduction. None where the user lets float32 products round to less, which is meant for logits, not for sums.
    """
    precision = torch._C._get_fp32_precision_getter("mkldnn", "matmul")  # the attribute takes 20 us more at first
    return None if precision in ("bf16", "tf32") else x.new_ones((count,))


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    (rows, depth), columns = a.shape, b.shape[1]
    return (
        2 * rows * depth * columns >= (ONEDNN_FLOPS if a.stride(1) == 1 else 2 * ONEDNN_FLOPS)
        and depth >= ONEDNN_DEPTH
        and has_onednn(a, a.dtype)
    )
