"""The filter of a run: shares of importance, who goes and when, and that a run with a filter resumes as itself."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fusedmm.train.__main__ import main
from fusedmm.train.config import RecipeError, load_recipe
from fusedmm.train.filter import modality_importance
from fusedmm.train.importance import ModalityUse, check_filter
from tests.small_job import DONE, result

RECIPE = """
[data]
simulate_days = 60
simulate_entities = 4
max_tokens = 4
[model]
layers = 1
[train]
steps = 24
batch_size = 16
warmup = 2
eval_every = 1
patience = 0
[run]
device = "cpu"
checkpoint_every = 17
keep_checkpoints = 2
bootstrap = 100
tensorboard = false
[[variant]]
name = "filtered"
filter = 0.9
"""
RUN = "filtered-seed0"


def test_importance_is_a_share_of_what_all_earn() -> None:
    loss = torch.tensor([1.0, 3.0])
    hidden = {"a": loss + 0.6, "b": loss + torch.tensor([0.4, 0.0]), "c": loss - 0.1}
    importance = modality_importance(loss, hidden, ("a", "b", "c", "off"))
    torch.testing.assert_close(importance, torch.tensor([0.75, 0.25, -0.125, 0.0]))
    nothing = modality_importance(loss, {"a": loss, "b": loss - 0.1}, ("a", "b"))
    assert (nothing <= 0).all()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("filtered")
    (out / "recipe.toml").write_text(RECIPE)
    assert main([str(out / "recipe.toml"), f"run.out={out}"]) in DONE
    return out


def test_what_is_switched_off_is_not_read(finished: Path) -> None:
    """Eleven looks count, three at a time: three of six modalities go, and the report names them."""
    stored = result(finished, RUN)
    assert stored["kept"].sum() == 3
    for kept, mass, hidden in zip(stored["kept"], stored["mass"].T, stored["hidden"], strict=True):
        assert (mass > 0).any() == kept
        assert np.array_equal(hidden, stored["test"]) == (not kept)
    line = next(line for line in (finished / "report.md").read_text().splitlines() if line.startswith("Switched off"))
    assert line.count("(1 of 1 runs)") == 3


def test_a_resumed_run_filters_alike(finished: Path, tmp_path: Path) -> None:
    """From the checkpoint after step 17: one modality has gone, two will."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / RUN
    shutil.rmtree(run / "checkpoints" / "step-00000024")
    (run / "result.npz").unlink()
    assert main([str(tmp_path / "recipe.toml"), f"run.out={tmp_path}"]) in DONE
    before, after = result(finished, RUN), result(tmp_path, RUN)
    for name in ("kept", "test", "dev", "mass", "best_step"):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_the_check_names_what_went() -> None:
    use = ModalityUse("all", 9, ("price", "noise"), np.ones(2), np.ones(2), np.array([1.0, 0.0]))
    assert check_filter(use, {"price": 0, "noise": 2}, runs=2).passed
    for wrong in ({"price": 0, "noise": 1}, {"price": 1, "noise": 2}):
        assert not check_filter(use, wrong, runs=2).passed


def test_a_filter_is_for_the_gated_fusion(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[[variant]]\nname = "plain"\nfusion = "plain"\nfilter = 0.1\n')
    with pytest.raises(RecipeError, match=r"variant\.filter .* must be 0 where fusion is not 'gated'"):
        load_recipe(path)
