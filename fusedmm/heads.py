"""What distillation reads: a linear head with its input, logits that exist already, or a teacher's top-k
log-probabilities.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class LinearHead:
    """The logits ``softcap * tanh((hidden @ weight.T + bias) / softcap)``, which are never formed as a whole.

    Attributes:
        hidden: [N, Dh] float16, bfloat16, float32 or float64.
        weight: [V, Dh] of hidden's dtype; a DTensor is gathered (FSDP2), or with `group` taken as this rank's shard of
            the vocabulary.
        bias: [V] of the same dtype, or None; -inf forbids a class, as in `Logits`.
        num_classes: how many leading classes are real, over all ranks; the rest pads the vocabulary and is never read.
            None: all.
        softcap: positive bound on the size of a logit (Gemma 2), or None.
        group: process group over which the vocabulary is split: weight and bias are this rank's shard of equal shards
            in rank order, hidden is the same on every rank.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    num_classes: int | None = None
    softcap: float | None = None
    group: ProcessGroup | None = None

    @property
    def source(self) -> Tensor:
        """What has the rows, the dtype and the device."""
        return self.hidden


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits that exist already, for example of a small classifier or of a teacher that ran elsewhere.

    Attributes:
        values: [N, V] float16, bfloat16, float32 or float64; -inf forbids a class. It counts as -1e30: a divergence
            that would be infinite is 1e30 / temperature times the mass that one head gives to what the other forbids.
            So is its gradient, which float16 does not hold: inf under beta=1, where a teacher forbids a class.
        num_classes: how many leading classes are real, over all ranks. None: all.
        softcap: positive bound on the size of a logit, or None.
        group: process group over which the vocabulary is split, as in `LinearHead`.
    """

    values: Tensor
    num_classes: int | None = None
    softcap: float | None = None
    group: ProcessGroup | None = None

    @property
    def source(self) -> Tensor:
        """What has the rows, the dtype and the device."""
        return self.values


@dataclass(frozen=True, eq=False)
class TopKLogProbs:
    """The K most likely classes of a teacher; what is left of the mass is one bucket, compared with all that the
    student gives to the other classes.

    Attributes:
        indices: [N, K] int64, different classes within a row; for a student with `group` numbers over all ranks, the
            same on every rank.
        log_probs: [N, K] floating point, natural logarithms **at the temperature of the call**; -inf for a slot that is
            not used.
    """

    indices: Tensor
    log_probs: Tensor


Head = LinearHead | Logits
Teacher = LinearHead | Logits | TopKLogProbs
