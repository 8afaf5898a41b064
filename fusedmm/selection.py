"""Choosing rows by score, exactly over all ranks, and keeping score logs over epochs in bounded memory."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedmm.shapes import FLOATS, check_device, check_dtype, check_shapes

BIN_BITS = 8


def select_rows(score: Tensor, keep: float, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mark the rows with the largest scores: ``int(keep * rows + 0.5)`` of all rows on all ranks, exactly.

    A radix select: a histogram of one byte of the scores at a time, summed over ranks, finds the threshold exactly. Of
    rows that equal it those of lower ranks, then of lower indices, are taken.

    Args:
        score: [N] floating point; N may differ by rank. A NaN is below everything.
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
    if not 0.0 <= keep <= 1.0:
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


class ScoreStatistics(NamedTuple):
    """What a `ScoreLog` knows of every example, [examples].

    Attributes:
        aum: float32, area under the margin: mean margin over the times that the example was seen; 0 where never (Pleiss
            et al. 2020).
        forgetting: int32, how often it was correct and then wrong (Toneva et al. 2019).
        learned: bool, whether it was ever correct. Forgetting is meaningless where it never was.
        seen: int32, how often it was seen.
    """

    aum: Tensor
    forgetting: Tensor
    learned: Tensor
    seen: Tensor


class ScoreLog:
    """Streaming statistics of every example of a dataset over epochs: 14 bytes an example, however many epochs; 28 once
    it is shared over ranks.

    Args:
        num_examples: size of the dataset.
        device: where the statistics live.
    """

    def __init__(self, num_examples: int, device: torch.device | str = "cpu") -> None:
        if num_examples < 1:
            raise ValueError(f"ScoreLog: num_examples must be positive, got {num_examples}.")
        self._margin = torch.zeros(num_examples, dtype=torch.float32, device=device)
        self._seen = torch.zeros(num_examples, dtype=torch.int32, device=device)
        self._forgetting = torch.zeros(num_examples, dtype=torch.int32, device=device)
        self._learned = torch.zeros(num_examples, dtype=torch.bool, device=device)
        self._correct = torch.zeros(num_examples, dtype=torch.bool, device=device)
        self._shared: tuple[Tensor, ...] | None = None

    def update(self, index: Tensor, margin: Tensor, valid: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            index: [N] int64, the examples, all different.
            margin: [N] floating point, for example `DistillationScores.margin`; an example is correct where it is
                positive.
            valid: [N] bool, which rows count (not those of ignore_index), or None for all.

        Raises:
            ShapeError, TypeError, ValueError: sizes, dtypes or devices that do not fit.
        """
        check_shapes(
            "ScoreLog.update", {"index": (index, ("row",)), "margin": (margin, ("row",)), "valid": (valid, ("row",))}
        )
        check_dtype("ScoreLog.update", "index", index, (torch.int64,), ". Use index.to(torch.int64).")
        check_dtype("ScoreLog.update", "margin", margin, FLOATS, ".")
        check_device("ScoreLog.update", {"the log": self._margin, "index": index, "margin": margin, "valid": valid})
        counts = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        margin = torch.where(counts, margin.detach().float(), 0.0)
        correct, before = margin > 0, self._correct[index]
        self._margin[index] += margin
        self._seen[index] += counts.int()
        self._forgetting[index] += (counts & before & ~correct).int()
        self._learned[index] |= counts & correct
        self._correct[index] = torch.where(counts, correct, before)

    def statistics(self) -> ScoreStatistics:
        """What is known by now; copies."""
        return ScoreStatistics(
            self._margin / self._seen.clamp_min(1), self._forgetting.clone(), self._learned.clone(), self._seen.clone()
        )

    def share(self, group: dist.ProcessGroup) -> None:
        """Add what every rank saw since the last call, so that all ranks know the same; once an epoch, before examples
        move to other ranks.

        An example is to be seen by one rank between two calls: events between two ranks are not in order.
        """
        fields = (self._margin, self._seen, self._forgetting)
        base = self._shared or tuple(torch.zeros_like(t) for t in (*fields, self._correct))
        changed = self._seen != base[1]
        correct = torch.where(changed, 1 + self._correct.int(), 0)
        dist.all_reduce(correct, dist.ReduceOp.MAX, group=group)
        self._correct.copy_(torch.where(correct > 0, correct == 2, base[3]))
        for field, before in zip(fields, base, strict=False):
            gain = field - before
            dist.all_reduce(gain, group=group)
            field.copy_(before + gain)
        learned = self._learned.int()
        dist.all_reduce(learned, dist.ReduceOp.MAX, group=group)
        self._learned.copy_(learned > 0)
        self._shared = tuple(t.clone() for t in (*fields, self._correct))

    def state_dict(self) -> dict[str, Any]:
        """Tensors for a checkpoint; share first under data parallelism."""
        return {
            "margin": self._margin,
            "seen": self._seen,
            "forgetting": self._forgetting,
            "learned": self._learned,
            "correct": self._correct,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`, as known to all ranks."""
        for name, tensor in self.state_dict().items():
            check_shapes("ScoreLog.load_state_dict", {name: (state[name], (tensor.shape[0],))})
            tensor.copy_(state[name])
        self._shared = (
            None
            if not bool(self._seen.any())
            else tuple(t.clone() for t in (self._margin, self._seen, self._forgetting, self._correct))
        )
