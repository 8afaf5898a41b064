"""Timestamp causality as key ranges: each query sees one contiguous run of every segment once keys are sorted "
"by time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedmm.shapes import ShapeError, check_device, check_dtype, check_shapes

if TYPE_CHECKING:
    from fusedmm.layout import ModalityLayout


@dataclass(frozen=True, eq=False)
class Visibility:
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
            it is always asked.

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
    if (not wait and key_time.is_cuda) or not _sorted_within_segments(layout, key_time):
        by_time = torch.argsort(key_time, stable=True)
        key_order = by_time[torch.argsort(layout.key_segments()[by_time], stable=True)]
    ordered = key_time if key_order is None else key_time[key_order]
    bounds = layout.cu_seqlens_k.view(-1).long()
    segment = layout.query_samples()[:, None] * layout.num_modalities + torch.arange(
        layout.num_modalities, device=key_time.device
    )
    first, last = bounds[segment], bounds[segment + 1]
    end = _upper_bound(ordered, query_time[:, None], first, last, layout.max_seqlen_k)
    start = (
        first
        if window is None
        else _upper_bound(ordered, query_time[:, None] - window, first, last, layout.max_seqlen_k)
    )
    return Visibility(query_time, key_time, window, torch.stack((start, end), -1).to(torch.int32), key_order)


def lookback_tensor(op: str, layout: "ModalityLayout", lookback: int | Sequence[int] | Tensor | None) -> Tensor | None:
    """Normalise a look-back to [M] int64 on the layout's device."""
    if lookback is None:
        return None
    if isinstance(lookback, bool) or (isinstance(lookback, int) and lookback < 0):
        raise ValueError(f"{op}: lookback must be a whole number of time units, 0 or more, got {lookback}.")
    if isinstance(lookback, float):
        raise TypeError(f"{op}: lookback must be int64, got float. Use int(lookback), in the unit of the times.")
    window = torch.as_tensor(lookback)
    check_dtype(op, "lookback", window, (torch.int64,), ". Use lookback.to(torch.int64).")
    if window.ndim > 1 or (window.ndim == 1 and window.shape[0] != layout.num_modalities):
        raise ShapeError(
            f"{op}: lookback must be an int or have shape [modality={layout.num_modalities}], got {list(window.shape)}."
        )
    return window.to(layout.cu_seqlens_k.device).expand(layout.num_modalities)


def _sorted_within_segments(layout: "ModalityLayout", key_time: Tensor) -> bool:
    segment = layout.key_segments()
    return bool(((key_time[1:] >= key_time[:-1]) | (segment[1:] != segment[:-1])).all())


def _upper_bound(sorted_times: Tensor, limit: Tensor, first: Tensor, last: Tensor, longest: int) -> Tensor:
    """First position in ``first : last`` whose time exceeds ``limit``, by bisection of all rows at once."""
    low, high = first, last
    for _ in range(longest.bit_length()):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        open_range = low < high
        time = sorted_times[torch.where(open_range, middle, 0)] if sorted_times.numel() else torch.zeros_like(middle)
        right = open_range & (time <= limit)
        low, high = torch.where(right, middle + 1, low), torch.where(open_range & ~right, middle, high)
    return low
