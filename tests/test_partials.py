"""modality_partials, merge_modalities and leave_one_out: one pass gives what many attentions would."""

import pytest
import torch

import fusedmm

IMPLEMENTATIONS = ("reference", "eager", "triton")
Q_LENGTHS, K_LENGTHS = [5, 0, 9], [[4, 0, 20], [3, 3, 3], [0, 0, 1]]


@pytest.fixture
def packed(device: torch.device):
    layout = fusedmm.ModalityLayout.from_lengths(
        torch.tensor(Q_LENGTHS, device=device), torch.tensor(K_LENGTHS, device=device)
    )
    query, key, value = (
        torch.randn(n, h, 16, device=device, requires_grad=True) for n, h in ((14, 4), (34, 2), (34, 2))
    )
    return query, key, value, layout


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
def test_merge_equals_attention_with_gradients(impl: str, softmax: str, packed) -> None:
    query, key, value, layout = packed
    log_prior = torch.randn(14, 4, 3, device=query.device, requires_grad=True) if softmax == "joint" else None
    gate = torch.randn(14, 4, 3, device=query.device, requires_grad=True)
    leaves = [t for t in (query, key, value, log_prior, gate) if t is not None]
    partials = fusedmm.modality_partials(query, key, value, layout, impl=impl)
    merged = fusedmm.merge_modalities(partials, log_prior, gate, softmax)
    whole = fusedmm.gated_multimodal_attention(
        query, key, value, layout, log_prior=log_prior, gate=gate, softmax=softmax, impl="reference"
    )
    up, up_mass = torch.randn_like(whole.output), torch.randn_like(whole.mass)
    for name, ours, theirs in zip(whole._fields, merged, whole, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    got = torch.autograd.grad((merged.output * up).sum() + (merged.mass * up_mass).sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad((whole.output * up).sum() + (whole.mass * up_mass).sum(), leaves, allow_unused=True)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_leave_one_out_equals_attention_without_the_modality(impl: str, packed) -> None:
    query, key, value, layout = packed
    log_prior = torch.randn(4, 3, device=query.device)
    left_out = fusedmm.leave_one_out(fusedmm.modality_partials(query, key, value, layout, impl=impl), log_prior)
    for modality in range(3):
        active = torch.ones(3, 3, dtype=torch.bool, device=query.device)
        active[:, modality] = False
        expected = fusedmm.gated_multimodal_attention(
            query, key, value, layout, log_prior=log_prior, active=active, impl="reference"
        ).output
        torch.testing.assert_close(left_out[:, :, modality], expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(torch.autograd.grad(left_out.square().sum(), query)[0]).all()
    assert (left_out[5:, :, 2] == 0).all()  # the third sample has tokens of modality 2 only


@pytest.mark.parametrize(("impl", "size"), [("eager", 1.0), ("eager", 300.0), ("triton", 1.0)])
def test_the_score_of_a_single_key_has_the_gradient_of_its_lse_alone(impl: str, size: float, packed) -> None:
    """A softmax over one key is constant: nothing of the output's gradient, not its rounding either."""
    query, key, value, layout = packed
    partials = fusedmm.modality_partials(size * query, key, value, layout, impl=impl)
    last = partials.output[5:, :, 2], partials.lse[5:, :, 2]  # the third sample has one key
    from_output = torch.autograd.grad(last[0], (query, key), torch.randn_like(last[0]), retain_graph=True)
    assert all((g == 0).all() for g in from_output)
    upstream = torch.randn_like(last[1])
    (grad_query,) = torch.autograd.grad(last, query, (torch.randn_like(last[0]), upstream))
    expected = (upstream[..., None] * key[-1].repeat_interleave(2, 0) * size / 4).detach()
    torch.testing.assert_close(grad_query[5:], expected, rtol=1e-6, atol=0.0)


def test_gradcheck() -> None:
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([3]), torch.tensor([[4, 2]]))
    tensors = [torch.randn(n, 2, 16, dtype=torch.float64, requires_grad=True) for n in (3, 6, 6)]

    def left_out(query, key, value):
        return fusedmm.leave_one_out(fusedmm.modality_partials(query, key, value, layout))

    assert torch.autograd.gradcheck(left_out, tensors)


def test_bad_input(packed) -> None:
    query, key, value, layout = packed
    partials = fusedmm.modality_partials(query, key, value, layout, impl="reference")
    with pytest.raises(fusedmm.ShapeError, match=r"merge_modalities: gate must broadcast from the right"):
        fusedmm.merge_modalities(partials, gate=torch.ones(2))
    with pytest.raises(ValueError, match=r"merge_modalities: log_prior must be None"):
        fusedmm.merge_modalities(partials, torch.zeros(3), softmax="per_modality")
    with pytest.raises(fusedmm.ShapeError, match=r"modality_partials: query has query=13"):
        fusedmm.modality_partials(query[1:], key, value, layout)
    with pytest.raises(TypeError, match=r"modality_partials: layout must be a ModalityLayout, got NoneType\. Build"):
        fusedmm.modality_partials(query, key, value, None)
    for op in (fusedmm.merge_modalities, fusedmm.leave_one_out):
        wanted = rf"^{op.__name__}: partials must be a ModalityPartials, got Tensor\. Pass what modality_partials"
        with pytest.raises(TypeError, match=wanted):
            op(partials.output)
        with pytest.raises(TypeError, match=rf"^{op.__name__}: gate must be a tensor, got list\. Use torch.as_tensor"):
            op(partials, gate=[1.0, 1.0, 1.0])
