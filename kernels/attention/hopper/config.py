"""Tiles of the Hopper kernels and what they support: pure functions over one table.

Registers: 65,536 a CTA. Two consumers of 4 warps take 240 a thread, the producer's warp 24 (it is allotted those of
four warps), and 168 is what the launch reserves for each of the 12.

Tried: a third consumer for the joint forward at head dim 64 (160 registers each, 64 keys a tile, a ring of 4) compiles
without spills and with every exponential under a product, but it is modelled at 85 % of the peak against the 87 % of
two with 128 keys a tile: exponentials bound both. It would need tiles of 192 queries and waits for a measurement."""

from collections.abc import Collection

import torch

from fusedmm.kernels.attention.config import head_block
from fusedmm.kernels.launch import LaunchConfig

# code path -> {BLOCK_D: (rows of a streamed tile, slots of the ring)}: the largest that compile without a spill
_TABLE = {
    "forward_joint": {64: (128, 3), 128: (128, 2), 256: (64, 2)},
    "forward_per_modality": {64: (128, 3), 128: (64, 3)},
    "forward_partials": {64: (128, 3), 128: (64, 4)},
    "query": {64: (128, 2), 128: (64, 2)},
    "key_value": {64: (64, 3), 128: (64, 2)},
    "key_value_visible": {64: (64, 3), 128: (32, 3)},
}
# code path -> largest head dim with an output gate, whose logits need registers beside the accumulators
_OUTPUT_GATE = {"forward_joint": 128, "forward_per_modality": 64}
_DTYPES = (torch.float16, torch.bfloat16)


def code_path(which: str, softmax: str, *, visible: bool) -> str:
    """Row of the table for a pass.

    Args:
        which: "forward", "key_value" or "query".
        softmax: "joint", "per_modality" or "partials".
        visible: whether there are time ranges.
    """
    if which == "forward":
        return f"forward_{softmax}"
    return "key_value_visible" if which == "key_value" and visible else which


def hopper_config(path: str, head_dim: int) -> tuple[int, LaunchConfig]:
    """Rows of a streamed tile, and the launch, of a code path."""
    block, stages = _TABLE[path][max(64, head_block(head_dim))]
    blocks = {"STAGES": stages, "CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24}
    return block, LaunchConfig(blocks=blocks, num_warps=4, num_stages=1, max_registers=168)


def faint_config(head_dim: int) -> LaunchConfig:
    """The launch of the forward's second pass, which rarely does more than to look."""
    blocks = {"BLOCK_Q": 64, "BLOCK_K": 64, "BLOCK_D": max(64, head_block(head_dim))}
    return LaunchConfig(blocks=blocks, num_warps=4, num_stages=1)


def hopper_reasons(
    which: str,
    arch: str,
    head_dim: int,
    dtype: torch.dtype,
    softmax: str,
    features: Collection[str],
    triton_version: str,
) -> list[str]:
    """Why the Hopper kernels cannot do one pass; empty if they can.

    Args:
        which: "forward", "key_value" or "query".
        arch: such as "sm_90".
        head_dim: D.
        dtype: of query, key and value.
        softmax: "joint", "per_modality" or "partials".
        features: the optional arguments in use: any of "log_prior", "gate", "output_gate", "active", "visible",
            "dropout".
        triton_version: such as "3.6.0".
    """
    path = code_path(which, softmax, visible="visible" in features)
    widest = max(_TABLE[path])
    with_gate = _OUTPUT_GATE.get(path, widest)
    version = tuple(int(part) for part in triton_version.split(".")[:2])
    conditions = {
        f"architecture {arch} (sm_90 only)": arch == "sm_90",
        f"Triton {triton_version} (3.6 and later have the Gluon they are written in)": version >= (3, 6),
        f"dtype {str(dtype).removeprefix('torch.')} (float16 and bfloat16 only)": dtype in _DTYPES,
        f"head dim {head_dim} (a multiple of 8, at most {widest})": head_dim % 8 == 0 and head_dim <= widest,
        f"output gate at head dim {head_dim} (at most {with_gate})": "output_gate" not in features
        or head_dim <= with_gate,
        "dropout": "dropout" not in features,
    }
    return [reason for reason, holds in conditions.items() if not holds]
