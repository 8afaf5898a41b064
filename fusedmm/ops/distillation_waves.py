"""How the Triton path of distillation cuts rows into waves and classes into ranges: pure functions of sizes, so that
every rank of a sharded head cuts alike.
"""

from collections.abc import Iterator

from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import WHOLE_ELEMENTS

FAST_ELEMENTS = 100 << 20  # logits of a wave of rows: 1 GiB at 10 bytes each
RANGE_ELEMENTS = 8 << 20  # logits of a range of classes: 16 MiB at 2 bytes each
RANGE_INPUT_BYTES = 24 << 20  # hidden's gradient of a wave in float32, before it is rounded
RANGE_ROWS = 16384
ROUNDED_SUMS = 12  # waves after each of which a half-precision weight gradient may be rounded; beyond, float32


def fast_rows(num_rows: int, num_classes: int) -> int:
    """Rows of a wave of the fast path."""
    return min(max(num_rows, 1), max(128, FAST_ELEMENTS // num_classes // 128 * 128))


def lean_sizes(num_rows: int, num_classes: int, dim: int) -> tuple[int, int]:
    """Rows and classes of a range of the lean backward.

    Rows as many as fit `RANGE_INPUT_BYTES`, or as leave the weight's gradient no more than `ROUNDED_SUMS` parts; never
    all logits at once beyond `WHOLE_ELEMENTS`.
    """
    fitting = max(128, RANGE_INPUT_BYTES // (4 * dim) // 128 * 128)
    rows = max(1, min(num_rows, RANGE_ROWS, max(fitting, -(-num_rows // ROUNDED_SUMS))))
    columns = min(num_classes, max(128, RANGE_ELEMENTS // rows // 128 * 128))
    if columns == num_classes and rows == num_rows and num_rows * num_classes > WHOLE_ELEMENTS:
        rows = (num_rows + 1) // 2
    return rows, columns


def classes_a_rank(shard: Shard) -> int:
    """Classes by which all ranks of a sharded head choose the same waves, however unequal their shards."""
    return -(-shard.total // (1 if shard.group is None else shard.group.size()))


def slices(size: int, step: int) -> Iterator[slice]:
    """`size` in parts of `step`."""
    return (slice(first, min(first + step, size)) for first in range(0, size, step))
