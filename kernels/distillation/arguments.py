"""What the distillation launchers are given beside heads: no kernel here, and nothing that waits for the GPU."""

from typing import NamedTuple

from torch import Tensor


class DistillationProblem(NamedTuple):
    """All that a distillation is given beside its heads: the same for every pass over them.

    Attributes:
        labels: [N] int64, or None.
        row_temperature: [N] float32, or None for `temperature`.
        temperature: positive; of every row.
        num_classes, first_class, total_classes: classes of this rank without padding, the number of its first one over
            all ranks, and how many all ranks have.
        beta, alpha, label_smoothing, ignore_index: as in `fusedmm.distillation_loss`.
    """

    labels: Tensor | None
    row_temperature: Tensor | None
    temperature: float
    num_classes: int
    first_class: int
    total_classes: int
    beta: float
    alpha: float
    label_smoothing: float
    ignore_index: int

    @property
    def is_unit(self) -> bool:
        """Whether logits are those at temperature 1."""
        return self.row_temperature is None and self.temperature == 1.0
