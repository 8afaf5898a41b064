"""Choosing rows by score, exactly over all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from fusedmm.shapes import FLOATS, as_number, check_dtype, check_shapes

BIN_BITS = 8


def select_rows(score: Tensor, keep: float, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mark the rows with the largest scores: ``int(keep * rows + 0.5)`` of all rows on all ranks, exactly.

    A radix select: a histogram of one byte of the scores at a time, summed over ranks, finds the threshold exactly. Of
    rows that equal it those of lower ranks, then of lower indices, are taken.

    Args:
        score: [N] floating point; N may differ by rank. A NaN is below everything,
            and kept only where other rows are fewer than the rows to keep.
        keep: fraction of all rows, 0 to 1.
        group: process group whose ranks choose together; every rank must call. None: this rank on its own.

    Returns:
        [N] bool, True where the row is kept.

    Raises:
        ShapeError, TypeError, ValueError: score is not [N] floating point, keep is not a fraction.

    Cost: 4 sweeps over the scores (8 for float64), and with a group as many sums of 256 numbers; no host waits for the
    device.
    """
    op = "select_rows"
    if score is None:
        raise TypeError(f"{op}: score must be a tensor, got None. A score that needs labels is None without them.")
    check_shapes(op, {"score": (score, ("row",))})
    check_dtype(op, "score", score, FLOATS, ". Use score.float().")
    if not 0.0 <= as_number(op, "keep", keep) <= 1.0:
        raise ValueError(
            f"{op}: keep must be a fraction between 0 and 1, got {keep}. Divide a number of rows by their total."
        )
    with torch.no_grad():
        key, bits = _ordered_key(score)
        total = _all_sum(torch.full((1,), score.shape[0], dtype=torch.int64, device=score.device), group)
        remaining = (total.double() * keep + 0.5).long()
        undecided = torch.ones_like(key, dtype=torch.bool)
        selected = torch.zeros_like(undecided)
        for shift in range(bits - BIN_BITS, -1, -BIN_BITS):
            digit = (key >> shift) & ((1 << BIN_BITS) - 1)
            counts = _all_sum(
                torch.zeros(1 << BIN_BITS, dtype=torch.int64, device=key.device).scatter_add_(
                    0, digit, undecided.long()
                ),
                group,
            )
            above = counts.flip(0).cumsum(0).flip(0) - counts  # rows in larger bins
            # the largest bin at whose end the quota is used up; with nothing left to take, beyond the last
            threshold = torch.where(
                above + counts >= remaining, torch.arange(1 << BIN_BITS, device=key.device), -1
            ).amax()
            threshold = torch.where(remaining > 0, threshold, 1 << BIN_BITS)
            selected |= undecided & (digit > threshold)
            undecided &= digit == threshold
            remaining = remaining - torch.where(
                remaining > 0, above.gather(0, threshold.clamp(0, (1 << BIN_BITS) - 1).reshape(1)), 0
            )
        earlier = _count_before(undecided.sum().reshape(1), group)
        return selected | (undecided & (undecided.cumsum(0) + earlier <= remaining))


def _ordered_key(score: Tensor) -> tuple[Tensor, int]:
    """int64 keys in the order of the scores, as unsigned numbers of so many bits."""
    score = score.detach() + 0.0  # -0.0 becomes 0.0
    lowest = score.isnan()  # -inf has a key above 0
    if score.dtype == torch.float64:
        raw = score.view(torch.int64)
        return (raw ^ ((raw >> 63) & 0x7FFFFFFFFFFFFFFF) ^ (-(2**63))).masked_fill_(lowest, 0), 64
    raw = score.float().view(torch.int32).long()
    return ((raw ^ ((raw >> 31) & 0x7FFFFFFF)) + 2**31).masked_fill_(lowest, 0), 32


def _all_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def _count_before(count: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of `count` [1] over the ranks before this one."""
    if group is None:
        return torch.zeros_like(count)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    return torch.cat([torch.zeros_like(count), *counts[: group.rank()]]).sum().reshape(1)
