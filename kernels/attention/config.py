"""Tile sizes of the attention kernels, from head size, dtype and architecture: pure functions over one table.

Every entry compiles without register spills in its main loop on its architecture (tests/test_attention_kernels.py and ``python -m benchmarks static`` check it).
"""

import torch

from fusedmm.kernels.launch import LaunchConfig

# (pass, bytes of an element) -> {arch: {BLOCK_D: (BLOCK_Q, BLOCK_K, num_warps, num_stages)}}; see `_rows_for` for which BLOCK_D an architecture lists.
_TABLE = {
    ("forward", 2): {
        "sm_80": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
        "sm_90": {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (128, 64, 8, 2)},
        "sm_100": {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (128, 64, 8, 2)},
        "gfx942": {64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 256: (64, 32, 4, 1)},
    },
    ("key_value", 2): {
        "sm_80": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1)},
        "sm_90": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 64, 8, 1)},
        "sm_100": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 64, 8, 1)},
        "gfx942": {64: (64, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 32, 4, 1)},
    },
    ("query", 2): {
        "sm_80": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        "sm_90": {64: (128, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "sm_100": {64: (128, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "gfx942": {64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
    },
    ("forward", 4): {
        arch: {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)}
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
    },
    ("key_value", 4): {
        arch: {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
    },
    ("query", 4): {
        arch: {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
    },
}
BLOCK_TAIL = 32  # keys of the tile that finishes a segment: a segment of 5 keys costs 32 columns, not BLOCK_K
BLOCK_ROWS = 32  # rows of a program of the backward's first pass, which only streams


def head_block(head_dim: int) -> int:
    """BLOCK_D: the power of two, at least 16, that holds a head."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _config(which: str, head_dim: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    block_d = head_block(head_dim)
    block_q, block_k, num_warps, num_stages = _TABLE[which, dtype.itemsize][arch][max(64, block_d)]
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": block_d}
    if which == "forward":
        blocks["CARRY_SCORES"] = arch == "sm_90" and block_d == 128
    if which != "key_value":
        blocks["BLOCK_TAIL"] = min(BLOCK_TAIL, block_k)
    return LaunchConfig(blocks=blocks, num_warps=num_warps, num_stages=num_stages)


def _attention_forward_config(head_dim: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """Tiles of the forward."""
    return _config("forward", head_dim, dtype, arch)


def _attention_backward_key_value_config(head_dim: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """Tiles of the backward for keys and values."""
    return _config("key_value", head_dim, dtype, arch)


def _attention_backward_query_config(head_dim: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """Tiles of the backward for queries, gates and priors."""
    return _config("query", head_dim, dtype, arch)


def _attention_backward_rows_config(head_dim: int) -> LaunchConfig:
    """Tiles of the backward's first pass, the same everywhere: it is bound by memory."""
    return LaunchConfig(blocks={"BLOCK_Q": BLOCK_ROWS, "BLOCK_D": head_block(head_dim)}, num_warps=4, num_stages=1)
