"""What a loss is made of, apart from tensors: what both losses and scores read."""

from typing import NamedTuple

from torch import Tensor

from fusedmm.eager.shard import Shard
from fusedmm.eager.waves import counted_rows


class Objective(NamedTuple):
    """What a loss is made of, apart from tensors.

    Attributes:
        shard: this rank's classes.
        beta, alpha, label_smoothing, ignore_index: as in `fusedmm.distillation_loss`.
        temperature: of every row, where no [N] tensor is given.
        all_count: whether it is known that no row is ignored.
    """

    shard: Shard
    beta: float = 0.0
    alpha: float = 1.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    all_count: bool = False

    def counted_rows(self, labels: Tensor | None) -> Tensor | None:
        """Numbers of the rows that are not ignored, or None for all of them; looks only where it is not known."""
        return None if self.all_count else counted_rows(labels, self.ignore_index)
