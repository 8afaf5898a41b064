"""Attention on Hopper: the launchers of `fusedmm.kernels.attention.launch` over the warp-specialised passes.

What they do not support is decided beforehand by `config.hopper_reasons`; the first pass of the backward, which is
bound by memory, is the portable one."""

import torch
from torch import Tensor

from fusedmm.kernels.attention.arguments import AttentionProblem, unit_last_stride
from fusedmm.kernels.attention.backward_rows import attention_backward_rows
from fusedmm.kernels.attention.hopper.faint import resum_faint
from fusedmm.kernels.attention.hopper.passes import forward_launch, key_value_launch, query_launch
from fusedmm.kernels.launch import multiprocessors


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, problem: AttentionProblem
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward: `fusedmm.kernels.attention.launch.attention_forward` with neither query nor key empty."""
    assert problem.seed is None
    query, problem = problem.with_positive_scale(query)
    output, mass, lse = problem.empty_results(query)
    programs = multiprocessors(query.device)
    forward_launch(query, key, value, output, mass, lse, problem, programs=programs).run()
    if problem.softmax == "joint" and problem.num_modalities > 1:
        resum_faint(unit_last_stride(query), unit_last_stride(key), mass, lse, problem)
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
    """Launch the backward: `fusedmm.kernels.attention.launch.attention_backward` with neither query nor key empty."""
    assert problem.seed is None
    row_terms, grad_gated, grad_output_gate = attention_backward_rows(
        unit_last_stride(grad_output),
        grad_mass,
        grad_lse,
        output,
        mass,
        lse,
        problem.key_ranges(query.shape[1]),
        problem,
    )
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    grad_log_prior = torch.empty_like(mass) if needs_log_prior else None
    grad_gate = torch.empty_like(mass) if needs_gate else None
    inputs = grad_gated, query, key, value
    for delta_only in (True, False) if problem.softmax == "per_modality" else (False,):
        gradients = grad_query, grad_log_prior, grad_gate
        query_launch(*inputs, *gradients, mass, row_terms, problem, delta_only=delta_only).run()
    key_value_launch(*inputs, grad_key, grad_value, row_terms, problem).run()
    return grad_query, grad_key, grad_value, grad_log_prior, grad_gate, grad_output_gate
