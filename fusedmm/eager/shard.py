"""A rank's part of the classes, and the row statistics that ranks must agree on."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Classes ``first : first + count`` of `total`, on one rank of `group`; without a group it is all of them and every
    reduction is the identity.
    """

    total: int
    first: int = 0
    count: int = 0
    group: dist.ProcessGroup | None = None

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """Maximum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def log_softmax(self, z: Tensor) -> Tensor:
        """Log-probabilities of this rank's classes [rows, count] among all."""
        if self.group is None:
            return torch.log_softmax(z, -1)
        z = z - self.max(z.amax(-1, keepdim=True))
        return z.sub_(self.sum(z.exp().sum(-1, keepdim=True)).log_())

    def local_labels(self, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Labels as indices into this rank's classes (0 where another rank has them) and whether this rank has them."""
        local = labels - self.first
        mine = valid & (local >= 0) & (local < self.count)
        return torch.where(mine, local, 0), mine

    def argmax(self, z: Tensor) -> Tensor:
        """Class with the largest value of each row [rows], the first of equals."""
        if self.group is None:
            return z.argmax(-1)
        value, index = z.max(-1)
        best = self.max(value.clone())
        candidate = torch.where(value == best, index + self.first, self.total)
        dist.all_reduce(candidate, dist.ReduceOp.MIN, group=self.group)
        return candidate
