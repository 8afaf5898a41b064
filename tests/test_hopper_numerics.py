"""The Hopper kernels against the float64 reference, run from their Gluon source on NumPy (see gluon_simulator.py).

Layouts, times, switched-off segments and the schedule of partitions are drawn at random: every seed is another order of
loads, products and waits.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusedmm.testing import AttentionExample, attention_example, attention_truth, over_budget, plain_attention
from tests.gluon_simulator import Descriptor, Pointer, Simulator

pytest.importorskip("triton")
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmm.kernels.attention.hopper import compat
from fusedmm.kernels.attention.hopper.launch import Launch, forward_launch, key_value_launch, query_launch

SUBSTITUTES = (
    (compat.load_tile, "load_tile"),
    (compat.partition_barrier, "nothing"),
    (hopper.fence_async_shared, "nothing"),
    (hopper.warpgroup_mma, "product"),
    (hopper.warpgroup_mma_wait, "wait"),
)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "int32"}
GLUON_DTYPES = {gl.bfloat16: "bf16", gl.float16: "fp16", gl.float32: "fp32"}


def simulate(launch: Launch, seed: int) -> None:
    """Run a launch in the simulator and copy what it wrote back into its tensors."""
    memories: dict[int, tuple[Tensor, np.ndarray]] = {}

    def memory(tensor: Tensor) -> np.ndarray:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in memories:
            flat = torch.empty(0, dtype=tensor.dtype).set_(storage)
            memories[storage.data_ptr()] = (
                flat,
                flat.to(torch.float32 if flat.is_floating_point() else flat.dtype).numpy(force=True).copy(),
            )
        return memories[storage.data_ptr()][1][tensor.storage_offset() :]

    def convert(name: str, argument: Any) -> Any:
        if isinstance(argument, TensorDescriptor):
            base = argument.base
            return Descriptor(
                memory(base),
                DTYPES[base.dtype],
                argument.shape,
                argument.strides,
                argument.block_shape,
                base.element_size(),
            )
        if isinstance(argument, Tensor):
            return Pointer(memory(argument), DTYPES[argument.dtype])
        return argument

    arguments = {name: convert(name, argument) for name, argument in launch.arguments.items()}
    options = {name: value for name, value in launch.options.items() if name in launch.kernel.arg_names}
    Simulator(seed).run(launch.kernel, launch.grid[0], {**arguments, **options}, SUBSTITUTES)
    for flat, array in memories.values():
        flat.copy_(torch.from_numpy(array))


def simulate_forward(example: AttentionExample, seed: int) -> dict[str, Tensor]:
    """Output, mass and lse of the Hopper forward."""
    layout, tensors = example.layout, example.tensors
    query = tensors["query"]
    rows = (query.shape[0], query.shape[1], layout.num_modalities)
    results = {
        "output": torch.full_like(query, float("nan")),
        "mass": torch.full(rows, float("nan")),
        "lse": torch.full(rows, float("nan")),
    }
    launch = forward_launch(
        query,
        tensors["key"],
        tensors["value"],
        **results,
        cu_seqlens_q=layout.cu_seqlens_q,
        cu_seqlens_k=layout.cu_seqlens_k,
        query_tiles=layout.query_tiles,
        **{name: tensors.get(name) for name in ("log_prior", "gate", "output_gate", "active")},
        visible=None if layout.visibility is None else layout.visibility.ranges,
        scale=query.shape[-1] ** -0.5,
        programs=2,
    )
    simulate(launch, seed)
    return results


def row_terms(example: AttentionExample, truth: dict[str, Tensor], grad_output: Tensor) -> Tensor:
    """[4, Hq, M, padded rows]: offset, shift, slope and gate in float64's accuracy, from the formulas of the backward.

    Args:
        example: joint softmax.
        truth: its mass and lse.
        grad_output: gradient before the output gate.
    """
    layout, mass, lse = example.layout, truth["mass"], truth["lse"]
    prior = example.tensors.get("log_prior", torch.zeros(1)).double()
    gate = example.tensors.get("gate", torch.ones(1)).double().expand(lse.shape)
    offset = (prior - torch.logsumexp(lse, -1, keepdim=True)) * math.log2(math.e)
    offset = torch.where(torch.isfinite(lse), offset, -math.inf)
    shift = (
        example.grad_mass - ((grad_output * truth["ungated"]).sum(-1) + (example.grad_mass * mass).sum(-1))[..., None]
    )
    terms = torch.zeros(4, *lse.shape[1:], layout.query_tiles.shape[0] * 128)
    terms[0] = -math.inf
    for sample in range(layout.batch_size):
        start, end = layout.cu_seqlens_q[sample : sample + 2].tolist()
        row = (start // 128 + sample) * 128
        for plane, term in enumerate((offset, shift, gate, gate)):
            seen = torch.isfinite(lse) if plane else True
            terms[plane, ..., row : row + end - start] = torch.where(
                torch.as_tensor(seen), term, 0.0 if plane else -math.inf
            )[start:end].permute(1, 2, 0)
    return terms


def simulate_backward(example: AttentionExample, seed: int, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the Hopper backward, from exact row terms."""
    layout, tensors = example.layout, example.tensors
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    grad_output = example.grad_output.double()
    if "output_gate" in tensors:
        grad_output = grad_output * torch.sigmoid(tensors["output_gate"].double())
    terms = row_terms(example, truth, grad_output)
    rows = truth["lse"].shape
    results = {f"grad_{name}": torch.full_like(tensors[name], float("nan")) for name in ("query", "key", "value")}
    shared: dict[str, Any] = {
        "cu_seqlens_q": layout.cu_seqlens_q,
        "cu_seqlens_k": layout.cu_seqlens_k,
        "active": tensors.get("active"),
        "visible": None if layout.visibility is None else layout.visibility.ranges,
        "scale": query.shape[-1] ** -0.5,
    }
    statistics = {f"grad_{name}": torch.full(rows, float("nan")) for name in ("log_prior", "gate") if name in tensors}
    simulate(
        query_launch(
            grad_output.to(query.dtype),
            query,
            key,
            value,
            results["grad_query"],
            statistics.get("grad_log_prior"),
            statistics.get("grad_gate"),
            truth["mass"].float(),
            terms,
            query_tiles=layout.query_tiles,
            delta_only=False,
            **shared,
        ),
        seed,
    )
    simulate(
        key_value_launch(
            grad_output.to(query.dtype),
            query,
            key,
            value,
            results["grad_key"],
            results["grad_value"],
            terms,
            key_tiles=layout.key_tiles,
            has_gate="gate" in tensors,
            **shared,
        ),
        seed,
    )
    return {**results, **statistics}


LAYOUTS = {
    "jagged": ([130, 0, 5, 64], [[300, 0, 17], [3, 5, 130], [0, 0, 0], [0, 33, 1]]),
    "no queries of the first, no keys of the last": ([0, 70, 3], [[5, 4], [257, 128], [0, 0]]),
    "long": ([200], [[390, 140]]),
}


CASES = [
    ((), {"heads": 1, "kv_heads": 1, "head_dim": 64}),
    (("log_prior", "gate", "output_gate", "active"), {"heads": 4, "kv_heads": 2, "head_dim": 64}),
    (("log_prior", "gate", "active", "times"), {"heads": 2, "kv_heads": 2, "head_dim": 96}),
    (("gate", "times", "lookback"), {"heads": 2, "kv_heads": 1, "head_dim": 128}),
]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("features", "shape"), CASES)
def test_forward_matches_the_reference(name: str, features: tuple[str, ...], shape: dict[str, int]) -> None:
    for seed in range(2):
        example = attention_example(seed, *LAYOUTS[name], dtype=torch.bfloat16, features=features, **shape)
        actual = simulate_forward(example, seed)
        truth = {key: x for key, x in attention_truth(example).items() if key in actual}
        assert over_budget(actual, truth, plain_attention(example)) == []


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("features", "shape"), CASES)
def test_backward_matches_the_reference(name: str, features: tuple[str, ...], shape: dict[str, int]) -> None:
    example = attention_example(3, *LAYOUTS[name], dtype=torch.bfloat16, features=features, **shape)
    truth, plain = attention_truth(example), plain_attention(example)
    ungated = {name: x for name, x in example.tensors.items() if name != "output_gate"}
    truth["ungated"] = attention_truth(replace(example, tensors=ungated))["output"]
    actual = simulate_backward(example, 3, truth)
    expected = {key: x for key, x in truth.items() if key in actual}
    delta = (example.grad_output * truth["output"]).abs().sum(-1) + (example.grad_mass * truth["mass"]).abs().sum(-1)
    assert over_budget(actual, expected, plain, terms={"grad_log_prior": delta}) == []
