"""Launches of the Hopper kernels in the Gluon simulator (gluon_simulator.py), and the operator made of them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmm.kernels.attention.arguments import AttentionProblem
from fusedmm.kernels.attention.hopper import compat, launch, passes
from fusedmm.ops.attention import layout_arguments
from fusedmm.testing import AttentionExample
from tests.gluon_simulator import Simulator
from tests.gluon_values import Descriptor, Pointer

SUBSTITUTES = (
    (compat.load_tile, "load_tile"),
    (compat.partition_barrier, "nothing"),
    (hopper.fence_async_shared, "fence"),
    (hopper.warpgroup_mma, "product"),
    (hopper.warpgroup_mma_wait, "wait"),
)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "int32"}


class Memory:
    """The storages behind a launch's tensors as flat NumPy arrays, apart from the tensors."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[Tensor, np.ndarray]] = {}

    def of(self, tensor: Tensor) -> np.ndarray:
        """From the tensor's first element on."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            flat = torch.empty(0, dtype=tensor.dtype).set_(storage)
            array = flat.to(torch.float32 if flat.is_floating_point() else flat.dtype).numpy(force=True).copy()
            self.storages[storage.data_ptr()] = flat, array
        return self.storages[storage.data_ptr()][1][tensor.storage_offset() :]

    def write_back(self) -> None:
        """Into the tensors."""
        for flat, array in self.storages.values():
            flat.copy_(torch.from_numpy(array))


def simulate(launched: passes.Launch, seed: int) -> Memory:
    """Run a launch; its tensors stay as they are until they are written back."""
    memory = Memory()

    def convert(argument: Any) -> Any:
        if isinstance(argument, TensorDescriptor):
            base = argument.base
            return Descriptor(
                memory.of(base),
                DTYPES[base.dtype],
                argument.shape,
                argument.strides,
                argument.block_shape,
                base.element_size(),
            )
        if isinstance(argument, Tensor):
            return Pointer(memory.of(argument), DTYPES[argument.dtype])
        return argument

    arguments = {name: convert(argument) for name, argument in launched.arguments.items()}
    options = {name: value for name, value in launched.options.items() if name in launched.kernel.arg_names}
    Simulator(seed).run(launched.kernel, launched.grid[0], {**arguments, **options}, SUBSTITUTES)
    return memory


def hopper_attention(
    example: AttentionExample, softmax: str, grad_output: Tensor, grad_statistic: Tensor
) -> dict[str, Tensor]:
    """Outputs and every gradient from the Hopper launchers; ``grad_statistic`` is that of mass, for partials of lse."""
    tensors = example.tensors
    inputs = [tensors[name] for name in ("query", "key", "value")]
    problem = AttentionProblem(
        **layout_arguments(example.layout, example.layout.visibility),
        softmax=softmax,
        scale=inputs[0].shape[-1] ** -0.5,
        **{name: tensors.get(name) for name in ("log_prior", "gate", "output_gate", "active")},
    )
    output, mass, lse = launch.attention_forward(*inputs, problem)
    gradients = launch.attention_backward(
        grad_output.to(output.dtype),
        grad_statistic if softmax == "joint" else None,
        grad_statistic if softmax == "partials" else None,
        *inputs,
        output,
        mass,
        lse,
        problem,
        needs_log_prior="log_prior" in tensors,
        needs_gate="gate" in tensors,
    )
    names = ("query", "key", "value", "log_prior", "gate", "output_gate")
    results = {f"grad_{name}": x for name, x in zip(names, gradients, strict=True) if x is not None}
    return {"output": output, "mass": mass, "lse": lse, **results}
