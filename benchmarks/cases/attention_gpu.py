"""Attention compositions that exist only on a GPU: variable-length calls with a merge, FlexAttention, libraries."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.case import Prepared, Unavailable
from benchmarks.cases.attention_peers import Problem, prepare, repeat_heads
from benchmarks.peers import require
from fusedmm import ModalityLayout

BACKENDS = (("flash", "FLASH_ATTENTION"), ("cudnn", "CUDNN_ATTENTION"))
NOTHING = -1e30  # LSE of no key: finite, so that its gradient is 0 and not NaN

# (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> output and LSE [total_q, H]
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def varlen(problem: Problem) -> Prepared:
    """PyTorch's variable-length attention over all keys of a sample."""
    return _plain(problem, _torch_varlen())


def varlen_merge(problem: Problem) -> Prepared:
    """One call of it for each modality, merged by their LSE, which has no gradient: forward only."""
    return _merged(problem, _torch_varlen())


def flash_attention_4(problem: Problem) -> Prepared:
    """FlashAttention's CuTe kernels over all keys of a sample; without lengths where all samples are alike."""
    layout = problem.example.layout
    batch = layout.batch_size
    lengths = layout.cu_seqlens_q.diff(), layout.cu_seqlens_k[:: layout.num_modalities].diff()
    if any(bool((length != length[0]).any()) for length in lengths):
        return _plain(problem, _flash_4())
    require("flash-attn-4")
    from flash_attn.cute import flash_attn_func

    def attention(*packed: Tensor) -> Sequence[Tensor]:
        output, _ = flash_attn_func(*(x.unflatten(0, (batch, -1)) for x in packed))
        return (output.flatten(0, 1),)

    return prepare(problem, attention)


def flash_attention_4_merge(problem: Problem) -> Prepared:
    """One call of them for each modality, merged by their LSE, which has a gradient."""
    return _merged(problem, _flash_4())


def _torch_varlen() -> Varlen:
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError as error:
        raise Unavailable("torch.nn.attention.varlen with an LSE is not in this torch") from error
    has_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def call(query: Tensor, key: Tensor, value: Tensor, *bounds: Any) -> tuple[Tensor, Tensor]:
        grouped: dict[str, Any] = {}
        if query.shape[1] != key.shape[1]:
            if has_groups:
                grouped["enable_gqa"] = True
            else:
                key, value = (repeat_heads(x, query.shape[1], 1) for x in (key, value))
        output, lse = varlen_attn(query, key, value, *bounds, return_aux=AuxRequest(lse=True), **grouped)
        return output, lse if lse.shape == query.shape[:2] else lse.transpose(0, 1)  # it moved between versions

    return call


def _flash_4() -> Varlen:
    require("flash-attn-4")
    from flash_attn.cute import flash_attn_varlen_func

    def call(query: Tensor, key: Tensor, value: Tensor, *bounds: Any) -> tuple[Tensor, Tensor]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        named = dict(zip(names, bounds, strict=True))
        output, lse = flash_attn_varlen_func(query, key, value, **named, return_lse=True)
        return output, lse.transpose(0, 1)

    return call


def _plain(problem: Problem, call: Varlen) -> Prepared:
    layout = problem.example.layout
    cu_k = layout.cu_seqlens_k[:: layout.num_modalities].contiguous()
    bounds = (layout.cu_seqlens_q, cu_k, layout.max_seqlen_q, layout.max_seqlen_k)
    return prepare(problem, lambda query, key, value: (call(query, key, value, *bounds)[0],))


@dataclass(frozen=True)
class _Part:
    """The keys of one modality, as whoever calls once for each modality holds them: together, over all samples."""

    modality: int
    rows: slice
    cu_seqlens: Tensor
    longest: int
    absent: Tensor | None  # [total_q, 1] bool: the query's sample has none; None: every sample has some


def _parts(layout: ModalityLayout, wanted: Sequence[int]) -> tuple[list[_Part], Tensor]:
    """Modalities that have keys, and the packed row of each key in their order."""
    modalities = layout.num_modalities
    lengths = layout.cu_seqlens_k.diff().view(-1, modalities)
    order = torch.argsort(layout.key_segments() % modalities, stable=True)
    sample = layout.query_samples()
    parts, start = [], 0
    for modality in range(modalities):
        length = lengths[:, modality]
        rows = slice(start, start + int(length.sum()))
        start = rows.stop
        if modality in wanted and rows.stop > rows.start:
            bounds = torch.nn.functional.pad(length.cumsum(0), (1, 0)).to(torch.int32)
            absent = (length == 0)[sample][:, None]
            parts.append(_Part(modality, rows, bounds, int(length.max()), absent if bool(absent.any()) else None))
    return parts, order


def _switched_on(problem: Problem) -> list[int]:
    """Modalities that are on: who calls once for each leaves the others out."""
    active = problem.example.tensors.get("active")
    modalities = range(problem.example.layout.num_modalities)
    if active is None:
        return list(modalities)
    on = active.flatten(0, 1)
    if not bool((on == on[0]).all()):
        raise Unavailable("switches modalities off for some samples only")
    return [m for m in modalities if bool(on[0, m])]


def merge(
    outputs: list[Tensor],
    lses: list[Tensor],
    log_prior: Tensor | None,
    gate: Tensor | None,
    places: list[int],
    modalities: int,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Join the outputs [total_q, H, D] of modalities ``places`` by their LSE [total_q, H]: output and mass."""
    scores = torch.stack(lses, -1)
    hidden = scores <= NOTHING
    if kind == "per_modality":
        mass = (~hidden).to(scores.dtype)
    else:
        prior = 0.0 if log_prior is None else log_prior[..., places]
        mass = (scores + prior).masked_fill(hidden, NOTHING).softmax(-1).masked_fill(hidden, 0.0)
    weights = (mass if gate is None else mass * gate[..., places]).to(outputs[0].dtype)
    output = sum(each * weights[..., place, None] for place, each in enumerate(outputs))
    if len(places) < modalities:
        mass = torch.zeros(*mass.shape[:-1], modalities, device=mass.device).index_copy(
            -1, torch.tensor(places, device=mass.device), mass
        )
    return cast(Tensor, output), mass


def _merged(problem: Problem, call: Varlen) -> Prepared:
    layout, kind = problem.example.layout, problem.example.softmax
    parts, order = _parts(layout, _switched_on(problem))
    places = [part.modality for part in parts]
    join: Any = torch.compile(merge, dynamic=False)

    def attention(
        query: Tensor, key: Tensor, value: Tensor, log_prior: Tensor | None = None, gate: Tensor | None = None
    ) -> Sequence[Tensor]:
        outputs, lses = [], []
        for part in parts:
            bounds = (layout.cu_seqlens_q, part.cu_seqlens, layout.max_seqlen_q, part.longest)
            output, lse = call(query, key[part.rows], value[part.rows], *bounds)
            if part.absent is not None:
                output, lse = output.masked_fill(part.absent[..., None], 0.0), lse.masked_fill(part.absent, NOTHING)
            outputs.append(output)
            lses.append(lse)
        return join(outputs, lses, log_prior, gate, places, layout.num_modalities, kind)  # type: ignore[no-any-return]

    return prepare(problem, attention, order)


def flex(problem: Problem, *, count_mask: bool = False) -> Prepared:
    """FlexAttention, compiled: one call where nothing about modalities is asked for, else one for each and a merge.

    Its LSE has a gradient, so the merge has one too. Building the block masks is timed where ``count_mask``.
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    layout, kind = problem.example.layout, problem.example.softmax
    if not layout.total_k:
        raise Unavailable("flex_attention refuses empty keys")
    run: Any = torch.compile(flex_attention, dynamic=False)
    join: Any = torch.compile(merge, dynamic=False)
    build: Any = torch.compile(create_block_mask, dynamic=False)
    places = _switched_on(problem) if problem.asks_mass else []
    functions, order = _flex_masks(layout, places)
    sizes, device = (None, None, layout.total_q, layout.total_k), str(layout.cu_seqlens_k.device)

    def masks() -> list[Any]:
        return [build(mask, *sizes, device=device) for mask in functions]

    made = masks()

    def attention(
        query: Tensor, key: Tensor, value: Tensor, log_prior: Tensor | None = None, gate: Tensor | None = None
    ) -> Sequence[Tensor]:
        blocks = masks() if count_mask else made
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        gqa = query.shape[1] != key.shape[1]
        if not places:
            return (run(q, k, v, block_mask=blocks[0], enable_gqa=gqa)[0].transpose(0, 1),)
        pairs = [run(q, k, v, block_mask=mask, enable_gqa=gqa, return_aux=AuxRequest(lse=True)) for mask in blocks]
        outputs = [output[0].transpose(0, 1) for output, _ in pairs]
        lses = [aux.lse[0].transpose(0, 1).clamp_min(NOTHING) for _, aux in pairs]
        return join(outputs, lses, log_prior, gate, places, layout.num_modalities, kind)  # type: ignore[no-any-return]

    return prepare(problem, attention, order)


def _flex_masks(layout: ModalityLayout, places: Sequence[int]) -> tuple[list[Callable[..., Tensor]], Tensor | None]:
    """Who sees which key, a function for each modality of ``places``, or without them one for all; and the order
    [total_k] in which keys then lie, None where it is the layout's.

    Keys of several calls lie by modality, which leaves a quarter fewer blocks of short segments to visit. What tells
    one mask from another is in tensors that its function captures: in its code, each would be compiled anew.
    """
    segments, visibility, modalities = layout.key_segments(), layout.visibility, layout.num_modalities
    sample_of_query, sample_of_key = layout.query_samples(), segments // modalities
    modality_of_key = segments % modalities
    order = None if visibility is None else visibility.key_order

    def function(
        chosen: Tensor | None = None, first: Tensor | None = None, last: Tensor | None = None
    ) -> Callable[..., Tensor]:
        def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = sample_of_query[q] == sample_of_key[k]
            if chosen is not None:
                seen = seen & (modality_of_key[k] == chosen)
            if first is not None and last is not None:
                seen = seen & (k >= first[q]) & (k < last[q])
            return seen

        return mask

    if not places:
        return [function()], order
    by_modality = torch.argsort(modality_of_key, stable=True)
    starts = layout.cu_seqlens_k[:-1].long()
    moved = by_modality.argsort()[starts.clamp_max(layout.total_k - 1)] - starts  # of each segment, rows down the keys
    moved = moved.view(-1, modalities)[sample_of_query]
    sample_of_key, modality_of_key = sample_of_key[by_modality], modality_of_key[by_modality]
    functions = []
    for place in places:
        ranges = [] if visibility is None else visibility.ranges[:, place].unbind(-1)
        bounds = [(x + moved[:, place]).int() for x in ranges]
        functions.append(function(torch.tensor(place, device=segments.device), *bounds))
    return functions, by_modality if order is None else order[by_modality]
