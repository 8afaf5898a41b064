"""The passes of Hopper attention as launches: kernel, grid and arguments from tensors, without waiting for the GPU."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmm.kernels.attention.arguments import AttentionProblem, strides_of
from fusedmm.kernels.attention.config import head_block
from fusedmm.kernels.attention.hopper.backward_key_value import TERMS, _attention_backward_key_value_hopper_kernel
from fusedmm.kernels.attention.hopper.backward_query import _attention_backward_query_hopper_kernel
from fusedmm.kernels.attention.hopper.config import code_path, hopper_config
from fusedmm.kernels.attention.hopper.forward import _attention_forward_hopper_kernel
from fusedmm.kernels.attention.hopper.ragged import ragged_descriptor
from fusedmm.kernels.attention.hopper.tiles import LOG2_E, ROWS
from fusedmm.kernels.attention.hopper.work import key_work, query_work
from fusedmm.kernels.launch import LaunchConfig

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


def tma_operand(x: Tensor) -> Tensor:
    """``x`` itself if TMA can read it (16-byte start and strides, last stride 1), else a contiguous copy."""
    step = 16 // x.element_size()
    readable = x.stride(-1) == 1 and all(stride > 0 and stride % step == 0 for stride in x.stride()[:-1])
    # clone, not contiguous(): that keeps any stride of a dimension of size 1
    return x if readable and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    problem: AttentionProblem,
    *,
    programs: int,
) -> Launch:
    """The forward, into ``output``, ``mass`` and ``lse``.

    Args:
        query: [total_q, Hq, D] float16 or bfloat16; key and value likewise [total_k, Hkv, D]; none is empty.
        key: see query.
        value: see query.
        output: contiguous [total_q, Hq, D], for partials [total_q, Hq, M, D].
        mass: contiguous [total_q, Hq, M] float32, like lse.
        lse: see mass.
        problem: with a positive scale and without dropout.
        programs: CTAs, at most one an SM.
    """
    _, query_heads, head_dim = query.shape
    block_k, config = _config("forward", problem, head_dim)
    work = query_work(problem, query_heads, block_k)
    output_gate = None if problem.output_gate is None else tma_operand(problem.output_gate)  # rows of 16-byte loads
    num_items = problem.query_tiles.shape[0] * query_heads
    arguments = {
        "query_desc": _boxes(query, ROWS.value),
        "key_desc": _boxes(key, block_k),
        "value_desc": _boxes(value, block_k),
        "output_ptr": output,
        "mass_ptr": mass,
        "lse_ptr": lse,
        "log_prior_ptr": problem.log_prior,
        "gate_ptr": problem.gate,
        "output_gate_ptr": output_gate,
        "visible_ptr": problem.visible,
        "work_ptr": work,
        "scale2": problem.scale * LOG2_E.value,
        "num_tiles": problem.query_tiles.shape[0],
        "num_items": num_items,
        "num_programs": min(programs, num_items),
        **strides_of(problem.log_prior, "log_prior", "qhm"),
        **strides_of(problem.gate, "gate", "qhm"),
        **strides_of(output_gate, "output_gate", "qh"),
        "HEAD_DIM": head_dim,
        "QUERY_HEADS": query_heads,
        "GROUP": query_heads // key.shape[1],
        "MODALITIES": problem.num_modalities,
        "WORK_HEADS": work.shape[0],
        "SOFTMAX": problem.softmax,
    }
    return Launch(_attention_forward_hopper_kernel, (arguments["num_programs"],), arguments, config.launch_options())


def query_launch(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_query: Tensor,
    grad_log_prior: Tensor | None,
    grad_gate: Tensor | None,
    mass: Tensor,
    row_terms: Tensor,
    problem: AttentionProblem,
    *,
    delta_only: bool,
) -> Launch:
    """The backward for queries, gates and priors, or (``delta_only``) the shift of the per-modality softmax.

    Args:
        grad_output: [total_q, Hq, D] before the output gate; for partials [total_q, Hq, M, D].
        query: this and what follows as given to the forward.
        key: see query.
        value: see query.
        grad_query: contiguous [total_q, Hq, D], written unless ``delta_only``.
        grad_log_prior: contiguous [total_q, Hq, M] float32 or None, likewise.
        grad_gate: contiguous [total_q, Hq, M] float32 or None, likewise.
        mass: contiguous [total_q, Hq, M] float32.
        row_terms: [4, Hq, M, padded rows] float32; its second plane is written if ``delta_only``.
        problem: without dropout; a scale of any sign.
        delta_only: which of the two.
    """
    _, query_heads, head_dim = query.shape
    block_k, config = _config("query", problem, head_dim)
    work = query_work(problem, query_heads, block_k)
    arguments = {
        "query_desc": _boxes(query, ROWS.value),
        "grad_output_desc": _boxes(grad_output.flatten(1, -2), ROWS.value),
        "key_desc": _boxes(key, block_k),
        "value_desc": _boxes(value, block_k),
        "grad_query_ptr": grad_query,
        "grad_log_prior_ptr": grad_log_prior,
        "grad_gate_ptr": grad_gate,
        "mass_ptr": mass,
        "row_terms_ptr": row_terms,
        "visible_ptr": problem.visible,
        "work_ptr": work,
        "scale": problem.scale,
        "scale2": problem.scale * LOG2_E.value,
        "num_tiles": problem.query_tiles.shape[0],
        "padded_rows": row_terms.shape[-1],
        "HEAD_DIM": head_dim,
        "QUERY_HEADS": query_heads,
        "GROUP": query_heads // key.shape[1],
        "MODALITIES": problem.num_modalities,
        "WORK_HEADS": work.shape[0],
        "IS_PARTIALS": problem.softmax == "partials",
        "DELTA_ONLY": delta_only,
    }
    grid = (problem.query_tiles.shape[0] * query_heads,)
    return Launch(_attention_backward_query_hopper_kernel, grid, arguments, config.launch_options())


def key_value_launch(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    row_terms: Tensor,
    problem: AttentionProblem,
) -> Launch:
    """The backward for keys and values.

    Args:
        grad_output: [total_q, Hq, D] before the output gate; for partials [total_q, Hq, M, D].
        query: this and what follows as given to the forward.
        key: see query.
        value: see query.
        grad_key: contiguous [total_k, Hkv, D], like grad_value.
        grad_value: see grad_key.
        row_terms: [4, Hq, M, padded rows] float32.
        problem: without dropout; a scale of any sign.
    """
    _, query_heads, head_dim = query.shape
    key_heads = key.shape[1]
    block_q, config = _config("key_value", problem, head_dim)
    work = key_work(problem, query_heads, block_q)
    arguments = {
        "query_desc": _boxes(query, block_q),
        "grad_output_desc": _boxes(grad_output.flatten(1, -2), block_q),
        "key_desc": _boxes(key, ROWS.value),
        "value_desc": _boxes(value, ROWS.value),
        "terms_desc": _terms_descriptor(row_terms, block_q),
        "grad_key_ptr": grad_key,
        "grad_value_ptr": grad_value,
        "visible_ptr": problem.visible,
        "work_ptr": work,
        "scale": problem.scale,
        "scale2": problem.scale * LOG2_E.value,
        "num_tiles": problem.key_tiles.shape[0],
        "HEAD_DIM": head_dim,
        "KEY_HEADS": key_heads,
        "GROUP": query_heads // key_heads,
        "MODALITIES": problem.num_modalities,
        "WORK_HEADS": work.shape[0],
        "IS_PARTIALS": problem.softmax == "partials",
        "HAS_GATE": problem.gate is not None,
    }
    grid = (problem.key_tiles.shape[0] * key_heads,)
    return Launch(_attention_backward_key_value_hopper_kernel, grid, arguments, config.launch_options())


def _config(which: str, problem: AttentionProblem, head_dim: int) -> tuple[int, LaunchConfig]:
    """Rows of a streamed tile, and the launch, of a pass."""
    return hopper_config(code_path(which, problem.softmax, visible=problem.visible is not None), head_dim)


def _boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of [row, head, dim], copied where TMA cannot read it: a box holds ``rows`` rows of one head."""
    return ragged_descriptor(tma_operand(x), rows, max(64, head_block(x.shape[-1])), GLUON_DTYPES[x.dtype])


def _terms_descriptor(row_terms: Tensor, block_q: int) -> TensorDescriptor:
    """Descriptor of the row terms: a box holds all four of ``block_q`` rows of one head and modality."""
    terms, heads, modalities, padded_rows = row_terms.shape
    block_shape = [TERMS.value, 1, block_q]
    return TensorDescriptor(
        base=row_terms,
        shape=[terms, heads * modalities, padded_rows],
        strides=[heads * modalities * padded_rows, padded_rows, 1],
        block_shape=block_shape,
        layout=gl.NVMMASharedLayout.get_default_for(block_shape, gl.float32),
    )
