"""The Hopper kernels against the float64 reference, run from their Gluon source on NumPy (see gluon_simulator.py).

Layouts, times, switched-off segments and the schedule of partitions are drawn at random: every seed is another order of
loads, products and waits.
"""

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
from fusedmm.kernels.attention.hopper.launch import Launch, forward_launch

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


LAYOUTS = {
    "jagged": ([130, 0, 5, 64], [[300, 0, 17], [3, 5, 130], [0, 0, 0], [0, 33, 1]]),
    "no queries of the first, no keys of the last": ([0, 70, 3], [[5, 4], [257, 128], [0, 0]]),
    "long": ([200], [[390, 140]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("features", "shape"),
    [
        ((), {"heads": 1, "kv_heads": 1, "head_dim": 64}),
        (("log_prior", "gate", "output_gate", "active"), {"heads": 4, "kv_heads": 2, "head_dim": 64}),
        (("log_prior", "gate", "active", "times"), {"heads": 2, "kv_heads": 2, "head_dim": 96}),
        (("gate", "times", "lookback"), {"heads": 2, "kv_heads": 1, "head_dim": 128}),
    ],
)
def test_forward_matches_the_reference(name: str, features: tuple[str, ...], shape: dict[str, int]) -> None:
    for seed in range(2):
        example = attention_example(seed, *LAYOUTS[name], dtype=torch.bfloat16, features=features, **shape)
        actual = simulate_forward(example, seed)
        truth = {key: x for key, x in attention_truth(example).items() if key in actual}
        assert over_budget(actual, truth, plain_attention(example)) == []
