"""A rank's part of the classes: statistics of rows over those of all ranks, and values at classes by number."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

AFTER_SHIFT = 1e30  # any difference of two logits times this is beyond any class number


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

    def sums(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """`sum` of each, in one exchange."""
        if self.group is None:
            return parts
        flat = self.sum(torch.cat([part.flatten() for part in parts.values()]))
        sizes = [part.numel() for part in parts.values()]
        shares = zip(parts.items(), flat.split(sizes), strict=True)
        return {name: share.view(part.shape) for (name, part), share in shares}

    def gather(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each part of every rank [ranks, ...], in one exchange; the parts have the same shapes on all."""
        if self.group is None:
            return tuple(part[None] for part in parts)
        flat = torch.cat([part.flatten() for part in parts])
        every = flat.new_empty((self.group.size(), flat.numel()))
        dist.all_gather(list(every.unbind()), flat, group=self.group)
        shares = zip(every.split([part.numel() for part in parts], -1), parts, strict=True)
        return tuple(share.contiguous().view(len(every), *part.shape) for share, part in shares)

    def whole(self, own: Tensor) -> Tensor:
        """The classes of all ranks [total, ...] from this rank's own [count, ...], padding cut; differentiable where
        every rank forms the same loss of it, so that each has the whole gradient of its own.
        """
        return _Whole.apply(own, self)  # type: ignore[no-any-return, no-untyped-call]

    def row_sum(self, x: Tensor) -> Tensor:
        """Sum over the classes of all ranks [rows, 1]."""
        return self.sum(x.sum(-1, keepdim=True))

    def shift(self, z: Tensor) -> Tensor:
        """Subtract the largest of each row, in place: that class has exactly 0."""
        return z.sub_(self.max(z.amax(-1, keepdim=True)))

    def powers(self, z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """``2 ** z`` in `out` (which may be z), and its sum over the classes of all ranks [rows, 1]: the softmax of
        logits / ln 2 is their quotient. Base 2, as exp2 takes a quarter of the time of exp.
        """
        torch.exp2(z, out=out)
        return out, self.row_sum(out)

    def first_top(self, shifted: Tensor, out: Tensor) -> Tensor:
        """[..., rows] minus the number of the first class with 0 in what `shift` returned, as a float; `out` is
        overwritten.

        Two passes that vectorise, which argmax does not: after the factor only the zeros compare by their number.
        """
        last = -self.first - self.count
        numbers = torch.arange(-self.first, last, -1, dtype=shifted.dtype, device=shifted.device)
        return self.max(torch.add(numbers, shifted, alpha=AFTER_SHIFT, out=out).amax(-1))

    def local(self, classes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Class numbers [rows, k] as indices into this rank's classes, and whether this rank has them (None: it has
        all); 0 where another rank has them.
        """
        if self.group is None:
            return classes, None
        local = classes - self.first
        mine = (local >= 0) & (local < self.count)
        return torch.where(mine, local, 0), mine

    def at(self, x: Tensor, index: Tensor, mine: Tensor | None) -> Tensor:
        """Values [..., rows, k] of `x` [..., rows, count] at what `local` returned, on every rank."""
        value = x.gather(-1, index.expand(*x.shape[:-1], -1))
        return value if mine is None else self.sum(value.masked_fill_(~mine, 0.0))


class _Whole(torch.autograd.Function):
    """`Shard.whole`: a sum over ranks that hold zeros for one another; backward takes back this rank's part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shard: Shard) -> Tensor:
        ctx.shape, ctx.count, ctx.mine = own.shape, shard.count, slice(shard.first, shard.first + shard.count)
        whole = own.new_zeros((shard.total, *own.shape[1:]))
        whole[ctx.mine] = own[: shard.count]
        return shard.sum(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_zeros(ctx.shape)
        own[: ctx.count] = grad[ctx.mine]
        return own, None


def put(x: Tensor, index: Tensor, mine: Tensor | None, value: float | Tensor) -> Tensor:
    """Write `value`, a number or [rows, k], to `x` [rows, count] at what `Shard.local` returned, in place."""
    if mine is None:
        return x.scatter_(1, index, value)
    rows, slots = mine.nonzero(as_tuple=True)
    x[rows, index[rows, slots]] = value[rows, slots] if isinstance(value, Tensor) else value
    return x
