"""The registered operators behind gated_multimodal_attention and modality_partials.

``fusedmm::attention_forward`` and ``fusedmm::attention_backward``: one schema serves every softmax and both
implementations. `impl` ("triton" or "eager") is an argument, so that a call means the same on every device. Registered
with fakes for `torch.compile` and export, and with a hand-written autograd function that is bypassed where nothing
needs a gradient. The dispatcher is left out where nobody is watching (`fusedmm.ops.dispatch`): 64 queries and their
gradients, called again and again, then take a third less on one thread of an AMD EPYC; small problems also keep more
then. The transforms of `torch.func` take the operators by way of `fusedmm.ops.attention_transforms`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from fusedmm.eager import attention as eager
from fusedmm.eager import attention_small as eager_small
from fusedmm.eager.attention_inputs import Inputs
from fusedmm.eager.attention_small import Kept
from fusedmm.eager.products import compute_dtype
from fusedmm.ops import attention_transforms as transforms
from fusedmm.ops.autocast import without_autocast
from fusedmm.ops.dispatch import apply_unwatched, is_batched, is_transformed, is_watched
from fusedmm.ops.first_order import first_order

if TYPE_CHECKING:
    from fusedmm.kernels.attention.arguments import AttentionProblem

Outputs = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_library = library.Library("fusedmm", "DEF")
_PROBLEM = (
    "Tensor? log_prior, Tensor? gate, Tensor? output_gate, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor query_tiles, Tensor key_tiles, Tensor? active, Tensor? visible, Tensor? seed, "
    "int num_modalities, float dropout_p, float scale, str softmax, str impl"
)
_library.define(f"attention_forward(Tensor query, Tensor key, Tensor value, {_PROBLEM}) -> (Tensor, Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad_output, Tensor? grad_mass, Tensor? grad_lse, Tensor output, Tensor mass, "
    "Tensor lse, bool needs_log_prior, bool needs_gate, Tensor query, Tensor key, Tensor value, "
    f"{_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attention(x: Inputs, *, is_unwatched: bool = False) -> Outputs:
    """Call ``fusedmm::attention_forward``: output, mass and lse. ``is_unwatched``: the caller knows that it is not."""
    if not is_unwatched and is_watched(x):
        if is_transformed() and not torch.compiler.is_compiling():
            return cast(Outputs, transforms.Attention.apply(*x))  # type: ignore[no-untyped-call]
        return cast(Outputs, torch.ops.fusedmm.attention_forward.default(*x))
    if _needs_gradient(x):
        return _differentiable(x, through_dispatcher=False)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_and_kept(x)[0]


def _alloc_forward(x: Inputs) -> Outputs:
    """Output, mass and lse, unwritten; the kernels' and the fake's shapes and strides are these."""
    total_q, heads, dim = x.query.shape
    modalities = x.num_modalities
    shape = (total_q, heads, modalities, dim) if x.softmax == "partials" else (total_q, heads, dim)
    mass = x.query.new_empty((total_q, heads, modalities), dtype=compute_dtype(x.query))
    return x.query.new_empty(shape), mass, torch.empty_like(mass)


def _alloc_backward(x: Inputs, mass: Tensor, needs: tuple[bool, bool]) -> Gradients:
    """Gradients, unwritten; an empty tensor stands for one that nobody asked for."""
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in x[:3])
    grad_log_prior, grad_gate = (mass.new_empty(mass.shape if needed else (0,)) for needed in needs)
    grad_output_gate = x.query.new_empty((0,) if x.output_gate is None else x.output_gate.shape)
    return grad_query, grad_key, grad_value, grad_log_prior, grad_gate, grad_output_gate


def _for_kernels(x: Inputs) -> "AttentionProblem":
    """What the Triton launchers are given beside query, key and value."""
    from fusedmm.kernels.attention.arguments import AttentionProblem

    return AttentionProblem(**{name: getattr(x, name) for name in AttentionProblem._fields})


def _forward(*arguments: Any) -> Outputs:
    return _forward_and_kept(Inputs(*arguments))[0]


def _forward_and_kept(x: Inputs, *, keep: bool = False) -> tuple[Outputs, Kept | None]:
    """And, to ``keep``, what of a small problem the eager backward need not make again."""
    if x.impl == "eager":
        with without_autocast(x.query):
            return eager.forward(x, keep=keep)
    from fusedmm.kernels.attention.select import launchers

    given = _for_kernels(x)
    with torch.cuda.device_of(x.query):
        kernels = launchers("forward", x.query, x.key, given)
        return cast(Outputs, kernels.attention_forward(*x[:3], given)), None


def _backward(
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    needs_log_prior: bool,
    needs_gate: bool,
    *arguments: Any,
) -> Gradients:
    """Gradients, those of small problems views of what lies heads first."""
    x = Inputs(*arguments)
    results = output, mass, lse
    if x.impl == "triton":
        from fusedmm.kernels.attention.select import launchers

        given = _for_kernels(x)
        with torch.cuda.device_of(x.query):
            gradients = launchers("backward", x.query, x.key, given).attention_backward(
                grad_output,
                grad_mass,
                grad_lse,
                *x[:3],
                *results,
                given,
                needs_log_prior=needs_log_prior,
                needs_gate=needs_gate,
            )
        return cast(Gradients, tuple(x.query.new_empty((0,)) if g is None else g for g in gradients))
    with without_autocast(x.query):
        return _eager_backward(x, grad_output, grad_mass, grad_lse, *results, (needs_log_prior, needs_gate))


def _contiguous_backward(*arguments: Any) -> Gradients:
    """Gradients with the strides that `_fake_backward` promises a compiler."""
    return cast(Gradients, tuple(gradient.contiguous() for gradient in _backward(*arguments)))


def _eager_backward(
    x: Inputs,
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    needs: tuple[bool, bool],
) -> Gradients:
    groups = x.groups()
    # Of what sees nothing the mass is 0 and lse -inf, from which a logarithm or a difference sends NaN.
    grad_mass, grad_lse = (
        None if g is None else g.masked_fill(torch.isneginf(lse), 0.0) for g in (grad_mass, grad_lse)
    )
    if x.output_gate is None and eager_small.fits(x, groups):
        kept = eager_small.made_again(x, groups[0], mass, lse)
        small = eager_small.backward(kept, x.scale, grad_output, grad_mass, mass)
        return *small[:3], *_wanted(small[3:], mass, needs), x.query.new_empty((0,))
    grad = grad_output.to(x.compute_dtype)
    inner = grad * output.to(grad.dtype)  # the sigmoid moves from one factor to the other: also the ungated product
    grad_output_gate = x.query.new_empty((0,))
    if x.output_gate is not None:
        opened = torch.sigmoid(x.output_gate.to(grad.dtype))
        grad_output_gate = (inner * (1 - opened)).to(x.query.dtype).contiguous()
        grad = grad * opened
    exact = eager.backward(x, grad, grad_mass, grad_lse, inner.sum(-1), mass, lse)
    grad_query, grad_key, grad_value = (gradient.to(x.query.dtype) for gradient in exact[:3])
    grad_log_prior, grad_gate = _wanted(exact[3:], mass, needs)
    return grad_query, grad_key, grad_value, grad_log_prior, grad_gate, grad_output_gate


def _wanted(gradients: Sequence[Tensor], mass: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    first, second = (g if needed else mass.new_empty((0,)) for g, needed in zip(gradients, needs, strict=True))
    return first, second


class _Attention(torch.autograd.Function):
    """Glue between the two operators: the six arguments that may have gradients, the others as one, and whether the
    operators must show in the dispatcher.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Outputs:
        *differentiable, ctx.others, through_dispatcher = arguments
        x, kept = Inputs(*differentiable, *ctx.others), None
        ctx.scale = x.scale
        with torch._C._AutoDispatchBelowAutograd():
            if through_dispatcher:
                output, mass, lse = torch.ops.fusedmm.attention_forward.default(*x)
            else:
                (output, mass, lse), kept = _forward_and_kept(x, keep=True)
        # active is saved for what saving notices: a change in place before the backward
        ctx.save_for_backward(*differentiable, output, mass, lse, x.active, *(kept or ()))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mass if x.softmax == "partials" else lse)
        return output, mass, lse

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_mass: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        (*differentiable, output, mass, lse, _), kept = saved[:10], saved[10:]
        needs = ctx.needs_input_grad[:6]
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        results = grad_output, grad_mass, grad_lse, output, mass, lse
        arguments = *results, needs[3], needs[4], *differentiable, *ctx.others
        with torch._C._AutoDispatchBelowAutograd():
            if is_watched(arguments) or is_batched(results[:3]):
                gradients = torch.ops.fusedmm.attention_backward.default(*arguments)
            elif kept:
                with without_autocast(output):
                    gradients = *eager_small.backward(Kept(*kept), ctx.scale, grad_output, grad_mass, mass), None
            else:
                gradients = _backward(*arguments)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None


def _needs_gradient(arguments: Sequence[Any]) -> bool:
    """Whether query, key, value, log_prior, gate or output_gate does, or may: the autograd function refuses forward
    mode, where its absence would lose tangents.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:6])


def _differentiable(arguments: Sequence[Any], *, through_dispatcher: bool) -> Outputs:
    given = *arguments[:6], arguments[6:], through_dispatcher
    if through_dispatcher:
        return cast(Outputs, _Attention.apply(*given))  # type: ignore[no-untyped-call]
    return cast(Outputs, apply_unwatched(_Attention, *given))


def _autograd_forward(*arguments: Any) -> Outputs:
    if _needs_gradient(arguments):
        return _differentiable(arguments, through_dispatcher=True)
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Outputs, torch.ops.fusedmm.attention_forward.default(*arguments))


def _fake_forward(*arguments: Any) -> Outputs:
    return _alloc_forward(Inputs(*arguments))


def _fake_backward(
    grad_output: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    mass: Tensor,
    lse: Tensor,
    needs_log_prior: bool,
    needs_gate: bool,
    *arguments: Any,
) -> Gradients:
    return _alloc_backward(Inputs(*arguments), mass, (needs_log_prior, needs_gate))


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _contiguous_backward, "CompositeExplicitAutograd")
_library.impl("attention_forward", _autograd_forward, "Autograd")
for _operator in (torch.ops.fusedmm.attention_forward, torch.ops.fusedmm.attention_backward):
    library.register_vmap(_operator.default, transforms.sequential_vmap(_operator.default), lib=_library)
library.register_fake("fusedmm::attention_forward", _fake_forward, lib=_library)
library.register_fake("fusedmm::attention_backward", _fake_backward, lib=_library)
