"""Timestamp causality as key ranges: once keys are sorted by time, a query sees one contiguous run of every segment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library

from fusedmm.shapes import ShapeError, check_device, check_dtype, check_shapes
from fusedmm.tree import TensorTree

if TYPE_CHECKING:
    from fusedmm.layout import ModalityLayout


@dataclass(frozen=True, eq=False)
class Visibility(TensorTree):
    """Which keys each query may see.

    Attributes:
        query_time: [total_q] int64.
        key_time: [total_k] int64.
        lookback: [M] int64, or None.
        ranges: [total_q, M, 2] int32: query i sees keys ``ranges[i, m, 0] : ranges[i, m, 1]`` of modality m, in the
            order below.
        key_order: [total_k] int64 that sorts keys by time within their segments; None where they are sorted already.
    """

    query_time: Tensor
    key_time: Tensor
    lookback: Tensor | None
    ranges: Tensor
    key_order: Tensor | None


def find_visible(
    op: str,
    layout: "ModalityLayout",
    query_time: Tensor,
    key_time: Tensor,
    lookback: int | Sequence[int] | Tensor | None,
    *,
    wait: bool,
) -> Visibility:
    """Check times and turn them into ranges.

    Args:
        op: first word of an error.
        layout: where queries and segments lie.
        query_time: [total_q] int64.
        key_time: [total_k] int64.
        lookback: int or [M] int64, at least 0; None: unbounded.
        wait: ask the GPU whether keys are sorted (a wait); otherwise they are sorted and gathered in any case. On a CPU
            it is asked unless a graph is being captured.

    Cost: ``total_q * M`` binary searches in ``log2(max_seqlen_k)`` steps.
    """
    check_shapes(
        op,
        {"query_time": (query_time, ("query",)), "key_time": (key_time, ("key",))},
        {"query": layout.total_q, "key": layout.total_k},
    )
    for argument, time in (("query_time", query_time), ("key_time", key_time)):
        advice = " (it cannot hold epoch times exactly)" if time.is_floating_point() else ""
        check_dtype(op, argument, time, (torch.int64,), f"{advice}. Use {argument}.to(torch.int64).")
    check_device(op, {"layout": layout.cu_seqlens_q, "query_time": query_time, "key_time": key_time})
    window = lookback_tensor(op, layout, lookback)
    key_order = None
    may_ask = wait or not (key_time.is_cuda or torch.compiler.is_compiling())
    if not (may_ask and _sorted_within_segments(layout, key_time)):
        by_time = torch.argsort(key_time, stable=True)
        key_order = by_time[torch.argsort(layout.key_segments()[by_time], stable=True)]
    ranges = torch.ops.fusedmm.visible_ranges(
        query_time,
        key_time if key_order is None else key_time[key_order],
        window,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.query_tiles,
        layout.num_modalities,
        layout.max_seqlen_k,
    )
    return Visibility(query_time, key_time, window, ranges, key_order)


def lookback_tensor(op: str, layout: "ModalityLayout", lookback: int | Sequence[int] | Tensor | None) -> Tensor | None:
    """Normalise a look-back to [M] int64 on the layout's device; a negative one in a tensor counts as 0."""
    if lookback is None:
        return None
    if isinstance(lookback, bool) or (isinstance(lookback, int) and lookback < 0):
        raise ValueError(f"{op}: lookback must be a whole number of time units, 0 or more, got {lookback}.")
    if isinstance(lookback, float | str):
        raise TypeError(
            f"{op}: lookback must be int64, got {type(lookback).__name__}. Use int(lookback), in the unit of the times."
        )
    device = layout.cu_seqlens_k.device
    # A number is written there: a copy from the host's memory would wait for all that the GPU still has to do.
    window = torch.full((), lookback, device=device) if isinstance(lookback, int) else torch.as_tensor(lookback)
    check_dtype(op, "lookback", window, (torch.int64,), ". Use lookback.to(torch.int64).")
    if window.ndim > 1 or (window.ndim == 1 and window.shape[0] != layout.num_modalities):
        raise ShapeError(
            f"{op}: lookback must be an int or have shape [modality={layout.num_modalities}], got {list(window.shape)}."
        )
    return window.to(device, non_blocking=True).clamp_min(0).expand(layout.num_modalities)


def _sorted_within_segments(layout: "ModalityLayout", key_time: Tensor) -> bool:
    segment = layout.key_segments()
    return bool(((key_time[1:] >= key_time[:-1]) | (segment[1:] != segment[:-1])).all())


def _visible_ranges(
    query_time: Tensor,
    key_time: Tensor,
    lookback: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_tiles: Tensor,
    num_modalities: int,
    max_seqlen_k: int,
) -> Tensor:
    """[total_q, M, 2] int32 from keys sorted within their segments, by PyTorch's operators."""
    query = torch.arange(query_time.shape[0], device=query_time.device)
    sample = torch.searchsorted(cu_seqlens_q[1:].long(), query, right=True)
    segment = sample[:, None] * num_modalities + torch.arange(num_modalities, device=query.device)
    bounds = cu_seqlens_k.long()
    first, last = bounds[segment], bounds[segment + 1]
    steps = max_seqlen_k.bit_length()
    end = _first_later(key_time, query_time[:, None], first, last, steps)
    start = first
    if lookback is not None:
        limit = query_time[:, None] - lookback
        start = _first_later(key_time, limit, first, last, steps)
        start = torch.where(limit > query_time[:, None], first, start)  # it wrapped: older than any int64
    return torch.stack((start, end), -1).to(torch.int32)


def _visible_ranges_cuda(
    query_time: Tensor,
    key_time: Tensor,
    lookback: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_tiles: Tensor,
    num_modalities: int,
    max_seqlen_k: int,
) -> Tensor:
    from fusedmm.kernels.visibility import visible_ranges

    ranges = cu_seqlens_k.new_empty((query_time.shape[0], num_modalities, 2))
    times = query_time.contiguous(), key_time.contiguous(), None if lookback is None else lookback.contiguous()
    with torch.cuda.device_of(query_time):
        visible_ranges(*times, cu_seqlens_q, cu_seqlens_k, query_tiles, ranges, max_seqlen_k)
    return ranges


def _fake_visible_ranges(query_time: Tensor, key_time: Tensor, *problem: Any) -> Tensor:
    return query_time.new_empty((query_time.shape[0], problem[-2], 2), dtype=torch.int32)


def _first_later(sorted_times: Tensor, limit: Tensor, first: Tensor, last: Tensor, steps: int) -> Tensor:
    """First position in ``first : last`` whose time exceeds ``limit``, by bisection of all rows at once."""
    low, high = first, last
    if sorted_times.numel() == 0:
        return low
    for _ in range(steps):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        is_open = low < high
        move = is_open & (sorted_times[torch.where(is_open, middle, 0)] <= limit)
        low, high = torch.where(move, middle + 1, low), torch.where(is_open & ~move, middle, high)
    return low


_library = library.Library("fusedmm", "FRAGMENT")
_library.define(
    "visible_ranges(Tensor query_time, Tensor key_time, Tensor? lookback, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor query_tiles, int num_modalities, int max_seqlen_k) -> Tensor"
)
_library.impl("visible_ranges", _visible_ranges, "CPU")
_library.impl("visible_ranges", _visible_ranges_cuda, "CUDA")
library.register_fake("fusedmm::visible_ranges", _fake_visible_ranges, lib=_library)
