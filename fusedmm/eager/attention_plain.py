"""Attention that nobody asks about modalities: PyTorch's own, a call for all samples of one size.

Without prior, gate and mass it is `scaled_dot_product_attention`, of which one operator does all, and PyTorch the
gradient. `fusedmm.eager.attention`, which gives mass and lse too, is as fast in a loop, and a tenth slower as a first
call after other work (512 queries of 256 keys, 4 heads of 64), which has to bring more code into the caches.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

RUN_SCORES = 1 << 16  # of all heads, that a call of its own is worth beside the groups of `fusedmm.eager.attention`
Bounds = tuple[int, ...]


class Run(NamedTuple):
    """Neighbouring samples of one size."""

    first_q: int  # packed row of the first query
    first_k: int
    size_q: int  # of a sample
    size_k: int
    samples: int = 1

    @property
    def end_k(self) -> int:
        return self.first_k + self.samples * self.size_k

    @property
    def scores(self) -> int:
        """Of a head."""
        return self.samples * self.size_q * self.size_k


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    num_modalities: int,
    scale: float,
) -> Tensor | None:
    """Output [total_q, Hq, D] of the joint softmax, contiguous; None where samples are too many and too small for calls
    of their own, or one has queries and no keys, or PyTorch's call would not be the fused one of a CPU.

    Args:
        query: [total_q, Hq, D].
        key, value: [total_k, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: [B+1] and [B*M+1], of `fusedmm.ModalityLayout`.
        scale: multiplies the scores.
    """
    if not _is_fused((query, key, value)):
        return None
    heads, kv_heads = query.shape[1], key.shape[1]
    runs = _runs(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist()[::num_modalities]))
    if not runs or (len(runs) > 1 and heads * sum(run.scores for run in runs) < RUN_SCORES * len(runs)):
        return None
    outputs = []
    for run in runs:
        q = _by_sample(query, run.first_q, run.samples, run.size_q)
        k, v = (_by_sample(t, run.first_k, run.samples, run.size_k) for t in (key, value))
        output = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=heads != kv_heads)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs)  # strides are those of the query


def _by_sample(packed: Tensor, first: int, samples: int, size: int) -> Tensor:
    """A view [samples, H, size, D] of rows of [total, H, D], from the first of them on."""
    rows, heads, dim = packed.shape
    if samples * size != rows:
        packed = packed.narrow(0, first, samples * size)
    return packed.view(samples, size, heads, dim).transpose(1, 2)


def _is_fused(packed: Iterable[Tensor]) -> bool:
    """Whether PyTorch has a call for them that keeps no [query, key] matrix, is not switched off, and gives the same
    gradients each time, which no GPU's does.
    """
    return torch._C._get_flash_sdp_enabled() and all(t.is_cpu and t.stride(2) == 1 for t in packed)


@lru_cache(maxsize=4)
def _runs(bounds_q: Bounds, bounds_k: Bounds) -> tuple[Run, ...]:
    """Every sample that has queries, in order; none where one of them has no keys."""
    found: list[Run] = []
    for (first_q, end_q), (first_k, end_k) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        own = Run(first_q, first_k, end_q - first_q, end_k - first_k)
        if own.size_q == 0:
            continue
        if own.size_k == 0:
            return ()
        last = found[-1] if found else None
        if last and (own.size_q, own.size_k, first_k) == (last.size_q, last.size_k, last.end_k):
            found[-1] = last._replace(samples=last.samples + 1)
        else:
            found.append(own)
    return tuple(found)
