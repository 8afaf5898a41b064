"""modality_scores: what leaving a modality out does to the answer."""

import pytest
import torch
from torch import nn

import fusedmm


@pytest.fixture
def packed():
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([6, 4]), torch.tensor([[5, 3, 2], [4, 0, 3]]))
    query, key, value = torch.randn(10, 2, 16), torch.randn(17, 2, 16), torch.randn(17, 2, 16)
    return query, key, value, layout


@pytest.mark.parametrize("linear", [True, False])
def test_equals_attention_without_the_modality(packed, linear) -> None:
    log_prior, gate = torch.randn(10, 2, 3), torch.rand(10, 2, 3)
    head = nn.Linear(32, 7) if linear else nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 7))
    scores = fusedmm.modality_scores(fusedmm.modality_partials(*packed), head, log_prior=log_prior, gate=gate)
    assert scores.shape == (10, 3)
    assert not scores.requires_grad

    def answer(**options) -> torch.Tensor:
        result = fusedmm.gated_multimodal_attention(*packed, log_prior=log_prior, gate=gate, **options)
        return torch.log_softmax(head(result.output.flatten(1)).double(), -1)

    full = answer()
    for modality in range(3):
        active = torch.ones(2, 3, dtype=torch.bool)
        active[:, modality] = False
        expected = (full.exp() * (full - answer(active=active))).sum(-1)
        torch.testing.assert_close(scores[:, modality].double(), expected, rtol=1e-4, atol=1e-6)
    assert (scores[6:, 1] == 0).all()  # the second sample has no token of that modality


@pytest.mark.parametrize("measure", ["kl", "squared_error"])
@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
def test_what_had_no_mass_scores_exactly_0(softmax: str, measure: str) -> None:
    """Two answers that are the same are rounded otherwise."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor([64]), torch.tensor([[0, 4, 1, 0, 4]]))
    partials = fusedmm.modality_partials(torch.randn(64, 2, 16), *torch.randn(2, 9, 2, 16), layout)
    head = nn.Linear(32, 40)
    nn.init.normal_(head.weight, std=3.0)
    scores = fusedmm.modality_scores(partials, head, gate=torch.randn(5), softmax=softmax, measure=measure)
    assert ((scores == 0).all(0) == torch.tensor([True, False, False, True, False])).all()


def test_squared_error_for_regression(packed) -> None:
    partials = fusedmm.modality_partials(*packed)
    head = nn.Linear(32, 1)
    scores = fusedmm.modality_scores(partials, head, measure="squared_error")
    full = head(fusedmm.merge_modalities(partials).output.flatten(1))
    without = head(fusedmm.leave_one_out(partials)[:, :, 0].flatten(1))
    torch.testing.assert_close(scores[:, 0], (full - without).square().squeeze(-1))


def test_bad_input(packed) -> None:
    partials = fusedmm.modality_partials(*packed)
    with pytest.raises(ValueError, match="measure must be one of 'kl', 'squared_error', got 'l1'"):
        fusedmm.modality_scores(partials, nn.Linear(32, 2), measure="l1")
    with pytest.raises(fusedmm.ShapeError, match="head must take the 32 features of the heads together, got 16"):
        fusedmm.modality_scores(partials, nn.Linear(16, 2))
    for head in (nn.Linear(32, 1), nn.Sequential(nn.Linear(32, 1))):  # its softmax never changes: every score were 0
        with pytest.raises(fusedmm.ShapeError, match=r'2 classes or more .* got 1, .* Use measure="squared_error"'):
            fusedmm.modality_scores(partials, head)
    for measure in ("kl", "squared_error"):
        with pytest.raises(fusedmm.ShapeError, match=r"the head's answer must have 2 dimensions \[row, class\], got"):
            fusedmm.modality_scores(partials, lambda x: x[:, None], measure=measure)
    with pytest.raises(TypeError, match=r"head must be an nn\.Linear or another callable, got NoneType"):
        fusedmm.modality_scores(partials, None)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        fusedmm.modality_scores(partials, nn.Linear(32, 2), temperature=0)
