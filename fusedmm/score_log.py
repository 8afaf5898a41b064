"""What training says of every example: streaming statistics of its margin over epochs, in bounded memory."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedmm.shapes import FLOATS, check_device, check_dtype, check_shapes


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
