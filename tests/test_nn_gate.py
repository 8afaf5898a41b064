"""ModalityGate alone: what it learns of importance, and when it switches a modality off."""

import copy

import pytest
import torch

import fusedmm
from fusedmm.nn import ModalityGate


def test_gate_learns_importance_and_switches_off() -> None:
    gate = ModalityGate(16, 2, 3, threshold=0.1, patience=3)
    query, scores = torch.randn(64, 16), torch.tensor([1.0, 0.3, 0.0]).expand(64, 3)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    assert gate.active(2).tolist() == [[True] * 3] * 2
    for _ in range(60):
        loss = gate.importance_loss(gate(query).log_prior, scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gate.update(scores)
    share = gate(query).log_prior.softmax(-1).mean((0, 1))
    torch.testing.assert_close(share, torch.tensor([0.77, 0.23, 0.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(gate.importance, scores[0])
    assert gate.active(2).tolist() == [[True, True, False]] * 2
    assert copy.deepcopy(gate).active(1).tolist() == [[True, True, False]]


def test_importance_survives_a_cast_and_extreme_scores() -> None:
    """The running mean stays float32 in a half-precision module, and shares of tiny scores are no 0 / 0."""
    gate = ModalityGate(16, 2, 3, threshold=0.1).bfloat16()
    assert gate(torch.randn(4, 16).bfloat16()).log_prior.dtype == torch.float32
    for step in range(1, 400):
        gate.update(torch.full((2, 3), step / 1000))
    weights = torch.tensor([max(1 / step, 0.01) for step in range(1, 400)], dtype=torch.float64)
    mean = torch.zeros((), dtype=torch.float64)
    for step, weight in enumerate(weights, 1):
        mean += weight * (step / 1000 - mean)
    torch.testing.assert_close(gate.importance, mean.float().expand(3), rtol=1e-4, atol=0)
    prior = torch.randn(5, 2, 3)
    for temperature in (0.1, 1.0, 10.0):
        loss = gate.importance_loss(prior, torch.zeros(5, 3), temperature)
        torch.testing.assert_close(loss, -prior.log_softmax(-1).mean(), msg=f"temperature {temperature}")
    scores = torch.tensor([[3e-6, 1e-6, 0.0]]).expand(5, 3)
    share = torch.tensor([0.75, 0.25, 0.0])
    expected = -(share * prior.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(gate.importance_loss(prior, scores), expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"ModalityGate: temperature must be positive, got 0"):
        gate.importance_loss(prior, scores, temperature=0)
    with pytest.raises(fusedmm.ShapeError, match=r"importance_loss: log_prior must have 3 dimensions"):
        gate.importance_loss(scores, scores)
    with pytest.raises(fusedmm.ShapeError, match=r"ModalityGate.update: .* Use scores\[query_mask\]"):
        gate.update(scores[None])


def test_one_goes_at_a_time_and_counts_start_anew() -> None:
    """Both copies of a signal are useless while the other is there; the one that is left is not."""
    gate = ModalityGate(16, 2, 3, threshold=0.1, patience=2, momentum=0.0)
    for _ in range(2):
        assert gate.active(1).tolist() == [[True, True, True]]
        gate.update(torch.tensor([[0.01, 0.0, 1.0]]))
    assert gate.active(1).tolist() == [[True, False, True]]
    for _ in range(5):
        gate.update(torch.tensor([[0.5, 0.0, 0.5]]))
    assert gate.active(1).tolist() == [[True, False, True]]
    gate.update(torch.tensor([[0.05, 5.0, 0.5]]))  # off is off, whatever its score
    gate.update(torch.tensor([[0.5, 5.0, 0.5]]))
    gate.update(torch.tensor([[0.05, 5.0, 0.5]]))
    assert gate.active(1).tolist() == [[True, False, True]]
    gate.update(torch.tensor([[0.05, 5.0, 0.5]]))
    assert gate.active(1).tolist() == [[False, False, True]]
