"""What the attention launchers are given and make of it: no kernel here, and nothing that waits for the GPU."""

from functools import cache
from typing import Literal, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

SoftmaxKind = Literal["joint", "per_modality", "partials"]


class AttentionProblem(NamedTuple):
    """All that an attention is given beside query, key and value: the same for its forward and its backward.

    Attributes:
        cu_seqlens_q: [B+1] int32.
        cu_seqlens_k: [B*M+1] int32, sample-major, modality-minor.
        query_tiles: [total_q // 128 + B, 2] int32, (sample, first query) of each tile of 128 rows, longest work first,
            unused ones (-1, 0).
        key_tiles: [total_k // 128 + B*M, 2] int32, (segment, first key); only the backward needs it.
        num_modalities: M.
        softmax: "joint", "per_modality" or "partials".
        scale: multiplies scores.
        log_prior: [total_q, Hq, M] float32, any strides, or None.
        gate: [total_q, Hq, M] float32, any strides, or None; refused by "partials".
        output_gate: [total_q, Hq, D] logits in query's dtype, or None.
        active: [B, Hq, M] bool, any strides, or None.
        visible: [total_q, M, 2] int32, first key and end of what a query sees of a modality, within its segment; or
            None.
        seed: [1] int64 or None; with it key j is kept by query r and head h iff philox(seed; j, r, h, 0) as a uniform
            number is at least dropout_p.
        dropout_p: in [0, 1).
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    query_tiles: Tensor
    key_tiles: Tensor
    num_modalities: int
    softmax: SoftmaxKind
    scale: float
    log_prior: Tensor | None = None
    gate: Tensor | None = None
    output_gate: Tensor | None = None
    active: Tensor | None = None
    visible: Tensor | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0

    @property
    def batch(self) -> int:
        """B."""
        return self.cu_seqlens_q.numel() - 1

    def key_ranges(self, num_heads: int) -> Tensor:
        """[B, Hq, M, 2] int32, first key and end of each segment as a head sees it: an inactive segment is empty.

        Without ``active`` this is a view of ``cu_seqlens_k`` in which neighbours overlap.
        """
        shape = (self.batch, num_heads, self.num_modalities, 2)
        ranges = self.cu_seqlens_k.as_strided(shape, (self.num_modalities, 0, 1, 1))
        if self.active is None:
            return ranges
        # Contiguous, for the result of `where` takes its order of dimensions from the strides of what it is given.
        return torch.where(self.active[..., None], ranges, ranges[..., :1]).contiguous()

    def with_positive_scale(self, query: Tensor) -> tuple[Tensor, "AttentionProblem"]:
        """Query and problem of the same scores with a scale above 0: its sign, or the 0, goes into the query; exact.

        The forwards take the maximum of the scores before they scale them.
        """
        if self.scale > 0.0:
            return query, self
        if self.scale == 0.0:
            return query * 0.0, self._replace(scale=1.0)
        return -query, self._replace(scale=-self.scale)

    def empty_results(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unwritten output [total_q, Hq, D], for partials [total_q, Hq, M, D], in query's dtype; mass and lse
        [total_q, Hq, M] float32.
        """
        total_q, num_heads, head_dim = query.shape
        mass = query.new_empty((total_q, num_heads, self.num_modalities), dtype=torch.float32)
        output = query.new_empty((*mass.shape, head_dim) if self.softmax == "partials" else query.shape)
        return output, mass, torch.empty_like(mass)


def input_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 multiplies in full unless PyTorch's own switch allows TF32.

    Asked of the newer of its two names, which follows the older; ``allow_tf32`` raises where the newer one is set.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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


def modality_stride(grad_output: Tensor) -> int:
    """Stride of M in [total_q, Hq, M, D]; 0 for [total_q, Hq, D], which all modalities share."""
    return grad_output.stride(2) if grad_output.ndim == 4 else 0
