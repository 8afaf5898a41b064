"""Tile sizes of the distillation kernels: pure functions of sizes and architecture.

With a weight, two float32 accumulators of [128, 128] take 128 registers of a thread at 8 warps, which leaves room for
the sums of a tile; the states of rows wait in global memory, which L1 caches (11 KB). A tile of 64 classes would ask
L2 for half as much again, and steps of 64 dimensions for twice the barriers. One head alone, a top-k teacher's student,
has the same registers for a tile of 256 classes, which asks L2 for a quarter less. Without a weight, a tile is a
stretch of rows of 4096 elements that need no matmul. Splits of the vocabulary give every multiprocessor a program.
"""

from typing import Literal

import triton

from fusedmm.kernels.launch import LaunchConfig

Pass = Literal["scores", "loss", "mixture", "gradient", "mixture_gradient", "top_sweep", "top_gradient"]

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}
ROW_TILE = 4096
MIN_SPLIT = 64  # classes: a state of 22 numbers stays small beside them
ROW_GROUP = 16  # row blocks that run together: 25 MB of hidden states of 6144 dimensions, half of H200's L2
ANY_GROUP = 1 << 16  # without a weight there is nothing to share; times the tiles of 2^24 classes it fits 32 bits


def has_descriptors(arch: str, *, has_matmul: bool, is_float32: bool, is_aligned: bool) -> bool:
    """Whether matrices are copied to shared memory by tensor descriptors (TMA), which take no registers."""
    return arch in ("sm_90", "sm_100") and has_matmul and is_aligned and not is_float32


def tile_config(
    arch: str,
    columns: int,
    *,
    has_matmul: bool,
    is_float32: bool,
    kind: Pass,
    is_shared: bool = False,
    is_aligned: bool = True,
) -> LaunchConfig:
    """Tiles of one pass over `columns` logits of a row; smaller where larger ones spill."""
    is_narrow = kind in ("scores", "mixture", "mixture_gradient")
    if not has_matmul:
        block_v = min(1024, max(16, triton.next_power_of_2(columns)))
        rows = (ROW_TILE // 2 if is_narrow else ROW_TILE) // block_v
        return _config(rows, block_v, 16, slabs=1, num_warps=8, num_stages=2, group=ANY_GROUP)
    if is_float32:
        return _config(32, 16 if is_narrow else 32, 32, slabs=1, num_warps=4, num_stages=2)
    if has_descriptors(arch, has_matmul=has_matmul, is_float32=is_float32, is_aligned=is_aligned):
        if kind == "top_gradient" or (kind == "top_sweep" and arch == "sm_90"):  # 106 spills in a sweep on sm_100
            return _config(128, 256, 64, slabs=16, num_warps=8, num_stages=4)
        # On sm_100 a thread has whole rows of a slab: of more than 4 classes they spill beside its sums.
        slabs = 32 if arch == "sm_100" and kind in ("scores", "loss") else 8
        return _config(128, 128, 128, slabs=slabs, num_warps=8, num_stages=2 if is_shared else 3)
    if not is_aligned:  # loads of 2 bytes, each with an address of its own
        return _config(32, 64, 32, slabs=8 if kind == "mixture" else 4, num_warps=4, num_stages=2)
    if arch == "gfx942":
        return _config(64, 64, 64, slabs=4, num_warps=4, num_stages=2)
    if kind in ("top_sweep", "top_gradient"):
        return _config(64, 128, 64, slabs=8, num_warps=4, num_stages=3)
    if kind == "scores":  # two rows a thread, not four: 22 numbers of each
        return _config(32, 64, 64, slabs=4, num_warps=4, num_stages=3)
    if kind == "mixture":  # a third stage would spill
        return _config(64, 64, 64, slabs=8, num_warps=4, num_stages=2 if is_shared else 3)
    return _config(64, 64, 64, slabs=4, num_warps=4, num_stages=3)


def _config(
    block_n: int, block_v: int, block_d: int, *, slabs: int, num_warps: int, num_stages: int, group: int = ROW_GROUP
) -> LaunchConfig:
    blocks = {"BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_D": block_d, "SLABS": slabs, "GROUP_N": group}
    return LaunchConfig(blocks, num_warps=num_warps, num_stages=num_stages)


def row_threads(arch: str) -> int:
    """Threads that share a row of 16 columns of an accumulator.

    4 of one warp; on sm_80 and sm_86 4 of each of two warps; on sm_100 one, as tensor memory gives a row to a thread.
    """
    return {"sm_80": 8, "sm_86": 8, "sm_100": 1}.get(arch, 4)


def vocabulary_splits(arch: str, num_rows: int, num_classes: int, config: LaunchConfig) -> int:
    """Programs that share a block of rows: as many as occupy the device together with the row blocks of one group,
    never more than there are tiles of classes.
    """
    row_blocks = min(triton.cdiv(max(num_rows, 1), config.blocks["BLOCK_N"]), config.blocks["GROUP_N"])
    tiles = triton.cdiv(num_classes, config.blocks["BLOCK_V"])
    return max(1, min(int(tiles), num_classes // MIN_SPLIT, MULTIPROCESSORS[arch] // int(row_blocks)))
