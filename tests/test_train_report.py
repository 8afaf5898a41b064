"""What the report says of modalities: ranks, checks that can fail, losses, and checkpoints in the background."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fusedmm.train.checkpoint import Checkpoints
from fusedmm.train.config import DataConfig, Recipe
from fusedmm.train.importance import ModalityUse, checks_against_truth, rank_correlation
from fusedmm.train.linear import mean_vectors, residual_forecasts
from fusedmm.train.parallel import open_world
from fusedmm.train.task import load_task

NAMES = ("price", "text", "noise")


def use(group: str, importance: list[float], known: list[float] | None, mass: list[float]) -> ModalityUse:
    truth = None if known is None else np.array(known)
    return ModalityUse(group, 100, NAMES, np.array(mass), np.array(importance), truth)


def uses(calm_mass: float = 0.6) -> list[ModalityUse]:
    """A model that is right about two regimes."""
    calm = use("calm", [0.8, 0.1, 0.0], [0.9, 0.1, 0.0], [calm_mass, 0.4 - calm_mass / 2, 0.4 - calm_mass / 2])
    news = use("news", [0.1, 0.7, 0.001], [0.2, 0.8, 0.0], [0.3, 0.6, 0.1])
    everything = use("all", [0.45, 0.4, 0.001], [0.55, 0.45, 0.0], [0.45, 0.4, 0.15])
    return [everything, calm, news]


def test_a_model_that_is_right_passes_every_check() -> None:
    checks = checks_against_truth(uses())
    assert len(checks) == 5  # two regimes, the noise, attention in two regimes
    assert all(check.passed for check in checks)
    assert str(checks[0]).startswith("PASS  regime calm: most important is price (truth: price)")


def test_each_mistake_fails_its_check() -> None:
    right = uses()
    swapped = [right[0], right[1]._replace(importance=right[2].importance), right[2]]
    assert [check.passed for check in checks_against_truth(swapped)] == [False, True, True, True, True]
    noisy = [right[0]._replace(importance=np.array([0.4, 0.4, 0.2])), *right[1:]]
    assert [check.passed for check in checks_against_truth(noisy)] == [True, True, False, True, True]
    blind = uses(calm_mass=0.2)
    assert [check.passed for check in checks_against_truth(blind)] == [True, True, True, False, True]


def test_nothing_is_checked_without_a_truth() -> None:
    assert checks_against_truth([use("all", [0.1, 0.2, 0.3], None, [0.3, 0.3, 0.4])]) == []


@pytest.mark.parametrize(
    ("measured", "known", "expected"),
    [
        ([0.6, 0.3, 0.0], [0.7, 0.2, 0.0], 1.0),
        ([0.0, 0.3, 0.6], [0.7, 0.2, 0.0], -1.0),
        ([0.96, 0.01, 0.02], [0.95, 0.02, 0.0], 1.0),  # 2 % and 0 are not told apart
        ([0.0, 0.0, 0.0], [0.7, 0.2, 0.0], 0.0),
        ([-0.5, -0.1, 0.6], [0.1, 0.1, 0.8], 1.0),  # below 0 is 0
    ],
)
def test_rank_correlation(measured: list[float], known: list[float], expected: float) -> None:
    assert rank_correlation(np.array(measured), np.array(known)) == pytest.approx(expected)


def test_linear_yardstick_finds_what_is_linear_in_the_mean_tokens() -> None:
    task = load_task(Recipe(data=DataConfig(simulate_days=80, simulate_entities=5)))
    weight, bias = task.skip("ridge")
    skip = task.features.past @ weight.numpy().T + bias.numpy()
    signal = mean_vectors(task, "text")[:, :2]
    task = replace(task, features=replace(task.features, targets=(skip + signal).astype(np.float32)))
    forecasts = {forecast.name: forecast.prediction for forecast in residual_forecasts(task)}
    assert list(forecasts) == ["ridge, then text", "ridge, then all"]
    truth, rows = signal[task.rows.test], task.rows.test
    for prediction in forecasts.values():
        left = np.square(prediction - task.features.targets[rows]).mean()
        assert left < 0.5 * np.square(truth - signal[task.rows.train].mean(axis=0)).mean()


def saved(checkpoints: Checkpoints, step: int) -> Tensor:
    state = {"x": torch.zeros(3), "progress": {"step": 0}}
    checkpoints.load(step, state)
    assert state["progress"]["step"] == step
    x: Tensor = state["x"]
    return x


@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_keep_the_newest_and_hide_the_unfinished(tmp_path: Path, background: bool) -> None:
    with open_world("cpu") as world:
        checkpoints = Checkpoints(tmp_path, world, keep=2, background=background)
        assert checkpoints.latest() is None
        for step in (1, 2, 30):
            x = torch.full((3,), float(step))
            checkpoints.save(step, {"x": x, "progress": {"step": step}})
            if background:
                x.fill_(-1.0)  # what is written is what was there when `save` returned
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000030"]
        assert checkpoints.latest() == 30
        assert torch.equal(saved(checkpoints, 30), torch.full((3,), 30.0))
        (tmp_path / "step-00000030" / ".metadata").unlink()
        assert checkpoints.latest() == 2
