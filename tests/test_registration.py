"""The registered operators under PyTorch's own tools: opcheck, torch.compile, autocast, checkpointing."""

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedmm
from fusedmm.eager.attention_inputs import TENSORS, Inputs
from fusedmm.ops.attention import layout_arguments


def make_layout(*q_lengths: int, device: torch.device | str = "cpu") -> fusedmm.ModalityLayout:
    k_lengths = [[4, n % 5] for n in q_lengths]
    return fusedmm.ModalityLayout.from_lengths(
        torch.tensor(q_lengths, device=device), torch.tensor(k_lengths, device=device)
    )


def leaves(layout: fusedmm.ModalityLayout, **options) -> list[torch.Tensor]:
    device = layout.cu_seqlens_q.device
    shapes = [(layout.total_q, 4, 16), (layout.total_k, 2, 16), (layout.total_k, 2, 16), (layout.total_q, 4, 2)]
    return [torch.randn(shape, device=device, requires_grad=True, **options) for shape in shapes]


def loss(query, key, value, log_prior, layout, impl="auto") -> torch.Tensor:
    result = fusedmm.gated_multimodal_attention(query, key, value, layout, log_prior=log_prior, impl=impl)
    return result.output.square().sum() + result.mass[..., 0].sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of PyTorch 2.15's opcheck
@pytest.mark.parametrize("softmax", ["joint", "per_modality", "partials"])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck_of_both_operators(softmax: str, permuted: bool, device: torch.device) -> None:
    layout = make_layout(3, 0, 5, device=device)
    query, key, value, rows = leaves(layout)
    if permuted:  # the same values in another memory order
        query, key, value = (
            x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (query, key, value)
        )
    inputs = Inputs(
        query=query,
        key=key,
        value=value,
        log_prior=rows if softmax == "joint" else None,
        gate=None if softmax == "partials" else rows,
        output_gate=None,
        active=None,
        seed=None,
        dropout_p=0.0,
        scale=0.25,
        softmax=softmax,
        impl="triton" if device.type == "cuda" else "eager",
        **layout_arguments(layout, None),
    )
    library.opcheck(torch.ops.fusedmm.attention_forward, inputs)
    with torch.no_grad():
        outputs = torch.ops.fusedmm.attention_forward(*inputs)
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        backward = (torch.randn_like(outputs[0]), None, None, *outputs, softmax == "joint", softmax != "partials")
        library.opcheck(torch.ops.fusedmm.attention_backward, (*backward, *detached))


def test_the_problem_is_laid_out_as_the_schema_says() -> None:
    arguments = torch.ops.fusedmm.attention_forward.default._schema.arguments
    assert [argument.name for argument in arguments] == list(Inputs._fields)
    assert ["Tensor" in str(argument.type) for argument in arguments] == [i < TENSORS for i in range(len(arguments))]


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compiles_to_one_graph_with_equal_gradients(impl: str, device: torch.device) -> None:
    layout = make_layout(3, 0, 5, device=device)
    tensors = leaves(layout)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*tensors, layout, impl), loss(*tensors, layout, impl)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("timed", [False, True])
def test_new_lengths_and_times_do_not_recompile(timed: bool, device: torch.device) -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step, lengths in enumerate([(3, 0, 5), (7, 2, 5), (9, 9, 1), (11, 4, 6), (2, 30, 8)]):
        layout = make_layout(*lengths, device=device)
        if timed:
            times = (torch.arange(n, device=device) + step for n in (layout.total_q, layout.total_k))
            layout = layout.at_times(*times, 5 + step)
        with torch.no_grad():
            compiled(*leaves(layout), layout)
    assert counter.frame_count <= 2  # once for the first sizes, once for symbolic ones


def test_times_compile_to_one_graph(device: torch.device) -> None:
    layout = make_layout(3, 5, device=device)
    query, key, value, _ = (x.detach() for x in leaves(layout))
    times = torch.randint(0, 9, (layout.total_q,)).to(device), torch.randint(0, 9, (layout.total_k,)).to(device)

    def attend(query, key, value, layout, query_time, key_time):
        return fusedmm.gated_multimodal_attention(
            query, key, value, layout, query_time=query_time, key_time=key_time, lookback=4
        ).output

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    arguments = (query, key, value, layout, *times)
    torch.testing.assert_close(compiled(*arguments), attend(*arguments))


def test_opcheck_of_visible_ranges() -> None:
    layout = make_layout(3, 5)
    times = torch.arange(layout.total_q), torch.arange(layout.total_k)
    tables = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.query_tiles
    sizes = layout.num_modalities, layout.max_seqlen_k
    library.opcheck(torch.ops.fusedmm.visible_ranges, (*times, torch.tensor([2, 3]), *tables, *sizes))


def test_no_graph_where_nothing_needs_a_gradient() -> None:
    layout = make_layout(3)
    query, key, value, log_prior = (x.detach() for x in leaves(layout))
    assert fusedmm.gated_multimodal_attention(query, key, value, layout, log_prior=log_prior).output.grad_fn is None


def test_autocast_casts_activations_and_keeps_priors(device: torch.device) -> None:
    layout = make_layout(3, 5, device=device)
    query, key, value, log_prior = leaves(layout)
    with torch.autocast(device.type, torch.bfloat16):
        result = fusedmm.gated_multimodal_attention(
            query, key.bfloat16(), value, layout, log_prior=log_prior, impl="eager"
        )
    assert (result.output.dtype, result.mass.dtype) == (torch.bfloat16, torch.float32)
    gradient = torch.autograd.grad(result.output.float().sum(), [query, log_prior])
    assert [g.dtype for g in gradient] == [torch.float32, torch.float32]


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    layout = make_layout(3, 5)
    tensors = leaves(layout)
    plain = torch.autograd.grad(loss(*tensors, layout), tensors)
    again = torch.autograd.grad(checkpoint(loss, *tensors, layout, use_reentrant=False), tensors)
    for ours, theirs in zip(again, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_second_derivatives_are_refused() -> None:
    layout = make_layout(3)
    tensors = leaves(layout)
    (gradient,) = torch.autograd.grad(loss(*tensors, layout), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first_order"):
        gradient.sum().backward()


def test_a_penalty_on_the_gradient_of_a_plain_sum_is_refused() -> None:
    """Whose upstream gradient requires none: it would count as a constant beside another loss."""
    layout = make_layout(3)
    tensors = leaves(layout)
    head = fusedmm.LinearHead(tensors[0][:, 0], tensors[1][:, 0])
    teacher = fusedmm.Logits(torch.zeros(head.hidden.shape[0], head.weight.shape[0]))
    losses = [
        fusedmm.gated_multimodal_attention(*tensors[:3], layout).output.sum(),
        *(fusedmm.distillation_loss(head, teacher, memory=memory, impl="eager") for memory in ("fast", "lean")),
    ]
    for plain in losses:
        (gradient,) = torch.autograd.grad(plain, tensors[0], create_graph=True)
        penalised = tensors[0].square().sum() + gradient.square().sum()
        with pytest.raises(RuntimeError, match="first_order"):  # towards an input alone, other paths would pass for all
            torch.autograd.grad(penalised, tensors[0], retain_graph=True)
        with pytest.raises(RuntimeError, match="first_order"):
            penalised.backward()


def test_saved_for_backward_is_linear_in_tokens() -> None:
    """Inputs, output, mass and lse are kept; never a [query, key] matrix."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([300]), torch.tensor([[400, 300]]))
    tensors = leaves(layout)
    largest = 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fusedmm.gated_multimodal_attention(*tensors[:3], layout, log_prior=tensors[3])
    assert largest <= max(t.numel() for t in tensors)


def test_operators_show_where_someone_watches() -> None:
    """Plain calls go to the kernels; modes, and so checkpointing's policies and counters, still see the operators."""
    layout = make_layout(3, 5)
    tensors = leaves(layout)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    expected = torch.autograd.grad(loss(*tensors, layout), tensors)
    with Watch():
        got = torch.autograd.grad(loss(*tensors, layout), tensors)
    assert {"fusedmm::attention_forward", "fusedmm::attention_backward"} <= set(seen)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_transforms_of_torch_func_give_the_same_gradients() -> None:
    layout = make_layout(3, 0, 5)
    tensors = leaves(layout)
    wanted = torch.autograd.grad(loss(*tensors, layout), tensors)
    plain = [x.detach() for x in tensors]
    everything = tuple(range(4))
    torch.testing.assert_close(torch.func.grad(loss, everything)(*plain, layout), wanted)
    stacked = [torch.stack((x, 2 * x)) for x in plain]
    found = torch.func.vmap(torch.func.grad(loss, everything), in_dims=(0, 0, 0, 0, None))(*stacked, layout)
    for example in range(2):
        alone = torch.func.grad(loss, everything)(*(x[example] for x in stacked), layout)
        torch.testing.assert_close([x[example] for x in found], list(alone))

    def of_partials(query: torch.Tensor) -> torch.Tensor:
        partials = fusedmm.modality_partials(query, *plain[1:3], layout)
        return partials.output.square().sum() + partials.lse[partials.lse.isfinite()].sum()

    (expected,) = torch.autograd.grad(of_partials(tensors[0]), tensors[0])
    torch.testing.assert_close(torch.func.grad(of_partials)(plain[0]), expected)
    with pytest.raises(RuntimeError, match="second derivatives of fusedmm's operators are not there"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, *plain[1:], layout).sum())(plain[0])


def test_what_has_left_a_transform_is_a_tensor_like_any() -> None:
    layout = make_layout(3, 5)
    query, *others = leaves(layout)
    kept = []
    torch.func.grad(lambda x: kept.append(2 * x) or x.sum())(query.detach())
    for escaped in kept:
        results = fusedmm.gated_multimodal_attention(escaped, *others[:2], layout)
        expected = fusedmm.gated_multimodal_attention(2 * query.detach(), *others[:2], layout)
        found, wanted = (torch.autograd.grad(x.output.sum(), others[:2]) for x in (results, expected))
        assert all(map(torch.equal, found, wanted))


def test_gradients_of_many_upstreams_at_once_are_those_of_each() -> None:
    layout = make_layout(3, 5)
    query, key, value, prior = leaves(layout)
    small = fusedmm.ModalityLayout.from_lengths(*(torch.full(shape, 2) for shape in ((2,), (2, 2))))
    few = [torch.randn(count, 2, 16, requires_grad=True) for count in (4, 8, 8)]
    student = fusedmm.LinearHead(query[:, 0], key[:, 0])
    teacher = fusedmm.Logits(torch.zeros(layout.total_q, layout.total_k))
    attended = fusedmm.gated_multimodal_attention(query, key, value, layout, log_prior=prior, output_gate=query)
    for results, inputs in (
        (attended[:2], (query, key, value, prior)),
        (attended[1:2], (query, key, prior)),
        (fusedmm.gated_multimodal_attention(*few, small)[:1], few),  # keeps what its backward needs
        (fusedmm.modality_partials(query, key, value, layout)[:1], (query, key, value)),
        ([fusedmm.distillation_loss(student, teacher, memory="fast")], (query, key)),
        ([fusedmm.distillation_loss(student, teacher, memory="lean")], (query, key)),
    ):
        upstream = [torch.randn(2, *result.shape) for result in results]
        found = torch.autograd.grad(results, inputs, upstream, is_grads_batched=True, retain_graph=True)
        for number, each in enumerate(zip(*upstream, strict=True)):
            alone = torch.autograd.grad(results, inputs, each, retain_graph=True)
            torch.testing.assert_close([gradients[number] for gradients in found], list(alone))


def test_a_transform_is_traced_with_symbolic_sizes() -> None:
    """Its tensors are plain ones whose sizes have no hash."""
    layout = make_layout(3, 5)
    query, *others = (x.detach() for x in leaves(layout))

    def gradient(query: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(loss)(query, *others, layout)

    traced = make_fx(gradient, tracing_mode="symbolic", _allow_non_fake_inputs=True)(query)
    torch.testing.assert_close(traced(query), gradient(query))


def test_second_derivatives_towards_an_input_are_refused_beside_other_paths() -> None:
    """The gate leads to the query around the operator: what it gives alone would pass for the whole."""
    layout = make_layout(3, 4)
    query, key, value, _ = leaves(layout)
    gate = torch.sigmoid(query[..., :2])
    output = fusedmm.gated_multimodal_attention(query, key, value, layout, gate=gate).output
    (first,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives of fusedmm's operators are not there"):
        torch.autograd.grad(first.square().sum(), query)


def test_a_graph_of_the_gradient_under_checkpointing_unpacks_once() -> None:
    layout = make_layout(3, 4)
    tensors = leaves(layout)
    (expected,) = torch.autograd.grad(loss(*tensors, layout), tensors[0])
    value = checkpoint(loss, *tensors, layout, use_reentrant=False)
    (found,) = torch.autograd.grad(value, tensors[0], create_graph=True)
    torch.testing.assert_close(found, expected)
