"""Arguments of the Hopper kernels from the tensors of a launch: nothing here waits for the GPU."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from fusedmm.kernels.attention.arguments import strides_of, unit_last_stride
from fusedmm.kernels.attention.config import head_block
from fusedmm.kernels.attention.hopper.config import hopper_config
from fusedmm.kernels.attention.hopper.forward import _attention_forward_hopper_kernel
from fusedmm.kernels.attention.hopper.ragged import ragged_descriptor
from fusedmm.kernels.attention.hopper.tiles import LOG2_E, ROWS
from fusedmm.kernels.attention.hopper.work import query_work

GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments by name, and its options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Start it."""
        self.kernel[self.grid](**self.arguments, **self.options)


def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU, which is how many CTAs a persistent kernel has; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tma_operand(x: Tensor) -> Tensor:
    """``x`` itself if TMA can read it (16-byte start and strides, last stride 1), else a contiguous copy."""
    steps = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(stride % steps == 0 for stride in x.stride()[:-1])
    return unit_last_stride(x) if aligned else x.contiguous()


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_tiles: Tensor,
    log_prior: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    active: Tensor | None,
    visible: Tensor | None,
    scale: float,
    programs: int,
) -> Launch:
    """The forward with the joint softmax, into ``output``, ``mass`` and ``lse``.

    Args:
        query: [total_q, Hq, D] float16 or bfloat16; key and value likewise [total_k, Hkv, D]; none is empty.
        key: see query.
        value: see query.
        output: contiguous [total_q, Hq, D].
        mass: contiguous [total_q, Hq, M] float32, like lse.
        lse: see mass.
        cu_seqlens_q: this and what follows as in `attention_forward`.
        cu_seqlens_k: see `attention_forward`.
        query_tiles: see `attention_forward`.
        log_prior: see `attention_forward`.
        gate: see `attention_forward`.
        output_gate: see `attention_forward`.
        active: see `attention_forward`.
        visible: see `attention_forward`.
        scale: positive.
        programs: CTAs, at most one an SM.
    """
    _, query_heads, head_dim = query.shape
    block_k, config = hopper_config("forward", head_dim)
    block_d = max(64, head_block(head_dim))
    work = query_work(
        query_tiles, cu_seqlens_q, cu_seqlens_k, active, visible, query_heads=query_heads, block_k=block_k
    )
    dtype = GLUON_DTYPES[query.dtype]
    num_items = query_tiles.shape[0] * query_heads
    arguments = {
        "query_desc": ragged_descriptor(tma_operand(query), ROWS.value, block_d, dtype),
        "key_desc": ragged_descriptor(tma_operand(key), block_k, block_d, dtype),
        "value_desc": ragged_descriptor(tma_operand(value), block_k, block_d, dtype),
        "output_ptr": output,
        "mass_ptr": mass,
        "lse_ptr": lse,
        "log_prior_ptr": log_prior,
        "gate_ptr": gate,
        "output_gate_ptr": output_gate,
        "visible_ptr": visible,
        "work_ptr": work,
        "scale2": scale * LOG2_E.value,
        "num_tiles": query_tiles.shape[0],
        "num_items": num_items,
        "num_programs": min(programs, num_items),
        **strides_of(log_prior, "log_prior", "qhm"),
        **strides_of(gate, "gate", "qhm"),
        **strides_of(output_gate, "output_gate", "qh"),
        "HEAD_DIM": head_dim,
        "QUERY_HEADS": query_heads,
        "GROUP": query_heads // key.shape[1],
        "MODALITIES": mass.shape[-1],
        "WORK_HEADS": work.shape[0],
    }
    return Launch(_attention_forward_hopper_kernel, (arguments["num_programs"],), arguments, config.launch_options())
