"""Attention by the portable kernels: which of them a problem takes, on what grids, and what they write.

The forward is one pass whose key tiles lie in segments (`forward`) or span them (`forward_spans`); where few queries
meet many keys (`config.key_splits`) its programs share out the keys, and `combine` puts the parts together.

The backward takes three passes without atomics, four for the per-modality softmax:

    rows       one number a query, head and modality: offset, shift, slope and gate; the output gate
    (delta)    per_modality only: shift_m = -slope sum_{j in m} p_j R_j, the query pass without its third product
    query      dq, dgate, dlog_prior: a program owns queries; its key tiles are of one segment or, where segments are
               short, span those of a sample
    key_value  dk, dv: a program owns keys, of one segment or, again, of one sample

The formulas stand in the modules of the passes. Recomputing scores in both costs 14 Hq D (visible pairs) FLOPs (18
with delta) against the forward's 4, and in exchange nothing is summed by two programs: gradients are bitwise
reproducible. Besides the gradients it allocates 16 Hq M bytes a padded query row and, with an output gate, one tensor
of the output's size; where keys are split the query pass also leaves a float32 sum a split.
"""

from typing import Any

import torch
from torch import Tensor

from fusedmm.kernels.attention.arguments import (
    AttentionProblem,
    input_precision,
    modality_stride,
    one_hot_dtype,
    strides_of,
    unit_last_stride,
)
from fusedmm.kernels.attention.backward_key_value import _attention_backward_key_value_kernel
from fusedmm.kernels.attention.backward_key_value_spans import _attention_backward_key_value_spans_kernel
from fusedmm.kernels.attention.backward_query import _attention_backward_query_kernel
from fusedmm.kernels.attention.backward_query_spans import _attention_backward_query_spans_kernel
from fusedmm.kernels.attention.backward_rows import attention_backward_rows
from fusedmm.kernels.attention.combine import combine_splits
from fusedmm.kernels.attention.config import (
    MAX_COLUMNS,
    _attention_backward_key_value_config,
    _attention_backward_query_config,
    _attention_forward_config,
    _attention_spans_config,
    key_splits,
    spans_segments,
)
from fusedmm.kernels.attention.forward import _attention_forward_kernel
from fusedmm.kernels.attention.forward_spans import _attention_forward_spans_kernel
from fusedmm.kernels.indexing import TILE
from fusedmm.kernels.launch import LaunchConfig, device_arch, multiprocessors


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, problem: AttentionProblem
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward.

    Args:
        query: [total_q, Hq, D] float16, bfloat16 or float32; D 16 to 256, last stride 1 (copied otherwise), as for
            all tensors with D.
        key: [total_k, Hkv, D], Hq a multiple of Hkv.
        value: [total_k, Hkv, D].
        problem: the rest.

    Returns:
        output [total_q, Hq, D] ([total_q, Hq, M, D] for partials) in query's dtype, mass and lse [total_q, Hq, M]
        float32.
    """
    query, problem = problem.with_positive_scale(query)
    query, key, value = (unit_last_stride(x) for x in (query, key, value))
    if problem.output_gate is not None:
        problem = problem._replace(output_gate=unit_last_stride(problem.output_gate))
    output, mass, lse = problem.empty_results(query)
    total_q, num_heads, head_dim = query.shape
    arch = device_arch(query.device)
    config = _attention_forward_config(
        head_dim,
        query.dtype,
        arch,
        total_q // max(problem.batch, 1),
        dropout=problem.seed is not None,
        visible=problem.visible is not None,
        wide_end=problem.softmax != "joint" or problem.output_gate is not None,
        output_gate=problem.output_gate is not None,
    )
    splits = _splits(query, key, problem, config, results=1 if problem.softmax == "joint" else problem.num_modalities)
    if splits > 1:
        _forward_in_splits(query, key, value, problem, output, mass, lse, config, splits)
        return output, mass, lse
    arguments = _forward_arguments(query, key, value, problem, output, mass, lse)
    if problem.softmax == "joint" and _spans_segments(key, problem) and key.shape[0] <= MAX_COLUMNS:
        config = _attention_spans_config(
            "forward", head_dim, query.dtype, arch, problem.num_modalities, visible=problem.visible is not None
        )
        _attention_forward_spans_kernel[(_query_programs(problem, config, num_heads),)](
            **arguments, ONE_HOT=one_hot_dtype(query), **config.launch_options()
        )
    else:
        _attention_forward_kernel[(_query_programs(problem, config, num_heads), 1)](
            **arguments, split_rows=None, SOFTMAX=problem.softmax, **config.launch_options()
        )
    return output, mass, lse


def attention_backward(
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    problem: AttentionProblem,
    *,
    needs_log_prior: bool,
    needs_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward.

    Args:
        grad_output: gradient of the output (behind the output gate), in its shape; any strides.
        grad_mass: [total_q, Hq, M] float32 or None; only for the joint softmax, elsewhere mass is constant.
        grad_lse: [total_q, Hq, M] float32 or None; only for partials.
        query: with key, value and problem as given to the forward.
        key: see query.
        value: see query.
        output: with mass and lse as returned by the forward, contiguous.
        mass: see output.
        lse: see output.
        problem: see query.
        needs_log_prior: whether to return the gradient of log_prior.
        needs_gate: whether to return the gradient of gate.

    Returns:
        Gradients of query, key, value, log_prior, gate (both [total_q, Hq, M] float32 or None) and output_gate (None
        without one).
    """
    query, key, value, grad_output = (unit_last_stride(x) for x in (query, key, value, grad_output))
    key_ranges = problem.key_ranges(query.shape[1])
    row_terms, grad_gated, grad_output_gate = attention_backward_rows(
        grad_output, grad_mass, grad_lse, output, mass, lse, key_ranges, problem
    )
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    grad_log_prior = torch.empty_like(mass) if needs_log_prior else None
    grad_gate = torch.empty_like(mass) if needs_gate else None
    arguments = {
        **_shared_arguments(query, key, value, key_ranges, problem),
        "grad_output_ptr": grad_gated,
        **strides_of(grad_gated, "grad_output", "qh"),
        "row_terms_ptr": row_terms,
        "padded_rows": row_terms.shape[-1],
    }
    _backward_query(arguments, query, key, problem, mass, row_terms, (grad_query, grad_log_prior, grad_gate))
    _backward_key_value(arguments, key, problem, grad_key, grad_value)
    return grad_query, grad_key, grad_value, grad_log_prior, grad_gate, grad_output_gate


def _forward_in_splits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: AttentionProblem,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    config: LaunchConfig,
    splits: int,
) -> None:
    """The forward of each part of the keys into a float32 buffer of its own, and their combination."""
    # Modalities that have a softmax each stay apart until all their keys are counted, and gates wait as long.
    part = problem._replace(output_gate=None)
    if problem.softmax == "per_modality":
        part = part._replace(softmax="partials", gate=None)
    total_q, num_heads, head_dim = query.shape
    part_shape = (*mass.shape, head_dim) if part.softmax == "partials" else output.shape
    part_output = mass.new_empty((splits, *part_shape))
    part_mass, part_lse = mass.new_empty((2, splits, *mass.shape))
    _attention_forward_kernel[(_query_programs(problem, config, num_heads), splits)](
        **_forward_arguments(query, key, value, part, part_output, part_mass, part_lse),
        split_rows=total_q * num_heads,
        SOFTMAX=part.softmax,
        **config.launch_options(),
    )
    combine_splits(part_output, part_lse, output, mass, lse, problem)


def _backward_query(
    arguments: dict[str, Any],
    query: Tensor,
    key: Tensor,
    problem: AttentionProblem,
    mass: Tensor,
    row_terms: Tensor,
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:
    """The backward for query, log_prior and gate; under the per-modality softmax first for the shift that ``row_terms``
    lacks.
    """
    total_q, num_heads, head_dim = query.shape
    arch = device_arch(query.device)
    config = _attention_backward_query_config(
        head_dim, query.dtype, arch, total_q // max(problem.batch, 1), dropout=problem.seed is not None
    )
    splits = _splits(query, key, problem, config)
    spans = splits == 1 and _spans_segments(key, problem) and key.shape[0] <= MAX_COLUMNS
    if spans:
        config = _attention_spans_config(
            "query", head_dim, query.dtype, arch, problem.num_modalities, visible=problem.visible is not None
        )
    programs = _query_programs(problem, config, num_heads)
    for delta_only in (True, False) if problem.softmax == "per_modality" else (False,):
        sums = (row_terms[1],) if delta_only else gradients
        parts = sums if splits == 1 else tuple(x if x is None else mass.new_zeros((splits, *x.shape)) for x in sums)
        grad_query, grad_log_prior, grad_gate = (None, None, None) if delta_only else parts
        query_arguments = {
            **arguments,
            "grad_query_ptr": grad_query,
            "grad_log_prior_ptr": grad_log_prior,
            "grad_gate_ptr": grad_gate,
            "mass_ptr": mass,
            "shift_ptr": parts[0] if delta_only else None,
            "query_tiles_ptr": problem.query_tiles,
            "num_heads": num_heads,
            "DELTA_ONLY": delta_only,
        }
        if spans:
            _attention_backward_query_spans_kernel[(programs,)](
                **query_arguments, ONE_HOT=one_hot_dtype(query), **config.launch_options()
            )
        else:
            _attention_backward_query_kernel[(programs, splits)](
                **query_arguments,
                grad_output_stride_m=modality_stride(arguments["grad_output_ptr"]),
                split_rows=None if splits == 1 else total_q * num_heads,
                IS_PARTIALS=problem.softmax == "partials",
                **config.launch_options(),
            )
        if splits > 1:
            for total, part in zip(sums, parts, strict=True):
                if total is not None and part is not None:
                    total.copy_(part.sum(0))


def _backward_key_value(
    arguments: dict[str, Any], key: Tensor, problem: AttentionProblem, grad_key: Tensor, grad_value: Tensor
) -> None:
    """The backward for key and value."""
    total_k, num_key_heads, head_dim = key.shape
    spans = _spans_segments(key, problem)
    config = _attention_backward_key_value_config(
        head_dim,
        key.dtype,
        device_arch(key.device),
        total_k // max(problem.batch if spans else problem.batch * problem.num_modalities, 1),
        spans=spans,
        visible=problem.visible is not None,
        dropout=problem.seed is not None,
    )
    block_k = config.blocks["BLOCK_K"]
    key_arguments = {
        **arguments,
        "grad_key_ptr": grad_key,
        "grad_value_ptr": grad_value,
        "cu_seqlens_k_ptr": problem.cu_seqlens_k,
        "num_key_heads": num_key_heads,
        "HAS_GATE": problem.gate is not None,
    }
    options = config.launch_options()
    if spans:
        tiles = total_k // block_k + problem.batch
        _attention_backward_key_value_spans_kernel[(tiles * num_key_heads,)](
            **key_arguments, batch=problem.batch, **options
        )
    else:
        tiles = problem.key_tiles.shape[0] * (TILE.value // block_k)
        _attention_backward_key_value_kernel[(tiles * num_key_heads,)](
            **key_arguments,
            key_tiles_ptr=problem.key_tiles,
            grad_output_stride_m=modality_stride(arguments["grad_output_ptr"]),
            **options,
        )


def _forward_arguments(
    query: Tensor, key: Tensor, value: Tensor, problem: AttentionProblem, output: Tensor, mass: Tensor, lse: Tensor
) -> dict[str, Any]:
    """What both forward kernels take."""
    num_heads = query.shape[1]
    return {
        **_shared_arguments(query, key, value, problem.key_ranges(num_heads), problem),
        "output_ptr": output,
        "mass_ptr": mass,
        "lse_ptr": lse,
        "query_tiles_ptr": problem.query_tiles,
        "log_prior_ptr": problem.log_prior,
        "gate_ptr": problem.gate,
        "output_gate_ptr": problem.output_gate,
        **strides_of(problem.log_prior, "log_prior", "qhm"),
        **strides_of(problem.gate, "gate", "qhm"),
        **strides_of(problem.output_gate, "output_gate", "qh"),
        "num_heads": num_heads,
    }


def _shared_arguments(
    query: Tensor, key: Tensor, value: Tensor, key_ranges: Tensor, problem: AttentionProblem
) -> dict[str, Any]:
    """What all kernels take that multiply queries and keys."""
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "cu_seqlens_q_ptr": problem.cu_seqlens_q,
        "key_ranges_ptr": key_ranges,
        "visible_ptr": problem.visible,
        "seed_ptr": problem.seed,
        "scale": problem.scale,
        "dropout_p": problem.dropout_p,
        **strides_of(query, "query", "qh"),
        **strides_of(key, "key", "kh"),
        **strides_of(value, "value", "kh"),
        **strides_of(key_ranges, "key_ranges", "bhm"),
        "group_size": query.shape[1] // key.shape[1],
        "num_modalities": problem.num_modalities,
        "HEAD_DIM": query.shape[2],
        "PRECISION": input_precision(query.dtype),
    }


def _spans_segments(key: Tensor, problem: AttentionProblem) -> bool:
    segments = problem.batch * problem.num_modalities
    return spans_segments(problem.softmax, problem.num_modalities, key.shape[0] // max(segments, 1))


def _splits(query: Tensor, key: Tensor, problem: AttentionProblem, config: LaunchConfig, *, results: int = 1) -> int:
    """Parts of the keys: `key_splits` of a problem on its GPU."""
    total_q, num_heads, _ = query.shape
    sizes = total_q, key.shape[0], problem.batch, num_heads, config.blocks["BLOCK_Q"]
    return key_splits(*sizes, multiprocessors(query.device), results=results)


def _query_programs(problem: AttentionProblem, config: LaunchConfig, num_heads: int) -> int:
    """Programs of a pass in which each owns BLOCK_Q queries of a head."""
    tiles: int = problem.query_tiles.shape[0] * (TILE.value // config.blocks["BLOCK_Q"])
    return tiles * num_heads
