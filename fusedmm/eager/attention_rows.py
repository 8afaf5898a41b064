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


def key_sums(buffer: Tensor, group: Group) -> Tensor:
    """Where to sum [Hkv * c, k, D], unwritten: in a [total_k, Hkv, D] buffer itself where a view of it will do."""
    if group.is_view:
        return buffer[group.keys].transpose(0, 1)
    return buffer.new_empty((buffer.shape[1] * len(group.samples), group.size_k, buffer.shape[2]))


def write_keys(buffer: Tensor, group: Group, sums: Tensor) -> None:
    """Write `key_sums` to the group's rows of the buffer, unless they are a view of it."""
    if group.is_view:
        return
    rows = sums.view(buffer.shape[1], len(group.samples), -1, buffer.shape[2]).permute(1, 2, 0, 3)
    if isinstance(group.keys, slice):
        buffer[group.keys].view(rows.shape).copy_(rows)
    elif group.padding is None:
        buffer.index_copy_(0, group.keys, rows.flatten(0, 1))
    else:
        real = ~group.padding
        buffer.index_copy_(0, group.key_index[real], rows[real])


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
