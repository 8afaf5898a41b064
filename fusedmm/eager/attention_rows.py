"""Between packed tensors and the eager attention's blocks: heads first, samples of a group side by side.

A group's keys are [Hkv * c, k, D] for c samples, a block's rows [Hkv * c, G * n, X] for n queries of each sample and G
query heads a key head. Where a group is one sample whose keys lie together, they are views; others are copies.
"""

import torch
from torch import Tensor

from fusedmm.eager.attention_groups import Block, Group


def read_keys(packed: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """[Hkv * c, k, D] of [total_k, Hkv, D], 0 for padding."""
    if group.is_view:
        return packed[group.keys].transpose(0, 1).to(dtype)
    padded = _heads_first(packed, group.keys, len(group.samples)).to(dtype)  # [Hkv, c, k, D]
    if group.padding is not None:
        padded.flatten(1, 2).index_fill_(1, group.padding.flatten().nonzero().squeeze(1), 0.0)
    return padded.flatten(0, 1)


def add_keys(buffer: Tensor, group: Group, rows: Tensor, add: bool) -> None:
    """Write or add [Hkv * c, k, D] to the group's rows of a [total_k, Hkv, D] buffer."""
    rows = rows.unflatten(0, (buffer.shape[1], -1)).permute(1, 2, 0, 3)  # [c, k, Hkv, D]
    if isinstance(group.keys, slice):
        target = buffer[group.keys].view(rows.shape)
        target.add_(rows) if add else target.copy_(rows)
        return
    index, rows = group.keys, rows.flatten(0, 1)
    if group.padding is not None:
        real = ~group.padding.flatten()
        index, rows = index[real], rows[real]
    buffer.index_add_(0, index, rows) if add else buffer.index_copy_(0, index, rows)


def add_key_product(buffer: Tensor, group: Group, left: Tensor, right: Tensor, add: bool, scale: float = 1.0) -> None:
    """The same with ``scale * left @ right``, in the buffer itself where a view of it will do."""
    if group.is_view:
        buffer[group.keys].transpose(0, 1).baddbmm_(left, right, beta=int(add), alpha=scale)
    else:
        add_keys(buffer, group, product(left, right, scale), add)


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale * left @ right`` of batches of matrices."""
    result = left.new_empty((left.shape[0], left.shape[1], right.shape[2]))
    return result.baddbmm_(left, right, beta=0, alpha=scale)


def read_rows(packed: Tensor, group: Group, block: Block, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """The block's rows of [total_q, Hq, X]: [Hkv * c, G * n, X], 0 for padding."""
    if len(group.samples) == 1 and packed.shape[1] == kv_heads:
        return packed[block.rows].transpose(0, 1).to(dtype)
    rows = _heads_first(packed, block.rows, len(group.samples)).to(dtype)  # [Hq, c, n, X]
    if block.padding is not None:
        rows = rows.masked_fill(block.padding[..., None], 0)
    if rows.shape[0] != kv_heads:
        rows = rows.unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    return rows.flatten(0, 1)


def write_rows(buffer: Tensor, group: Group, block: Block, kv_heads: int, result: Tensor) -> None:
    """Write [Hkv * c, G * n, X] to the block's rows of a [total_q, Hq, X] buffer."""
    if len(group.samples) == 1 and buffer.shape[1] == kv_heads:
        buffer[block.rows].transpose(0, 1).copy_(result)
        return
    rows = result.view(kv_heads, len(group.samples), -1, block.size, result.shape[-1]).permute(1, 3, 0, 2, 4)
    if isinstance(block.rows, slice):
        buffer[block.rows].view(rows.shape).copy_(rows)
        return
    rows = rows.reshape(-1, *buffer.shape[1:])
    if block.padding is None:
        buffer.index_copy_(0, block.rows, rows)
    else:
        real = ~block.padding.flatten()
        buffer.index_copy_(0, block.rows[real], rows[real])


def _heads_first(packed: Tensor, index: slice | Tensor, samples: int) -> Tensor:
    """[total, H, X] to [H, c, n, X]."""
    if isinstance(index, slice):
        return packed[index].view(samples, -1, *packed.shape[1:]).permute(2, 0, 1, 3)
    heads, width = packed.shape[1:]
    slots = index * heads + torch.arange(heads, device=index.device)[:, None]  # [H, c * n]
    return packed.reshape(-1, width).index_select(0, slots.flatten()).view(heads, samples, -1, width)
