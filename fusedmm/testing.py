"""Random packed batches and the error budget: what the tests and the benchmarks' correctness gate share.

Truth is the reference in float64. An implementation may err by twice what plain PyTorch errs in the same dtype (the
reference computed in that dtype), plus one rounding of the truth. Plain PyTorch's error is a matter of luck where few
numbers meet: it is the largest of `PLAIN_DRAWS` computations that differ in the order of the head dimension only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedmm.layout import ModalityLayout
from fusedmm.reference import attention as reference

PACKED = ("query", "key", "value", "output_gate")
PLAIN_DRAWS = 4


@dataclass(frozen=True)
class AttentionExample:
    """Arguments of one call of `fusedmm.gated_multimodal_attention`, and the upstream gradients.

    Attributes:
        tensors: query, key, value and whichever of log_prior [total_q, Hq, M], gate [total_q, Hq, M], output_gate and
            active [B, Hq, M] are in use.
        layout: with times, where they are in use.
        softmax: "joint" or "per_modality".
        grad_output: [total_q, Hq, D] float32.
        grad_mass: [total_q, Hq, M] float32.
    """

    tensors: Mapping[str, Tensor]
    layout: ModalityLayout
    softmax: str
    grad_output: Tensor
    grad_mass: Tensor

    def cast(self, dtype: torch.dtype) -> "AttentionExample":
        """The same with query, key, value and output_gate in another dtype; priors and gates stay float32 or follow
        to float64."""
        rows = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {
            name: x if name == "active" else x.to(dtype if name in PACKED else rows) for name, x in self.tensors.items()
        }
        return replace(self, tensors=tensors)


def attention_example(
    seed: int,
    q_lengths: Sequence[int],
    k_lengths: Sequence[Sequence[int]],
    *,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    softmax: str = "joint",
    features: Sequence[str] = ("log_prior", "gate"),
) -> AttentionExample:
    """Draw a batch.

    Args:
        seed: of a generator of its own, on the CPU: the same numbers on every device.
        q_lengths: queries of each of B samples.
        k_lengths: keys of each of B x M segments.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: D.
        dtype: of query, key and value, and already their precision: truth is computed from the rounded numbers.
        device: where the tensors go.
        softmax: "joint" or "per_modality".
        features: any of "log_prior", "gate", "output_gate", "active" (about 70 % of the segments), "times" (sorted
            keys, queries in any order), "lookback".
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layout = ModalityLayout.from_lengths(torch.tensor(q_lengths), torch.tensor(k_lengths))
    modalities, batch = layout.num_modalities, layout.batch_size
    rows = (layout.total_q, heads, modalities)
    tensors = {
        "query": draw(layout.total_q, heads, head_dim).to(dtype),
        "key": draw(layout.total_k, kv_heads, head_dim).to(dtype),
        "value": draw(layout.total_k, kv_heads, head_dim).to(dtype),
    }
    if "log_prior" in features and softmax == "joint":
        tensors["log_prior"] = draw(*rows)
    if "gate" in features:
        tensors["gate"] = draw(*rows)
    if "output_gate" in features:
        tensors["output_gate"] = draw(layout.total_q, heads, head_dim).to(dtype)
    if "active" in features:
        tensors["active"] = torch.rand(batch, heads, modalities, generator=generator) < 0.7
    times = None
    if "times" in features:
        span = 4 * max(max(segment) for segment in k_lengths) + 4
        query_time = torch.randint(0, span, (layout.total_q,), generator=generator)
        key_time = torch.randint(0, span, (layout.total_k,), generator=generator)
        order = torch.argsort(layout.key_segments() * span + key_time)
        window = torch.randint(1, span, (modalities,), generator=generator) if "lookback" in features else None
        times = query_time.to(device), key_time[order].to(device), window
    grad_output, grad_mass = draw(layout.total_q, heads, head_dim), draw(*rows)
    tensors = {name: x.to(device) for name, x in tensors.items()}
    layout = ModalityLayout.from_lengths(torch.tensor(q_lengths).to(device), torch.tensor(k_lengths).to(device))
    if times is not None:
        layout = layout.at_times(*times)
    return AttentionExample(tensors, layout, softmax, grad_output.to(device), grad_mass.to(device))


def run_attention(example: AttentionExample, attention: Callable[..., Sequence[Tensor]]) -> dict[str, Tensor]:
    """Outputs and every gradient of one implementation, by name ("output", "mass", "lse", "grad_query", ...).

    Args:
        example: what to compute.
        attention: called as ``attention(query, key, value, layout, softmax=..., **others)``.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in example.tensors.items() if name != "active"}
    others = {name: x for name, x in leaves.items() if name not in ("query", "key", "value")}
    if "active" in example.tensors:
        others["active"] = example.tensors["active"]
    output, mass, lse = attention(
        leaves["query"], leaves["key"], leaves["value"], example.layout, softmax=example.softmax, **others
    )
    loss = (output * example.grad_output).sum() + (mass * example.grad_mass).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = {"output": output.detach(), "mass": mass.detach(), "lse": lse.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"grad_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def attention_truth(example: AttentionExample) -> dict[str, Tensor]:
    """`run_attention` of the reference in float64."""
    return _run_reference(example.cast(torch.float64), torch.float64)


def plain_attention(example: AttentionExample) -> list[dict[str, Tensor]]:
    """`run_attention` of plain PyTorch that computes in the example's own dtype, `PLAIN_DRAWS` times."""
    dtype = example.tensors["query"].dtype
    draws = []
    for order in head_orders(example.tensors["query"]):
        tensors = {name: x[..., order] if name in PACKED else x for name, x in example.tensors.items()}
        reordered = replace(example, tensors=tensors, grad_output=example.grad_output[..., order])
        draws.append(restore_heads(_run_reference(reordered, dtype), order))
    return draws


def head_orders(query: Tensor) -> list[Tensor]:
    """`PLAIN_DRAWS` orders of the head dimension, the first of them as it is: the same numbers, rounded otherwise."""
    head_dim, generator = query.shape[-1], torch.Generator().manual_seed(0)
    shuffled = [torch.randperm(head_dim, generator=generator) for _ in range(PLAIN_DRAWS - 1)]
    return [order.to(query.device) for order in (torch.arange(head_dim), *shuffled)]


def restore_heads(results: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Results that were computed with the head dimension in ``order``, as if it had been left alone."""
    with_heads = {"output", *(f"grad_{name}" for name in PACKED)}
    return {name: x[..., torch.argsort(order)] if name in with_heads else x for name, x in results.items()}


def check_attention(example: AttentionExample, attention: Callable[..., Sequence[Tensor]]) -> list[str]:
    """Hold one implementation to the budget; what exceeds it, in words, nothing if all is well."""
    return over_budget(run_attention(example, attention), attention_truth(example), plain_attention(example))


def over_budget(
    actual: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    plain: Sequence[Mapping[str, Tensor]],
    terms: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Compare results by name: ``norm(actual - truth) <= 2 * norm(plain - truth) + eps * norm(truth)``.

    The error of ``plain`` is the largest of those given; eps is one rounding in the result's own dtype. The largest
    error of an element may be twice what the same formula says of the largest instead of the norm: a norm hides one
    wrong element among many. Where a result is the difference of larger ``terms``, they stand in for the truth's size.
    Infinities must agree exactly, and nothing may be NaN.
    """
    complaints = []
    for name, expected in truth.items():
        got = actual[name].double()
        finite = torch.isfinite(expected)
        if not torch.equal(got[~finite], expected[~finite]) or not bool(torch.isfinite(got[finite]).all()):
            complaints.append(f"{name}: infinities or NaN where the truth has none, or the reverse")
            continue
        eps = torch.finfo(actual[name].dtype).eps
        for measure, order, slack in (("norm", 2, 1), ("its largest element", torch.inf, 2)):
            error, *plain_errors = (_size((x - expected)[finite], order) for x in (got, *(x[name] for x in plain)))
            size = max(_size(expected[finite], order), _size(terms[name], order) if terms and name in terms else 0.0)
            allowed = slack * (2 * max(plain_errors) + eps * size)
            if error > allowed:
                complaints.append(f"{name}: error {error:.2e} in {measure}, allowed {allowed:.2e}")
    return complaints


def _size(x: Tensor, order: float) -> float:
    return torch.linalg.vector_norm(x, order).item() if x.numel() else 0.0


def _run_reference(example: AttentionExample, compute_dtype: torch.dtype) -> dict[str, Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, layout: ModalityLayout, **others: Any) -> Sequence[Tensor]:
        scale = query.shape[-1] ** -0.5
        return reference.gated_multimodal_attention(
            query, key, value, layout, scale=scale, compute_dtype=compute_dtype, **others
        )

    return run_attention(example, attention)
