"""The registered operators behind gated_multimodal_attention: ``fusedmm::attention_forward`` and ``fusedmm::attention_backward``.

One schema serves every softmax and both implementations; `impl` ("triton" or "eager") is an argument, so that a call means the same on every device. Registered with a fake for
`torch.compile` and export, and with a hand-written autograd function whose forward is skipped where nothing needs a gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedmm.eager import attention as eager

NAMESPACE = "fusedmm"
_library = torch.library.Library(NAMESPACE, "DEF")

_PROBLEM = (
    "Tensor? log_prior, Tensor? gate, Tensor? output_gate, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor query_tiles, Tensor key_tiles, "
    "Tensor? active, Tensor? visible, Tensor? seed, int num_modalities, float dropout_p, float scale, str softmax, str impl"
)
_library.define(f"attention_forward(Tensor query, Tensor key, Tensor value, {_PROBLEM}) -> (Tensor, Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad_output, Tensor? grad_mass, Tensor? grad_lse, Tensor output, Tensor mass, Tensor lse, bool needs_log_prior, bool needs_gate, "
    f"Tensor query, Tensor key, Tensor value, {_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``fusedmm::attention_forward``: output, mass and lse."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.fusedmm.attention_forward(*arguments)
    return result


def _alloc_forward(query: Tensor, num_modalities: int, softmax: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mass and lse, unwritten: the kernel and the fake share it, so that their strides agree."""
    total_q, heads, dim = query.shape
    shape = (total_q, heads, num_modalities, dim) if softmax == "partials" else (total_q, heads, dim)
    mass = query.new_empty((total_q, heads, num_modalities), dtype=_statistics_dtype(query))
    return query.new_empty(shape), mass, torch.empty_like(mass)


def _alloc_backward(
    query: Tensor, key: Tensor, value: Tensor, mass: Tensor, output_gate: Tensor | None, needs_log_prior: bool, needs_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients, unwritten; an empty tensor stands for one that nobody asked for."""
    packed = [t.new_empty(t.shape) for t in (query, key, value)]
    rows = [mass.new_empty(mass.shape if needed else (0,)) for needed in (needs_log_prior, needs_gate)]
    return packed[0], packed[1], packed[2], rows[0], rows[1], query.new_empty((0,) if output_gate is None else output_gate.shape)


def _statistics_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_prior: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    active: Tensor | None,
    visible: Tensor | None,
    seed: Tensor | None,
    num_modalities: int,
    dropout_p: float,
    scale: float,
    softmax: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from fusedmm.kernels.attention.forward import attention_forward

        result: tuple[Tensor, Tensor, Tensor] = attention_forward(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            query_tiles=query_tiles,
            key_tiles=key_tiles,
            log_prior=log_prior,
            gate=gate,
            output_gate=output_gate,
            active=active,
            visible=visible,
            seed=seed,
            dropout_p=dropout_p,
            softmax=softmax,
            scale=scale,
        )
        return result
    inputs = eager.Inputs(query, key, value, cu_seqlens_q, cu_seqlens_k, num_modalities, log_prior, gate, active, visible, seed, dropout_p, scale)
    exact, exact_mass, exact_lse = eager.forward(inputs, softmax)
    if output_gate is not None:
        exact = exact * torch.sigmoid(output_gate.to(exact.dtype))
    output, mass, lse = _alloc_forward(query, num_modalities, softmax)
    return output.copy_(exact), mass.copy_(exact_mass), lse.copy_(exact_lse)


def _backward(
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    needs_log_prior: bool,
    needs_gate: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_prior: Tensor | None,
    gate: Tensor | None,
    output_gate: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    active: Tensor | None,
    visible: Tensor | None,
    seed: Tensor | None,
    num_modalities: int,
    dropout_p: float,
    scale: float,
    softmax: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "triton":
        from fusedmm.kernels.attention.backward import attention_backward

        gradients = attention_backward(
            grad_output,
            grad_mass,
            grad_lse,
            query,
            key,
            value,
            output,
            mass,
            lse,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            query_tiles=query_tiles,
            key_tiles=key_tiles,
            log_prior=log_prior,
            gate=gate,
            output_gate=output_gate,
            active=active,
            visible=visible,
            seed=seed,
            dropout_p=dropout_p,
            softmax=softmax,
            scale=scale,
            needs_log_prior=needs_log_prior,
            needs_gate=needs_gate,
        )
        grad_query, grad_key, grad_value, grad_log_prior, grad_gate, grad_output_gate = (g if g is not None else query.new_empty((0,)) for g in gradients)
        return grad_query, grad_key, grad_value, grad_log_prior.to(mass.dtype), grad_gate.to(mass.dtype), grad_output_gate
    inputs = eager.Inputs(query, key, value, cu_seqlens_q, cu_seqlens_k, num_modalities, log_prior, gate, active, visible, seed, dropout_p, scale)
    grad = grad_output.to(inputs.compute_dtype)
    inner = grad * output.to(grad.dtype)  # also that of the ungated pair: sigmoid moves from one side to the other
    buffers = _alloc_backward(query, key, value, mass, output_gate, needs_log_prior, needs_gate)
    if output_gate is not None:
        opened = torch.sigmoid(output_gate.to(grad.dtype))
        buffers[5].copy_(inner * (1 - opened))
        grad = grad * opened
    exact = eager.backward(inputs, softmax, grad, grad_mass, grad_lse, inner.sum(-1), mass, lse)
    for buffer, gradient in zip(buffers[:5], exact, strict=True):
        if buffer.shape == gradient.shape:
            buffer.copy_(gradient)
    return buffers


class _Attention(torch.autograd.Function):
    """Glue between the two operators; tensors that have no gradient pass through."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        with torch._C._AutoDispatchBelowAutograd():
            output, mass, lse = attention(query, key, value, *problem)
        tensors = [query, key, value, output, mass, lse, *(t for t in problem if isinstance(t, Tensor))]
        ctx.save_for_backward(*tensors)
        ctx.given = [isinstance(argument, Tensor) for argument in problem]
        ctx.constants = [argument for argument in problem if not isinstance(argument, Tensor)]
        ctx.set_materialize_grads(False)
        softmax = problem[-2]
        if softmax != "partials":
            ctx.mark_non_differentiable(lse)
        else:
            ctx.mark_non_differentiable(mass)
        return output, mass, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: Tensor | None, grad_mass: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, mass, lse, *tensors = ctx.saved_tensors
        remaining, constants = iter(tensors), iter(ctx.constants)
        problem = [next(remaining) if given else next(constants) for given in ctx.given]
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        needs = ctx.needs_input_grad
        gradients = torch.ops.fusedmm.attention_backward(
            grad_output, grad_mass, grad_lse, output, mass, lse, needs[3], needs[4], query, key, value, *problem
        )
        return (*(g if needed else None for g, needed in zip(gradients, needs[:6], strict=True)), *([None] * (len(problem) - 3)))


def _autograd_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments[:6]):
        return _Attention.apply(*arguments)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return attention(*arguments)


def _fake_forward(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_modalities, softmax = arguments[-5], arguments[-2]
    return _alloc_forward(query, num_modalities, softmax)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mass, needs_log_prior, needs_gate, query, key, value, output_gate = (arguments[i] for i in (4, 6, 7, 8, 9, 10, 13))
    return _alloc_backward(query, key, value, mass, output_gate, needs_log_prior, needs_gate)


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attention_forward", _autograd_forward, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::attention_forward", _fake_forward, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::attention_backward", _fake_backward, lib=_library)
