"""Rows selected by score, and score logs, against plain definitions."""

import pytest
import torch
from torch import Tensor

from fusedmm.score_log import ScoreLog
from fusedmm.selection import select_rows


def by_sorting(score: Tensor, keep: float) -> Tensor:
    """The same selection from a stable sort."""
    order = torch.argsort(torch.where(score.isnan(), -torch.inf, score.double()), descending=True, stable=True)
    order = torch.cat([order[~score[order].isnan()], order[score[order].isnan()]])
    chosen = torch.zeros(score.shape[0], dtype=torch.bool)
    chosen[order[: int(keep * score.shape[0] + 0.5)]] = True
    return chosen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.5, 0.999, 1.0])
def test_selection_is_that_of_a_stable_sort(keep: float, dtype: torch.dtype) -> None:
    scores = [
        torch.randn(257).to(dtype),
        torch.randint(-2, 3, (257,)).to(dtype),  # ties
        torch.zeros(40, dtype=dtype),
        torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30, 3.0], dtype=dtype),
        torch.full((7,), torch.nan, dtype=dtype),
        torch.zeros(0, dtype=dtype),
    ]
    for score in scores:
        assert torch.equal(select_rows(score, keep), by_sorting(score, keep))


def test_selection_tells_float64_scores_apart_that_float32_does_not() -> None:
    score = 1 + torch.arange(9, dtype=torch.float64) * 1e-12
    assert select_rows(score, 1 / 3).tolist() == [False] * 6 + [True] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_is_below_even_minus_infinity(dtype: torch.dtype) -> None:
    score = torch.tensor([torch.nan, -torch.nan, 1.0, -torch.inf, torch.nan], dtype=dtype)
    assert select_rows(score, 0.4).tolist() == [False, False, True, True, False]
    assert select_rows(score, 0.6).tolist() == [True, False, True, True, False]


def test_selection_refuses_what_is_no_score() -> None:
    with pytest.raises(ValueError, match="select_rows: keep must be a fraction"):
        select_rows(torch.zeros(3), 5)
    with pytest.raises(TypeError, match="select_rows: score must be"):
        select_rows(torch.zeros(3, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match="select_rows: score must have 1 dimensions"):
        select_rows(torch.zeros(3, 1), 0.5)
    with pytest.raises(TypeError, match=r"score must be a tensor, got None\. A score that needs labels"):
        select_rows(None, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="select_rows: keep must be a number, got list"):
        select_rows(torch.zeros(3), [0.5])  # type: ignore[arg-type]


def test_score_log_counts_margins_and_forgetting() -> None:
    log, seen = ScoreLog(5), torch.tensor([0, 1, 2])
    for margins in ([1.0, -1.0, 2.0], [-3.0, 2.0, 4.0], [5.0, -1.0, 0.0]):
        log.update(seen, torch.tensor(margins))
    log.update(torch.tensor([3, 4]), torch.tensor([9.0, 9.0]), valid=torch.tensor([True, False]))
    statistics = log.statistics()
    assert statistics.aum.tolist() == [1.0, 0.0, 2.0, 9.0, 0.0]
    assert statistics.forgetting.tolist() == [1, 1, 1, 0, 0]
    assert statistics.learned.tolist() == [True, True, True, True, False]
    assert statistics.seen.tolist() == [3, 3, 3, 1, 0]


def test_score_log_has_bounded_memory_and_resumes() -> None:
    log = ScoreLog(50)
    size = sum(t.numel() * t.element_size() for t in log.state_dict().values())
    for _ in range(5):
        log.update(torch.randperm(50)[:20], torch.randn(20))
    assert sum(t.numel() * t.element_size() for t in log.state_dict().values()) == size == 14 * 50
    resumed = ScoreLog(50)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in log.state_dict().items()})
    index, margin = torch.arange(50), torch.randn(50)
    log.update(index, margin)
    resumed.update(index, margin)
    for a, b in zip(log.statistics(), resumed.statistics(), strict=True):
        assert torch.equal(a, b)
