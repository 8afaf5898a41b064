"""Attention compositions that exist only on a GPU: variable-length calls with a merge, FlexAttention, libraries."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.case import Prepared, Unavailable
from benchmarks.cases.attention_peers import Problem, prepare
from benchmarks.peers import require

BACKENDS = (("flash", "FLASH_ATTENTION"), ("cudnn", "CUDNN_ATTENTION"))


def varlen(problem: Problem) -> Prepared:
    """PyTorch's variable-length attention over all keys of a sample."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable("torch.nn.attention.varlen is not in this torch") from error
    layout = problem.example.layout
    cu_k = layout.cu_seqlens_k[:: layout.num_modalities].contiguous()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        key, value = _grouped(query, key, value)
        bounds = (layout.cu_seqlens_q, cu_k, layout.max_seqlen_q, layout.max_seqlen_k)
        return (cast(Tensor, varlen_attn(query, key, value, *bounds)),)

    return prepare(problem, attention)


def varlen_merge(problem: Problem) -> Prepared:
    """One variable-length call for each modality, merged by their LSE; forward only, the LSE has no gradient."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError as error:
        raise Unavailable("torch.nn.attention.varlen with an LSE is not in this torch") from error
    layout = problem.example.layout
    modalities = layout.num_modalities
    lengths = layout.cu_seqlens_k.diff().view(-1, modalities)
    modality = layout.key_segments() % modalities
    rows = [torch.nonzero(modality == m).flatten() for m in range(modalities)]
    bounds = [torch.nn.functional.pad(lengths[:, m].cumsum(0), (1, 0)).to(torch.int32) for m in range(modalities)]
    longest = [int(lengths[:, m].max()) for m in range(modalities)]

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_prior: Tensor | None = None,
        gate: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Sequence[Tensor]:
        key, value = _grouped(query, key, value)
        outputs, lses = [], []
        for m in range(modalities):
            output, lse = varlen_attn(
                query,
                key[rows[m]],
                value[rows[m]],
                layout.cu_seqlens_q,
                bounds[m],
                layout.max_seqlen_q,
                longest[m],
                return_aux=AuxRequest(lse=True),
            )
            outputs.append(output)
            lses.append(lse if lse.shape == query.shape[:2] else lse.transpose(0, 1))  # it moved between versions
        scores = torch.stack(lses, -1)  # [total_q, H, M]
        empty = (lengths == 0)[layout.query_samples()][:, None]
        scores = scores.masked_fill(empty, -torch.inf)
        if active is not None:
            scores = scores.masked_fill(~active[layout.query_samples()], -torch.inf)
        if problem.example.softmax == "joint":
            mass = (scores if log_prior is None else scores + log_prior).softmax(-1).nan_to_num()
        else:
            mass = torch.isfinite(scores).to(scores.dtype)
        weights = mass if gate is None else mass * gate
        total = sum(output * weights[..., m, None].to(output.dtype) for m, output in enumerate(outputs))
        assert isinstance(total, Tensor)
        return total, mass

    return prepare(problem, attention)


def flex(problem: Problem, *, count_mask: bool = False) -> Prepared:
    """FlexAttention, compiled: one call where nothing about modalities is asked for, else one for each and a merge.

    Its LSE has a gradient, so the merge has one too. Building the block masks is timed where ``count_mask``.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    example = problem.example
    layout = example.layout
    modalities = layout.num_modalities
    total_q, total_k = layout.total_q, layout.total_k
    if not total_k:
        raise Unavailable("flex_attention refuses empty keys")
    segments = layout.key_segments()
    sample_of_query, sample_of_key = layout.query_samples(), segments // modalities
    modality_of_key = segments % modalities
    visible = None if layout.visibility is None else layout.visibility.ranges
    active = example.tensors.get("active")
    run: Any = torch.compile(flex_attention, dynamic=False)
    build = torch.compile(create_block_mask)

    def mask_of(chosen: int | None):  # type: ignore[no-untyped-def]
        def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = sample_of_query[q] == sample_of_key[k]
            if chosen is not None:
                seen = seen & (modality_of_key[k] == chosen)
            if visible is not None:
                ranges = visible[q, modality_of_key[k]]
                seen = seen & (k >= ranges[0]) & (k < ranges[1])
            if active is not None:
                seen = seen & active[sample_of_query[q], 0, modality_of_key[k]]
            return seen

        return build(mask, None, None, total_q, total_k, device=str(segments.device))

    wanted: list[int | None] = list(range(modalities)) if problem.asks_mass else [None]
    made = [mask_of(chosen) for chosen in wanted]

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_prior: Tensor | None = None,
        gate: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Sequence[Tensor]:
        masks = [mask_of(chosen) for chosen in wanted] if count_mask else made
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        gqa = query.shape[1] != key.shape[1]
        if not problem.asks_mass:
            return (run(q, k, v, block_mask=masks[0], enable_gqa=gqa)[0].transpose(0, 1),)
        pairs = [run(q, k, v, block_mask=mask, enable_gqa=gqa, return_lse=True) for mask in masks]
        scores = torch.stack([lse[0].transpose(0, 1) for _, lse in pairs], -1)  # [total_q, H, M]
        hidden = scores < -1e30
        scores = (scores if log_prior is None else scores + log_prior).masked_fill(hidden, -1e30)
        if example.softmax == "joint":
            mass = scores.softmax(-1).masked_fill(hidden, 0.0)
        else:
            mass = (~hidden).to(scores.dtype) + 0.0 * scores
        weights = (mass if gate is None else mass * gate).to(query.dtype)
        outputs = torch.stack([output[0].transpose(0, 1) for output, _ in pairs], -1)  # [total_q, H, D, M]
        return (outputs.nan_to_num() @ weights[..., None])[..., 0], mass

    return prepare(problem, attention)


def flash_attention_4(problem: Problem) -> Prepared:
    """FlashAttention's CuTe kernels over all keys of a sample."""
    require("flash-attn-4")
    from flash_attn.cute import flash_attn_varlen_func

    layout = problem.example.layout
    cu_k = layout.cu_seqlens_k[:: layout.num_modalities].contiguous()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        result = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=layout.cu_seqlens_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=layout.max_seqlen_q,
            max_seqlen_k=layout.max_seqlen_k,
        )
        return (result[0] if isinstance(result, tuple) else result,)

    return prepare(problem, attention)


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key heads repeated for their group: these calls want one for each query head."""
    group = query.shape[1] // key.shape[1]
    return (key, value) if group == 1 else (key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))
