"""What the attention launchers do to their arguments: no kernel here, and nothing that waits for the GPU."""

from functools import cache
from typing import Literal

import torch
import triton.language as tl
from torch import Tensor

SoftmaxKind = Literal["joint", "per_modality", "partials"]


def input_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 multiplies in full unless PyTorch's own switch allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def one_hot_dtype(query: Tensor) -> tl.dtype:
    """In what `fusedmm.kernels.attention.spans` multiplies: float32 too on a CPU, where Triton's interpreter takes the
    bits of bfloat16 for integers."""
    return tl.bfloat16 if query.is_cuda and query.dtype != torch.float32 else tl.float32


def unit_last_stride(x: Tensor) -> Tensor:
    """``x`` itself if its last stride is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_of(x: Tensor | None, name: str, dims: str) -> dict[str, int]:
    """Kernel arguments ``{name}_stride_{dim}`` for the leading dimensions of ``x``; 0 where the tensor is absent."""
    return dict(zip(_stride_names(name, dims), (0,) * len(dims) if x is None else x.stride(), strict=False))


@cache
def _stride_names(name: str, dims: str) -> tuple[str, ...]:
    return tuple(f"{name}_stride_{dim}" for dim in dims)


def find_key_ranges(
    cu_seqlens_k: Tensor, active: Tensor | None, batch: int, num_heads: int, num_modalities: int
) -> Tensor:
    """[B, Hq, M, 2] int32, first key and end of each segment as a head sees it: an inactive segment is empty.

    Without ``active`` this is a view of ``cu_seqlens_k`` in which neighbours overlap.
    """
    ranges = cu_seqlens_k.as_strided((batch, num_heads, num_modalities, 2), (num_modalities, 0, 1, 1))
    if active is None:
        return ranges
    # Contiguous, for the result of `where` takes its order of dimensions from the strides of what it is given.
    return torch.where(active[..., None], ranges, ranges[..., :1]).contiguous()
