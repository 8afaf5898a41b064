"""Random packed batches and the error budget: what the tests and the benchmarks' correctness gate share.

Truth is the reference in float64. An implementation may err by twice what plain PyTorch errs in the same dtype (the
reference computed in that dtype), plus one rounding of the truth and, for gradients, of the float32 lse.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedmm.layout import ModalityLayout
from fusedmm.reference import attention as reference

DIFFERENTIABLE = ("query", "key", "value", "log_prior", "gate", "output_gate")
PACKED = ("query", "key", "value", "output_gate")


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
    if "times" in features:
        span = 4 * max(max(segment) for segment in k_lengths) + 4
        query_time = torch.randint(0, span, (layout.total_q,), generator=generator)
        key_time = torch.randint(0, span, (layout.total_k,), generator=generator)
        order = torch.argsort(layout.key_segments() * span + key_time)
        window = torch.randint(1, span, (modalities,), generator=generator) if "lookback" in features else None
        layout = ModalityLayout.from_lengths(torch.tensor(q_lengths).to(device), torch.tensor(k_lengths).to(device))
        layout = layout.at_times(query_time.to(device), key_time[order].to(device), window)
    else:
        layout = ModalityLayout.from_lengths(torch.tensor(q_lengths).to(device), torch.tensor(k_lengths).to(device))
    grad_output, grad_mass = draw(layout.total_q, heads, head_dim), draw(*rows)
    tensors = {name: x.to(device) for name, x in tensors.items()}
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


def plain_attention(example: AttentionExample) -> dict[str, Tensor]:
    """`run_attention` of plain PyTorch that computes in the example's own dtype."""
    return _run_reference(example, example.tensors["query"].dtype)


def check_attention(example: AttentionExample, attention: Callable[..., Sequence[Tensor]]) -> list[str]:
    """Hold one implementation to the budget; what exceeds it, in words, nothing if all is well."""
    truth = attention_truth(example)
    # dlog_prior_m = sum_{j in m} P dP - mass_m delta may cancel, with one modality exactly: it is made of delta
    delta = (example.grad_output * truth["output"]).abs().sum(-1) + (example.grad_mass * truth["mass"]).abs().sum(-1)
    return over_budget(
        run_attention(example, attention), truth, plain_attention(example), terms={"grad_log_prior": delta}
    )


def over_budget(
    actual: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    terms: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Compare results by name: ``norm(actual - truth) <= 2 * norm(plain - truth) + eps * norm(truth)``.

    eps is one rounding in the result's own dtype, and for gradients that of the float32 lse they start from, which is
    an error of ``eps32 * |lse|`` in every probability. Where a result is the difference of larger ``terms``, their
    norm stands in for the truth's. Infinities must agree exactly, and nothing may be NaN.
    """
    lse_rounding = 0.0
    if "lse" in truth:
        sizes = truth["lse"][torch.isfinite(truth["lse"])].abs()
        lse_rounding = torch.finfo(actual["lse"].dtype).eps * float(sizes.max() if sizes.numel() else 0.0)
    complaints = []
    for name, expected in truth.items():
        got, naive = actual[name].double(), plain[name].double()
        finite = torch.isfinite(expected)
        if not torch.equal(got[~finite], expected[~finite]) or not bool(torch.isfinite(got[finite]).all()):
            complaints.append(f"{name}: infinities or NaN where the truth has none, or the reverse")
            continue
        error, plain_error = ((x - expected)[finite].norm().item() for x in (got, naive))
        size = max(expected[finite].norm().item(), terms[name].norm().item() if terms and name in terms else 0.0)
        rounding = torch.finfo(actual[name].dtype).eps + (lse_rounding if name.startswith("grad_") else 0.0)
        allowed = 2 * plain_error + rounding * size
        if error > allowed:
            complaints.append(f"{name}: error {error:.2e} in norm, allowed {allowed:.2e}")
    return complaints


def _run_reference(example: AttentionExample, compute_dtype: torch.dtype) -> dict[str, Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, layout: ModalityLayout, **others: Any) -> Sequence[Tensor]:
        scale = query.shape[-1] ** -0.5
        return reference.gated_multimodal_attention(
            query, key, value, layout, scale=scale, compute_dtype=compute_dtype, **others
        )

    return run_attention(example, attention)
