"""Tile sizes of the distillation kernels: pure functions of sizes and architecture.

With a weight, two float32 accumulators of [128, 128] take 128 registers of a thread at 8 warps, which leaves room for
the statistics of a row. Without one, a tile is a stretch of rows of 8192 elements that need no matmul. Splits of the
vocabulary give every multiprocessor a program when rows are few.
"""

import triton

from fusedmm.kernels.launch import LaunchConfig

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
ROW_TILE = 4096
MIN_SPLIT = 64  # classes: a state of 22 numbers stays small beside them


def tile_config(
    arch: str, num_classes: int, has_matmul: bool, is_float32: bool, *, is_narrow: bool = False
) -> LaunchConfig:
    """Tiles of the statistics, mixture and gradient kernels; narrow where they keep so many numbers a row that wider
    tiles spill.
    """
    if not has_matmul:
        block_v = min(1024, max(16, triton.next_power_of_2(num_classes)))
        return LaunchConfig(
            {
                "BLOCK_N": (ROW_TILE // 2 if is_narrow else ROW_TILE) // block_v,
                "BLOCK_V": block_v,
                "BLOCK_D": 16,
                "SLABS": 1,
            },
            num_warps=8,
            num_stages=2,
        )
    if is_float32:
        return LaunchConfig(
            {"BLOCK_N": 32, "BLOCK_V": 16 if is_narrow else 32, "BLOCK_D": 32, "SLABS": 1}, num_warps=4, num_stages=2
        )
    if arch == "sm_80":
        block_v = 32 if is_narrow else 64
        return LaunchConfig({"BLOCK_N": 64, "BLOCK_V": block_v, "BLOCK_D": 64, "SLABS": 2}, num_warps=4, num_stages=3)
    if arch == "gfx942":
        return LaunchConfig({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 64, "SLABS": 2}, num_warps=4, num_stages=2)
    return LaunchConfig(
        {"BLOCK_N": 128, "BLOCK_V": 64 if is_narrow else 128, "BLOCK_D": 64, "SLABS": 4 if is_narrow else 8},
        num_warps=8,
        num_stages=4 if is_narrow else 3,
    )


def vocabulary_splits(arch: str, num_rows: int, num_classes: int, config: LaunchConfig) -> int:
    """Programs that share a block of rows: enough to occupy the device twice over where rows are few, never more than
    there are tiles of classes.
    """
    row_blocks = triton.cdiv(max(num_rows, 1), config.blocks["BLOCK_N"])
    tiles = triton.cdiv(num_classes, config.blocks["BLOCK_V"])
    return max(1, min(int(tiles), num_classes // MIN_SPLIT, 2 * MULTIPROCESSORS[arch] // int(row_blocks)))
