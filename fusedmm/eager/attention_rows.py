"""Between packed tensors and the eager attention's blocks: heads first, samples of a group side by side.

A group's keys are [Hkv * c, k, D] for c samples. A block's rows, n queries of each sample and G query heads a key head,
are [*shape, X], shape being [H, n] for one sample without grouped heads and [Hkv, c, G, n] otherwise; they meet keys as
matrices [Hkv * c, G * n, X]. Rows that lie together are views, and so are keys of a single sample; others are copies.
"""

import torch
from torch import Tensor

from fusedmm.eager.attention_groups import Block, Group
from fusedmm.eager.products import cast


def read_keys(packed: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """[Hkv * c, k, D] of [total_k, Hkv, D], 0 for padding."""
    if group.is_view:
        return cast(key_view(packed, group), dtype)
    if isinstance(group.keys, slice):
        return cast(_heads_first(packed, group.keys, len(group.samples)), dtype).flatten(0, 1)
    heads, dim = packed.shape[1:]
    slots = group.key_slots(heads)
    padded = cast(packed.reshape(-1, dim).index_select(0, slots.read), dtype)
    if len(slots.blank):
        padded.index_fill_(0, slots.blank, 0.0)
    return padded.view(heads * len(group.samples), -1, dim)


def key_view(packed: Tensor, group: Group) -> Tensor:
    """A view [Hkv, k, D] of [total_k, Hkv, D], for a group whose keys are one."""
    return _taken(packed, group.keys).transpose(0, 1)


def add_keys(buffer: Tensor, group: Group, rows: Tensor, add: bool) -> None:
    """Write or add [Hkv * c, k, D] to the group's rows of a [total_k, Hkv, D] buffer."""
    heads, dim = buffer.shape[1:]
    if isinstance(group.keys, slice):
        rows = rows.view(heads, len(group.samples), -1, dim).permute(1, 2, 0, 3)  # [c, k, Hkv, D]
        target = _taken(buffer, group.keys).view(rows.shape)
        target.add_(rows) if add else target.copy_(rows)
        return
    slots = group.key_slots(heads)
    rows = rows.flatten(0, 1)
    if slots.run is not None and not add:
        torch.index_select(rows, 0, slots.back, out=buffer[slots.run].view(-1, dim))
        return
    rows = rows.index_select(0, slots.back).view(-1, heads, dim)
    buffer.index_add_(0, slots.keys, rows) if add else buffer.index_copy_(0, slots.keys, rows)


def add_key_product(buffer: Tensor, group: Group, left: Tensor, right: Tensor, add: bool, scale: float = 1.0) -> None:
    """The same with ``scale * left @ right``, in the buffer itself where a view of it will do."""
    if group.is_view:
        key_view(buffer, group).baddbmm_(left, right, beta=int(add), alpha=scale)
    else:
        add_keys(buffer, group, product(left, right, scale), add)


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale * left @ right`` of batches of matrices."""
    result = left.new_empty((left.shape[0], left.shape[1], right.shape[2]))
    return result.baddbmm_(left, right, beta=0, alpha=scale)


def read_rows(packed: Tensor, group: Group, block: Block, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """The block's rows of [total_q, Hq, X]: [*shape, X], 0 for padding."""
    if isinstance(block.rows, slice):
        rows = cast(_blocked(_taken(packed, block.rows), group, kv_heads), dtype)
        return rows if rows.ndim == 3 else rows.contiguous()  # what is as large as scores meets a view more slowly
    rows = cast(_heads_first(packed, block.rows, len(group.samples)), dtype)  # [Hq, c, n, X]
    if block.padding is not None:
        rows = rows.masked_fill(block.padding[..., None], 0)
    return rows.view(kv_heads, -1, *rows.shape[1:]).transpose(1, 2)


def as_matrices(rows: Tensor) -> Tensor:
    """[*shape, X] to [Hkv * c, G * n, X]."""
    return rows if rows.ndim == 3 else rows.flatten(2, 3).flatten(0, 1)


def write_rows(
    buffer: Tensor, group: Group, block: Block, kv_heads: int, result: Tensor, divisor: Tensor | None = None
) -> None:
    """Write a block's contiguous rows, in either shape, to those of a [total_q, Hq, X] buffer, divided by [*shape, 1]
    where given.
    """
    if isinstance(block.rows, slice):
        target = _blocked(_taken(buffer, block.rows), group, kv_heads)
        rows = result if result.ndim == target.ndim else result.view(target.shape)
        target.copy_(rows) if divisor is None else torch.div(rows, divisor, out=target)
        return
    if divisor is not None:
        result = result.view(*divisor.shape[:-1], -1) / divisor
    shape = kv_heads, len(group.samples), -1, block.size, result.shape[-1]
    rows = result.view(shape).permute(1, 3, 0, 2, 4).reshape(-1, *buffer.shape[1:])
    if block.padding is None:
        buffer.index_copy_(0, block.rows, rows)
    else:
        real = ~block.padding.flatten()
        buffer.index_copy_(0, block.rows[real], rows[real])


def _blocked(rows: Tensor, group: Group, kv_heads: int) -> Tensor:
    """A view [*shape, X] of a block's rows [c * n, Hq, X]."""
    samples, heads, width = len(group.samples), *rows.shape[1:]
    if samples == 1 and heads == kv_heads:
        return rows.transpose(0, 1)
    return rows.view(samples, -1, kv_heads, heads // kv_heads, width).permute(2, 0, 3, 1, 4)


def _heads_first(packed: Tensor, index: slice | Tensor, samples: int) -> Tensor:
    """[total, H, X] to [H, c, n, X]."""
    if isinstance(index, slice):
        return _taken(packed, index).view(samples, -1, *packed.shape[1:]).permute(2, 0, 1, 3)
    heads, width = packed.shape[1:]
    slots = index * heads + torch.arange(heads, device=index.device)[:, None]  # [H, c * n]
    return packed.reshape(-1, width).index_select(0, slots.flatten()).view(heads, samples, -1, width)


def _taken(packed: Tensor, rows: slice | Tensor) -> Tensor:
    is_all = isinstance(rows, slice) and rows.stop - rows.start == packed.shape[0]
    return packed if is_all else packed[rows]
