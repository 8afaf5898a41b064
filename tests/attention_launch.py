"""The attention launchers alone, below the operator: problems drawn for them, their results, and what float64 says."""

import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from fusedmm.kernels.attention import config as config_module
from fusedmm.kernels.attention import launch as launch_module
from fusedmm.kernels.attention.arguments import AttentionProblem
from fusedmm.kernels.launch import LaunchConfig
from fusedmm.layout import ModalityLayout
from fusedmm.ops.attention import layout_arguments
from fusedmm.reference import attention as reference
from fusedmm.testing import PACKED, head_orders, over_budget, restore_heads

SOFTMAXES = ("joint", "per_modality", "partials")
LEAVES = ("query", "key", "value", "log_prior", "gate", "output_gate")
FEATURES = ("log_prior", "gate", "output_gate", "active", "times", "lookback", "dropout")


@dataclass
class Problem:
    """Arguments of both launchers and the upstream gradients."""

    layout: ModalityLayout
    softmax: str
    tensors: dict[str, Tensor]  # query, key, value; log_prior, gate and output_gate where in use
    scale: float
    active: Tensor | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0
    grads: dict[str, Tensor] = field(default_factory=dict)  # output; mass or lse where it has one

    def for_kernels(self) -> AttentionProblem:
        return AttentionProblem(
            **layout_arguments(self.layout, self.layout.visibility),
            softmax=self.softmax,
            scale=self.scale,
            active=self.active,
            seed=self.seed,
            dropout_p=self.dropout_p,
            **{name: self.tensors.get(name) for name in ("log_prior", "gate", "output_gate")},
        )


def draw_problem(
    seed: int,
    softmax: str,
    q_lengths: list[int],
    k_lengths: list[list[int]],
    *,
    features: tuple[str, ...] = (),
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, as_type: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(as_type).to(device)

    layout = ModalityLayout.from_lengths(torch.tensor(q_lengths), torch.tensor(k_lengths))
    total_q, total_k, batch, modalities = layout.total_q, layout.total_k, layout.batch_size, layout.num_modalities
    times = None
    if "times" in features:
        query_time = torch.randint(0, 60, (total_q,), generator=generator)  # in any order
        key_time = torch.randint(0, 60, (total_k,), generator=generator)
        order = torch.argsort(layout.key_segments() * 60 + key_time)
        times = (query_time.to(device), key_time[order].to(device), 20 if "lookback" in features else None)
    layout = ModalityLayout.from_lengths(torch.tensor(q_lengths).to(device), torch.tensor(k_lengths).to(device))
    layout = layout if times is None else layout.at_times(*times)
    tensors = {
        "query": draw(total_q, heads, head_dim, as_type=dtype),
        "key": draw(total_k, kv_heads, head_dim, as_type=dtype),
        "value": draw(total_k, kv_heads, head_dim, as_type=dtype),
    }
    if "log_prior" in features and softmax == "joint":
        tensors["log_prior"] = draw(total_q, heads, modalities)
        tensors["log_prior"][::3, :, 0] = -torch.inf
    if softmax != "partials":
        if "gate" in features:
            tensors["gate"] = draw(heads, modalities).expand(total_q, heads, modalities)
        if "output_gate" in features:
            tensors["output_gate"] = draw(total_q, heads, head_dim, as_type=dtype)
    problem = Problem(layout, softmax, tensors, scale=head_dim**-0.5)
    if "active" in features:
        problem.active = (torch.rand(batch, heads, modalities, generator=generator) < 0.6).to(device)
    if "dropout" in features and softmax != "partials":
        problem.seed, problem.dropout_p = torch.tensor([2**40 + seed], device=device), 0.3
    shape = (total_q, heads, modalities, head_dim) if softmax == "partials" else (total_q, heads, head_dim)
    problem.grads["output"] = draw(*shape, as_type=dtype)
    if softmax != "per_modality":
        problem.grads["mass" if softmax == "joint" else "lse"] = draw(total_q, heads, modalities)
    return problem


def fuzzed_problem(draw: random.Random, seed: int, softmax: str, q_lengths: list[int], device: torch.device) -> Problem:
    """One to three samples of so many queries, and of modalities that are empty, short or several tiles long."""
    batch, modalities = draw.randint(1, 3), draw.choice([1, 2, 3])
    chosen_q = [draw.choice(q_lengths) for _ in range(batch)]
    chosen_k = [[draw.choice([0, 1, 5, 32, 70]) for _ in range(modalities)] for _ in range(batch)]
    kv_heads = draw.choice([1, 2])
    return draw_problem(
        seed,
        softmax,
        chosen_q,
        chosen_k,
        features=tuple(name for name in FEATURES if draw.random() < 0.5),
        heads=kv_heads * draw.choice([1, 2]),
        kv_heads=kv_heads,
        head_dim=draw.choice([16, 17, 24, 32]),
        dtype=draw.choice([torch.float32, torch.float16]),
        device=device,
    )


def launch(problem: Problem) -> dict[str, Tensor]:
    """Outputs and gradients of the kernels, by name."""
    tensors, grads = problem.tensors, problem.grads
    inputs = (tensors["query"], tensors["key"], tensors["value"])
    for_kernels = problem.for_kernels()
    output, mass, lse = launch_module.attention_forward(*inputs, for_kernels)
    gradients = launch_module.attention_backward(
        grads["output"],
        grads.get("mass"),
        grads.get("lse"),
        *inputs,
        output,
        mass,
        lse,
        for_kernels,
        needs_log_prior="log_prior" in tensors,
        needs_gate="gate" in tensors,
    )
    results = {"output": output, "mass": mass, "lse": lse}
    results |= {f"grad_{name}": x for name, x in zip(LEAVES, gradients, strict=True) if x is not None}
    assert {name for name in results if name.startswith("grad_")} == {f"grad_{name}" for name in tensors}
    return results


def expect(problem: Problem, compute: torch.dtype) -> dict[str, Tensor]:
    """The same from the reference, which computes in ``compute``."""
    widen = torch.float64 if compute == torch.float64 else torch.float32
    leaves = {
        name: x.detach().to(compute if name in PACKED else widen).requires_grad_()
        for name, x in problem.tensors.items()
    }
    common = {"active": problem.active, "scale": problem.scale}
    inputs = (leaves["query"], leaves["key"], leaves["value"], problem.layout)
    if problem.softmax == "partials":
        output, lse = reference.modality_partials(*inputs, **common)
        mass = torch.isfinite(lse).to(output.dtype)
    else:
        others = {name: leaves.get(name) for name in ("log_prior", "gate", "output_gate")}
        output, mass, lse = reference.gated_multimodal_attention(
            *inputs,
            softmax=problem.softmax,
            seed=problem.seed,
            dropout_p=problem.dropout_p,
            compute_dtype=compute,
            **others,
            **common,
        )
    loss = (output * problem.grads["output"]).sum()
    if "mass" in problem.grads:
        loss = loss + (mass * problem.grads["mass"]).sum()
    if "lse" in problem.grads:
        loss = loss + (torch.where(torch.isfinite(lse), lse, 0.0) * problem.grads["lse"]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = {"output": output.detach(), "mass": mass.detach(), "lse": lse.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"grad_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def plain_draws(problem: Problem) -> list[dict[str, Tensor]]:
    """Plain PyTorch in the problem's dtype, as `fusedmm.testing.plain_attention` has it."""
    draws = []
    for order in head_orders(problem.tensors["query"]):
        tensors = {name: x[..., order] if name in PACKED else x for name, x in problem.tensors.items()}
        grads = {name: x[..., order] if name == "output" else x for name, x in problem.grads.items()}
        reordered = replace(problem, tensors=tensors, grads=grads)
        draws.append(restore_heads(expect(reordered, problem.tensors["query"].dtype), order))
    return draws


def complaints(problem: Problem, results: dict[str, Tensor] | None = None) -> list[str]:
    results = launch(problem) if results is None else results
    return over_budget(results, expect(problem, torch.float64), plain_draws(problem))


def set_blocks(monkeypatch: pytest.MonkeyPatch, block_q: int, block_k: int, tail: int, carry: bool) -> None:
    """Small tiles, so that small problems walk many of them."""

    def config(head_dim: int, *_: object, **__: object) -> LaunchConfig:
        block_d = config_module.head_block(head_dim)
        return LaunchConfig({"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": block_d}, num_warps=4, num_stages=2)

    def with_tail(head_dim: int, *_: object, **__: object) -> LaunchConfig:
        return LaunchConfig({**config(head_dim).blocks, "BLOCK_TAIL": tail}, num_warps=4, num_stages=2)

    def with_carry(head_dim: int, *_: object, **__: object) -> LaunchConfig:
        blocks = {**with_tail(head_dim).blocks, "CARRY_SCORES": carry}
        return LaunchConfig(blocks, num_warps=4, num_stages=2)

    def with_modalities(
        which: str, head_dim: int, dtype: torch.dtype, arch: str, num_modalities: int, *, visible: bool
    ) -> LaunchConfig:
        blocks = {**config(head_dim).blocks, "BLOCK_M": 16 if num_modalities <= 16 else 32}
        return LaunchConfig(blocks, num_warps=4, num_stages=2)

    monkeypatch.setattr(launch_module, "_attention_spans_config", with_modalities)
    monkeypatch.setattr(launch_module, "_attention_forward_config", with_carry)
    monkeypatch.setattr(launch_module, "_attention_backward_query_config", with_tail)
    monkeypatch.setattr(launch_module, "_attention_backward_key_value_config", config)
