"""Attention on Hopper: the launchers of the portable kernels with their signatures, over the warp-specialised passes.

What they do not support is decided beforehand by `config.hopper_reasons`; the first pass of the backward, which is
bound by memory, is the portable one."""

import torch
from torch import Tensor

from fusedmm.kernels.attention.arguments import SoftmaxKind, find_key_ranges, unit_last_stride
from fusedmm.kernels.attention.backward_rows import attention_backward_rows
from fusedmm.kernels.attention.hopper.faint import resum_faint
from fusedmm.kernels.attention.hopper.passes import forward_launch, key_value_launch, query_launch
from fusedmm.kernels.launch import multiprocessors


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    log_prior: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    active: Tensor | None,
    visible: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    softmax: SoftmaxKind,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward: `fusedmm.kernels.attention.forward.attention_forward` with neither query nor key empty."""
    assert seed is None
    total_q, num_heads, head_dim = query.shape
    num_modalities = (cu_seqlens_k.numel() - 1) // (cu_seqlens_q.numel() - 1)
    # The kernel takes the maximum of the scores before it scales them, so the sign goes into the query; exact, as is 0.
    if scale <= 0.0:
        query, scale = (query * 0.0, 1.0) if scale == 0.0 else (-query, -scale)
    mass = query.new_empty((total_q, num_heads, num_modalities), dtype=torch.float32)
    lse = torch.empty_like(mass)
    output = query.new_empty(
        (total_q, num_heads, num_modalities, head_dim) if softmax == "partials" else (total_q, num_heads, head_dim)
    )
    forward_launch(
        query,
        key,
        value,
        output,
        mass,
        lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        query_tiles=query_tiles,
        log_prior=log_prior,
        gate=gate,
        output_gate=output_gate,
        active=active,
        visible=visible,
        softmax=softmax,
        scale=scale,
        programs=multiprocessors(query.device),
    ).run()
    if softmax == "joint" and num_modalities > 1:
        resum_faint(
            unit_last_stride(query),
            unit_last_stride(key),
            mass,
            lse,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            query_tiles=query_tiles,
            log_prior=log_prior,
            active=active,
            visible=visible,
            scale=scale,
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
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    log_prior: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    active: Tensor | None,
    visible: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    softmax: SoftmaxKind,
    scale: float,
    needs_log_prior: bool,
    needs_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward: `fusedmm.kernels.attention.backward.attention_backward` with neither query nor key empty."""
    assert seed is None
    grad_output = unit_last_stride(grad_output)
    _, num_heads, num_modalities = mass.shape
    row_terms, grad_gated, grad_output_gate = attention_backward_rows(
        grad_output,
        grad_mass,
        grad_lse,
        output,
        mass,
        lse,
        cu_seqlens_q=cu_seqlens_q,
        key_ranges=find_key_ranges(cu_seqlens_k, active, cu_seqlens_q.numel() - 1, num_heads, num_modalities),
        query_tiles=query_tiles,
        log_prior=log_prior,
        gate=gate,
        output_gate=output_gate,
        visible=visible,
        softmax=softmax,
    )
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    grad_log_prior = torch.empty_like(mass) if needs_log_prior else None
    grad_gate = torch.empty_like(mass) if needs_gate else None
    for delta_only in (True, False) if softmax == "per_modality" else (False,):
        query_launch(
            grad_gated,
            query,
            key,
            value,
            grad_query,
            grad_log_prior,
            grad_gate,
            mass,
            row_terms,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            query_tiles=query_tiles,
            active=active,
            visible=visible,
            scale=scale,
            delta_only=delta_only,
        ).run()
    key_value_launch(
        grad_gated,
        query,
        key,
        value,
        grad_key,
        grad_value,
        row_terms,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        key_tiles=key_tiles,
        active=active,
        visible=visible,
        scale=scale,
        has_gate=gate is not None,
    ).run()
    return grad_query, grad_key, grad_value, grad_log_prior, grad_gate, grad_output_gate
