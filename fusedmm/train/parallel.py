"""Ranks, mesh and sharding: one process or many take the same path.

A run without torchrun is a group of one rank, so that checkpoints and evaluation have no second code path; its model is
left whole unless it needs FSDP2's mixed precision. Collectives on CPU tensors go through gloo even where the model is
on GPUs (NCCL): a flag or a float that the host needs never waits for the GPU's stream.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fusedmm.train.config import RecipeError


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and reports."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place, on the tensor's device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] of equal shape on every rank -> [size * n, ...], rank by rank."""
        gathered = values.new_zeros(self.size, *values.shape)
        gathered[self.rank] = values
        return self.total(gathered).flatten(0, 1)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; all ranks get the same answer."""
        return bool(self.total(torch.tensor([float(flag)])).item() > 0)

    def barrier(self) -> None:
        """Wait for every rank."""
        self.total(torch.zeros(1))


@contextmanager
def open_world(device: str = "auto", shard: int = 0) -> Iterator[World]:
    """Join torchrun's ranks, or make a group of one; leave it at the end.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        shard: ranks over which weights are sharded; 0: all of them.

    Raises:
        RecipeError: where CUDA is asked for and absent, or ``shard`` does not divide the ranks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train: run.device is 'cuda', but torch sees no CUDA device. Use run.device=cpu or auto.")
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]  # missing from the stubs only
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    try:
        yield join_world(kind, shard)
    finally:
        dist.destroy_process_group()


def join_world(kind: str, shard: int) -> World:
    """The world of a process group that is already up: its mesh is (replicate, shard)."""
    size = dist.get_world_size()
    shard = shard or size
    if size % shard:
        raise RecipeError(
            f"train: run.shard must divide the number of ranks {size}, got {shard}. Use 0 to shard over all of them."
        )
    mesh = init_device_mesh(kind, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    return World(dist.get_rank(), size, device, mesh)


def shard_model(model: nn.Module, blocks: list[nn.Module], world: World, dtype: torch.dtype) -> nn.Module:
    """Shard each block, then what is left, with gradients *summed* over ranks (the loss is already divided by the
    global count).

    One rank that computes in float32 has nothing to shard: its model is returned as it is. Else weights and optimiser
    state stay float32; ``dtype`` is that of forward and backward, reductions are float32.
    """
    if world.size == 1 and dtype == torch.float32:
        return model
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = world.mesh if world.mesh.size(0) > 1 else world.mesh["shard"]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def ended(status: int, why: str) -> int:
    """The status of a process that ends with another than 0, and why: on stderr, once for all ranks, and where torchrun
    looks, whose own status is then 1 and whose last words are a traceback and the cause that is given here.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": why, "timestamp": int(time.time())}))
    if os.environ.get("RANK", "0") == "0":
        print(why, file=sys.stderr)
    return status


def full(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, which every rank must ask for; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class StopSignal:
    """SIGTERM and SIGINT ask for a checkpoint and a clean end instead of killing the step that runs; a second SIGINT
    interrupts at once.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True

    def restore(self) -> None:
        """Give the signals back to their earlier handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
