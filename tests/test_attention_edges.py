"""Eager attention at the edges of what it may assume: numbers that are nearly too large, NaN beside them, what a user
changes between forward and backward, and autograd's less common modes.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

import fusedmm
from fusedmm.testing import (
    AttentionExample,
    attention_example,
    attention_truth,
    check_attention,
    over_budget,
    plain_attention,
    run_attention,
)

LENGTHS = {
    "one block": ([7] * 3, [[9, 9]] * 3),
    "a large sample": ([40], [[30, 50]]),
    "ragged": ([8, 3, 5], [[6, 2], [0, 7], [9, 0]]),
}


def attend(*args, **kwargs):
    return fusedmm.gated_multimodal_attention(*args, impl="eager", **kwargs)


def leaves(layout: fusedmm.ModalityLayout, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = layout.total_q, layout.total_k, layout.total_k
    return [torch.randn(count, 2, 16, generator=generator).requires_grad_() for count in counts]


def layout_of(shape: str) -> fusedmm.ModalityLayout:
    return fusedmm.ModalityLayout.from_lengths(*map(torch.tensor, LENGTHS[shape]))


@pytest.mark.parametrize("features", [(), ("log_prior",), ("gate",)])
@pytest.mark.parametrize("shape", LENGTHS)
def test_large_values_do_not_overflow_before_they_are_weighed(shape: str, features: tuple[str, ...]) -> None:
    """Exponentials without their peak are up to 2**60: times 1e30 they overflow where probabilities do not."""
    example = attention_example(3, *LENGTHS[shape], heads=2, kv_heads=2, features=features)
    sizes = {"query": 8.0, "value": 1e30}
    tensors = {name: x * sizes.get(name, 1.0) for name, x in example.tensors.items()}
    large: AttentionExample = dataclasses.replace(example, tensors=tensors)
    assert check_attention(large, attend) == []


def test_sharp_softmaxes_of_few_keys_keep_what_their_gradients_cancel_to() -> None:
    """The gradient of a score is P * (R - sum P R): next to nothing where one key has all, if that sum is of P that sum
    to 1, which exponentials relative to a rounded lse do not.
    """
    example = attention_example(11, [12, 5], [[2, 3], [2, 2]], kv_heads=2, softmax="per_modality", features=())
    tensors = {name: x * (30.0 if name == "query" else 1.0) for name, x in example.tensors.items()}
    sharp: AttentionExample = dataclasses.replace(example, tensors=tensors)
    results, truth, plain = run_attention(sharp, attend), attention_truth(sharp), plain_attention(sharp)
    names = "grad_query", "grad_key"
    assert over_budget(results, {name: truth[name] for name in names}, plain) == []


@pytest.mark.parametrize("features", [(), ("log_prior", "gate"), ("gate", "times")])
@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
@pytest.mark.parametrize("shape", LENGTHS)
def test_scores_of_thousands_cost_gradients_no_digits(shape: str, softmax: str, features: tuple[str, ...]) -> None:
    """Of float32, whose rounding of such an lse is a factor of 1e-4 on probabilities that are mostly 1 or 0."""
    for size in (100.0, 1e6):
        example = attention_example(5, *LENGTHS[shape], heads=2, kv_heads=2, softmax=softmax, features=features)
        tensors = {name: x * (size if name == "query" else 1.0) for name, x in example.tensors.items()}
        sharp = dataclasses.replace(example, tensors=tensors)
        results, truth = run_attention(sharp, attend), attention_truth(sharp)
        names = {"grad_value", "grad_gate"} & truth.keys()
        assert over_budget(results, {name: truth[name] for name in names}, plain_attention(sharp)) == []
        assert all((results[name] == 0).all() for name in ("grad_query", "grad_key")) == (size == 1e6)


@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
def test_a_single_key_has_the_gradient_of_the_output_exactly(softmax: str) -> None:
    """Its probability is 1, whatever the rounding of lse makes of it."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.ones(8, dtype=torch.long), torch.tensor([[1, 0]] * 8))
    query, key, value = leaves(layout)
    output = attend(query, 3 * key, value, layout, softmax=softmax).output
    upstream = torch.randn_like(output)
    assert torch.equal(torch.autograd.grad(output, value, upstream)[0], upstream)


def test_a_head_that_is_off_does_not_read_what_overflows() -> None:
    """A finite key may have an infinite score, beside which hiding it gives NaN."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([3]), torch.tensor([[4, 5]]))
    query = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    key, value = (torch.randn(9, 1, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    active = torch.tensor([[[True, False], [True, True]]])
    expected = attend(query, key, value, layout, active=active).output[:, 0]
    large = (torch.cat([x[:4], torch.full((5, 1, 16), 1e38)]) for x in (key, value))
    output = attend(query, *large, layout, active=active).output[:, 0]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), query)[0][:, 0] for x in (output, expected)))


@pytest.mark.parametrize("shape", LENGTHS)
def test_the_logarithm_of_no_mass_sends_nothing_back(shape: str) -> None:
    """Its gradient is inf, or NaN, where the mass is 0 because nothing is there: as for the kernels."""
    layout = layout_of(shape)
    query, key, value = leaves(layout)
    prior = torch.tensor([0.0, -torch.inf]) if shape != "ragged" else None
    mass = attend(query, key, value, layout, log_prior=prior).mass
    assert bool((mass == 0).any())
    losses = [mass.log().sum(), -(mass * mass.log()).nansum()]
    if shape == "ragged":
        losses.append(fusedmm.modality_partials(query, key, value, layout).lse.logsumexp(-1).sum())
    for loss in losses:
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (query, key), retain_graph=True))


def test_nan_in_one_row_does_not_hide_that_another_needs_its_peak() -> None:
    """A row of NaN that sees nothing of a modality is as good as blind: it must not make up for one that is too far."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([2]), torch.tensor([[6, 5]]))
    query, key, value = (x.detach() for x in leaves(layout))
    query[0] = torch.nan
    query[1, 0] *= 3000
    query[1, 1] = 0
    times = {"query_time": torch.tensor([0, 5]), "key_time": torch.tensor([0] * 6 + [3] * 5)}
    result = attend(query, key, value, layout, **times)
    expected = fusedmm.gated_multimodal_attention(query, key, value, layout, impl="reference", **times)
    torch.testing.assert_close(result.output[1], expected.output[1])


@pytest.mark.parametrize("shape", LENGTHS)
def test_a_backward_under_autocast_rounds_nothing(shape: str) -> None:
    layout = layout_of(shape)
    inputs = leaves(layout)
    expected = torch.autograd.grad(attend(*inputs, layout).output.square().sum(), inputs)
    loss = attend(*inputs, layout).output.square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, inputs)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["query", "key", "value", "log_prior", "gate", "output_gate", "active"])
def test_an_input_changed_in_place_before_the_backward_is_noticed(name: str) -> None:
    layout = layout_of("one block")
    query, key, value = leaves(layout)
    inputs = {
        "query": query * 1,
        "key": key * 1,
        "value": value * 1,
        "log_prior": torch.zeros(21, 2, 2),
        "gate": torch.ones(21, 2, 2),
        "output_gate": torch.ones(21, 2, 16),
        "active": torch.ones(3, 2, dtype=torch.bool),
    }
    loss = attend(layout=layout, **inputs).output.sum()
    with torch.no_grad():
        inputs[name][0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of PyTorch's own rules for forward mode
def test_forward_mode_is_refused_where_it_would_lose_tangents() -> None:
    layout = layout_of("one block")
    query, key, value = (x.detach() for x in leaves(layout))
    head = fusedmm.LinearHead(query[:, 0], key[:, 0])
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="jvp"):
            attend(dual, key, value, layout)
        for memory in ("fast", "lean"):
            with pytest.raises(NotImplementedError, match="jvp"):
                fusedmm.distillation_loss(fusedmm.LinearHead(dual[:, 0], key[:, 0]), head, memory=memory)
        assert attend(query, key, value, layout).output.shape == query.shape


def test_gradients_have_the_strides_that_their_fakes_promise() -> None:
    """Whatever those of the inputs and of the gradient from upstream."""
    layout = layout_of("ragged")
    inputs = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in leaves(layout)]
    opening = inputs[0].detach().requires_grad_()
    output = attend(*inputs, layout, output_gate=opening).output
    assert output.is_contiguous()
    gradients = torch.autograd.grad(output, [*inputs, opening], torch.ones_like(opening))
    assert all(gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
@pytest.mark.parametrize("hidden", ["time", "active"])
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_a_query_of_nan_that_sees_nothing_is_nothing(impl: str, hidden: str, softmax: str) -> None:
    """Nor do keys and values hear of it."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([2, 2]), torch.tensor([[3, 2]] * 2))
    query, key, value = leaves(layout)
    with torch.no_grad():
        query[0] = torch.nan
    options = {"active": torch.tensor([[False, True], [True, True]])[:, None].repeat(1, 2, 1)}
    if hidden == "time":
        options = {"query_time": torch.tensor([0, 5, 5, 5]), "key_time": torch.ones(10, dtype=torch.int64)}
    else:  # by head, and head 1 sees some
        options["active"][0, 0] = False
    results = fusedmm.gated_multimodal_attention(query, key, value, layout, softmax=softmax, impl=impl, **options)
    for result, nothing in zip(results, (0.0, 0.0, -torch.inf), strict=True):
        assert (result[0, 0] == nothing).all()
    if hidden == "time":
        gradients = torch.autograd.grad(results.output.sum() + (results.mass**2).sum(), (query, key, value))
        assert all(g.isfinite().all() for g in gradients)
        assert (gradients[0][0] == 0).all()
