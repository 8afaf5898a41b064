"""Joint attention of a few samples of one shape that are a single block, in as few operators as there can be.

A call for 4 samples of 16 queries and 64 keys takes a quarter less than by the operators that `fusedmm.eager.attention`
needs to fit every problem, with all gradients a third less (one thread of an AMD EPYC, called again and again; `python
-m benchmarks attention/tiny` times it, after other work too). The formulas are the same. Of a problem within `KEPT` the
backward is handed what the forward has made: a quarter of its time would go into making it again.

What exponentials without a peak taken off do not hold, and every other problem, is left to `fusedmm.eager.attention`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedmm.eager.attention_groups import Group
from fusedmm.eager.attention_inputs import LEAST, Inputs, row_exponent
from fusedmm.eager.attention_rows import product
from fusedmm.eager.products import LOG2_E

KEPT = 1 << 20  # bytes of all that is kept


class Kept(NamedTuple):
    """What both directions compute with, heads first."""

    query: Tensor  # [H * c, n, D]
    key: Tensor  # [H * c, k, D]
    value: Tensor  # [H * c, k, D]
    probabilities: Tensor  # [H, c, n, M, w]
    weights: Tensor  # [H * c, n, k] the same times the gate, where there is one
    gate: Tensor | None  # [H, c, n, M]


def fits(x: Inputs, groups: tuple[Group, ...]) -> bool:
    """Whether the problem is one block of whole samples, with nothing hidden, dropped or converted."""
    return (
        len(groups) == 1
        and x.softmax == "joint"
        and x.visible is None
        and x.active is None
        and x.seed is None
        and x.query.dtype == x.compute_dtype
        and x.query.shape[1] == x.key.shape[1]
        and groups[0].is_one_shape
        and groups[0].count_q == x.query.shape[0]
        and groups[0].count_k == x.key.shape[0]
    )


def forward(x: Inputs, group: Group, *, keep: bool = False) -> tuple[tuple[Tensor, Tensor, Tensor], Kept | None] | None:
    """Output [total_q, H, D], mass and lse [total_q, H, M], and to ``keep`` `Kept` where it is small; None: scores
    are too far apart.
    """
    samples = len(group.samples)
    query, key, value = (_matrices(t, samples) for t in (x.query, x.key, x.value))
    start = None if x.log_prior is None else _heads_first(x.log_prior, samples)
    probabilities = _exponentials(x, samples, query, key, start, LOG2_E)
    sums = probabilities.sum(-1)
    if not _is_held(sums):
        return None
    total = sums.sum(-1, keepdim=True)
    keep = keep and query.nbytes + key.nbytes + value.nbytes + 2 * probabilities.nbytes + sums.nbytes <= KEPT
    gate = None if x.gate is None else _heads_first(x.gate, samples)
    weights = probabilities.div_(total[..., None])
    if gate is not None:
        weights = probabilities * gate[..., None] if keep else probabilities.mul_(gate[..., None])
    weights = _joined(weights)
    output = torch.bmm(weights, value).view(*sums.shape[:3], -1)
    sums = _written(sums)
    results = _written(output), sums / _packed(total), sums.log()
    return results, Kept(query, key, value, probabilities, weights, gate) if keep else None


def backward(
    kept: Kept, scale: float, grad_output: Tensor, grad_mass: Tensor | None, mass: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_prior and gate, from those of the output and of mass: views of what lies
    heads first.
    """
    heads, samples = kept.probabilities.shape[:2]
    gradient, share = _matrices(grad_output, samples), _heads_first_view(mass, samples)
    joined = torch.bmm(gradient, kept.value.mT)
    products = joined.view(kept.probabilities.shape).mul_(kept.probabilities)
    grad_gate = products.sum(-1)
    gated = grad_gate if kept.gate is None else grad_gate * kept.gate
    offset = gated.sum(-1, keepdim=True)
    if grad_mass is None:
        offset.neg_()
    else:  # its own difference first: it is 0 where one modality has all the mass
        given = _heads_first(grad_mass, samples)
        mean = (given * share).sum(-1, keepdim=True)
        offset = given.sub(mean).sub_(offset)
    if kept.gate is not None:
        products.mul_(kept.gate[..., None])
    products.addcmul_(kept.probabilities, offset[..., None])
    shape = heads, samples, -1, kept.query.shape[-1]
    return (
        _packed(product(joined, kept.key, scale).view(shape)),
        _packed(product(joined.mT, kept.query, scale).view(shape)),
        _packed(torch.bmm(kept.weights.mT, gradient).view(shape)),
        _packed(torch.addcmul(gated, offset, share)),
        _packed(grad_gate),
    )


def made_again(x: Inputs, group: Group, mass: Tensor, lse: Tensor) -> Kept:
    """Of what both directions compute with, what the forward has not kept."""
    samples = len(group.samples)
    query, key, value = (_matrices(t, samples) for t in (x.query, x.key, x.value))
    start = _heads_first(row_exponent(mass, lse, x.log_prior), samples)
    probabilities = _exponentials(x, samples, query, key, start)
    # a rounded lse leaves P no sum of 1, and what it lacks would not cancel in the gradient
    sums = probabilities.sum(-1).clamp_min_(torch.finfo(mass.dtype).tiny)
    probabilities.div_(sums.div_(_heads_first(mass, samples))[..., None])  # a single probability is 1
    gate = None if x.gate is None else _heads_first(x.gate, samples)
    weights = probabilities if gate is None else probabilities * gate[..., None]
    return Kept(query, key, value, probabilities, _joined(weights), gate)


def _is_held(sums: Tensor) -> bool:
    """Whether all sums of exponentials are between `LEAST` and its inverse; NaN and 0 are not."""
    low, high = sums.aminmax()
    return bool(low.item() >= LEAST and high.item() <= 1 / LEAST)


def _exponentials(
    x: Inputs, samples: int, query: Tensor, key: Tensor, start: Tensor | None, unit: float = 1.0
) -> Tensor:
    """exp2 [H, c, n, M, w] of scores, to which ``unit`` times ``start`` [H, c, n, M] is added."""
    joined = query.new_empty((query.shape[0], query.shape[1], key.shape[1]))
    scores = joined.view(-1, samples, query.shape[1], x.num_modalities, key.shape[1] // x.num_modalities)
    if start is not None:
        scores.copy_(start[..., None])
    joined.baddbmm_(query, key.mT, beta=0.0 if start is None else unit, alpha=x.scale * LOG2_E).exp2_()
    return scores


def _joined(by_modality: Tensor) -> Tensor:
    """A view [H * c, n, k] of a contiguous [H, c, n, M, w]."""
    heads, samples, rows = by_modality.shape[:3]
    return by_modality.view(heads * samples, rows, -1)


def _heads_first_view(packed: Tensor, samples: int) -> Tensor:
    """A view [H, c, n, X] of [c * n, H, X]."""
    return packed.view(samples, -1, *packed.shape[1:]).permute(2, 0, 1, 3)


def _matrices(packed: Tensor, samples: int) -> Tensor:
    """[H * c, n, X] of [c * n, H, X]."""
    return _heads_first_view(packed, samples).flatten(0, 1)


def _heads_first(packed: Tensor, samples: int) -> Tensor:
    """[c * n, H, M] as a contiguous [H, c, n, M]: what is as large as the scores meets a view in six times the time."""
    return _heads_first_view(packed, samples).contiguous()


def _packed(heads_first: Tensor) -> Tensor:
    """A view [c * n, H, X] of a contiguous [H, c, n, X]."""
    return heads_first.permute(1, 2, 0, 3).flatten(0, 1)


def _written(heads_first: Tensor) -> Tensor:
    """[c * n, H, X] of a contiguous [H, c, n, X]; of one head too no view, which nobody may change in place."""
    return _packed(heads_first).clone(memory_format=torch.contiguous_format)
