"""A finished run starts another and forecasts: the same weights, the same features, nothing fitted anew."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fusedmm.train import predict
from fusedmm.train.__main__ import main
from fusedmm.train.features import FeatureConfig, Featurizer, Scaler
from fusedmm.train.format import read_dataset, write_dataset
from fusedmm.train.stored import StoredModel
from fusedmm.train.text import ModelEncoder
from tests.small_job import DONE, NO_EVENTS, RECIPE, logged, market, market_of_classes, result

VARIANT = """
[[variant]]
name = "gated"
modalities = ["price", "text", "chart"]
filter = 0.02
"""
RUN = Path("runs") / "gated-seed0"


def write_market(directory: Path, *, seed: int, shift: float = 0.0, without: str = "") -> Path:
    """A small market on disk, its targets shifted, and columns that start with ``without`` left out."""
    info, samples, tokens = market(seed)
    for name in samples.columns:
        if name.startswith(("target_", "oracle_")):
            samples[name] += shift
    if without:
        samples = samples[[name for name in samples.columns if not name.startswith(without)]]
    write_dataset(directory, info, samples, tokens)
    return directory


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``recipe.toml``, the data of ``out`` (a finished recipe), and ``shifted``, other data."""
    root = tmp_path_factory.mktemp("first")
    (root / "recipe.toml").write_text(RECIPE + VARIANT)
    write_market(root / "shifted", seed=1, shift=3.0)
    assert train(root, root / "out", f"data.path={write_market(root / 'data', seed=0)}") in DONE
    return root


def train(first: Path, out: Path, *overrides: str) -> int:
    return main([str(first / "recipe.toml"), f"run.out={out}", NO_EVENTS, *overrides])


@pytest.mark.parametrize("init", ["out", f"out/{RUN}"])
def test_no_step_on_the_same_data_reproduces_the_run(first: Path, tmp_path: Path, init: str) -> None:
    assert train(first, tmp_path, f"data.path={first / 'data'}", f"train.init={first / init}", "train.steps=0") in DONE
    for name in ("dev", "test", "mass", "hidden"):
        np.testing.assert_array_equal(result(tmp_path)[name], result(first / "out")[name])


def test_steps_on_shifted_data_lower_the_dev_loss(first: Path, tmp_path: Path) -> None:
    init = [f"data.path={first / 'shifted'}", f"train.init={first / 'out'}", "train.lr=0.01", "train.ema=0"]
    assert train(first, tmp_path, *init, "train.steps=40") in DONE
    losses = logged(tmp_path, "dev_loss")
    assert min(loss for step, loss in losses.items() if step > 0) < 0.5 * losses[0]
    assert result(tmp_path)["best_step"] > 0
    old, new = (StoredModel.load(out / RUN) for out in (first / "out", tmp_path))
    for name in ("skip_weight", "skip_bias", "target_scale"):
        assert torch.equal(old.weights[name], new.weights[name])
    np.testing.assert_array_equal(old.featurizer.past.center, new.featurizer.past.center)


def test_what_is_frozen_stays_and_the_rest_goes_at_its_own_rate(first: Path, tmp_path: Path) -> None:
    """And a run that continues from a checkpoint is the run that was never interrupted."""
    init = [f"data.path={first / 'shifted'}", f"train.init={first / 'out'}", "train.lr=0.01", "train.ema=0"]
    init += ['train.freeze=["encoders.*", "latents"]', 'train.lr_scale={"*" = 0.1, "head.*" = 0}']
    assert train(first, tmp_path, *init) in DONE
    old, new = (StoredModel.load(out / RUN).weights for out in (first / "out", tmp_path))
    kept = {name for name in old if torch.equal(old[name], new[name])}
    still = ("encoders.", "latents", "head.")
    assert all(name in kept for name in old if name.startswith(still))
    trained = {name for name in old if name.startswith("blocks.") and name.endswith("weight")}
    assert trained - kept
    step = max(float((new[name] - old[name]).abs().max()) for name in trained)
    assert step < 12 * 0.1 * 0.01 * 1.5  # Adam moves a weight by about the rate a step
    before = result(tmp_path)["test"]
    (tmp_path / RUN / "result.npz").unlink()
    shutil.rmtree(tmp_path / RUN / "checkpoints" / "step-00000012")
    assert train(first, tmp_path, *init) in DONE
    np.testing.assert_array_equal(result(tmp_path)["test"], before)


def test_a_start_that_no_step_improves_is_kept(first: Path, tmp_path: Path) -> None:
    init = [f"data.path={first / 'data'}", f"train.init={first / 'out'}"]
    assert train(first, tmp_path, *init, "train.lr=1", "train.ema=0", "train.steps=2") in DONE
    losses = logged(tmp_path, "dev_loss")
    assert losses[2] > losses[0]
    assert result(tmp_path)["best_step"] == 0
    np.testing.assert_array_equal(result(tmp_path)["test"], result(first / "out")["test"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.init=NOWHERE"], "NOWHERE/runs/gated-seed0 must be the folder of a finished run, got no model.pt"),
        (["train.seeds=[0, 7]"], "gated-seed7 must be the folder of a finished run"),
        (["model.dim=64"], "model.dim must be 32, as in the run that train.init="),
        (["data.text_dim=16"], "data.text_dim must be 32"),
        (["data.pool_modalities=['text']"], "data.pool_modalities must be ()"),
        (
            ["train.freeze=['encoders']"],
            "train.freeze must match a parameter, got 'encoders'. There are blocks.*, context.*",
        ),
        (["train.lr_scale={'haed.*' = 0.1}"], "train.lr_scale must match a parameter, got 'haed.*'"),
        (["train.freeze=['*']"], "train.freeze must leave something to train, got ['*'], all of 'gated'"),
    ],
)
def test_settings_that_do_not_fit_the_finished_run_are_refused(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    out = tmp_path / "new"
    assert train(first, out, f"data.path={first / 'data'}", f"train.init={first / 'out'}", *overrides) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("modalities = ['price']", "variant.modalities must be ('price', 'text', 'chart')"),
        ("modalities = ['price', 'text', 'chart']\nfusion = 'plain'", "variant.fusion must be 'gated'"),
        ("modalities = ['price', 'text', 'chart']", "variant.filter > 0 must be True"),
    ],
)
def test_other_variants_are_refused(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], variant: str, message: str
) -> None:
    path = tmp_path / "other.toml"
    path.write_text(RECIPE + f"[[variant]]\nname = 'gated'\n{variant}\n")
    data = [f"data.path={first / 'data'}", f"train.init={first / 'out'}", f"run.out={tmp_path / 'new'}"]
    assert main([str(path), *data]) == 1
    assert message in capsys.readouterr().err


def test_other_data_is_refused(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info, samples, tokens = market()
    kinds = {name: info.modalities[name] for name in ("price", "text", "chart")}
    narrow = dataclasses.replace(info, modalities=kinds)
    write_dataset(tmp_path / "narrow", narrow, samples, {name: tokens[name] for name in kinds})
    assert train(first, tmp_path / "new", f"data.path={tmp_path / 'narrow'}", f"train.init={first / 'out'}") == 1
    error = capsys.readouterr().err
    assert "modalities of data 'simulated-market' must be 'price, text, audio, chart, weather, orders'" in error
    assert "got 'price, text, chart'" in error
    data = write_market(tmp_path / "past", seed=0, without="past_range")
    assert predict.main([str(first / "out" / RUN), "--data", str(data), "--out", str(tmp_path / "f.parquet")]) == 1
    assert "past_ columns" in capsys.readouterr().err


def test_forecasts_need_no_targets_and_are_the_report_s(first: Path, tmp_path: Path) -> None:
    data = write_market(tmp_path / "data", seed=0, without="target_")
    path = tmp_path / "made" / "forecasts.parquet"
    run = first / "out" / RUN
    assert predict.main([str(run), "--data", str(data), "--out", str(path), "--device", "cpu"]) == 0
    table = pd.read_parquet(path)
    masses = ["mass_price", "mass_text", "mass_chart"]
    assert list(table) == ["sample", "time", "forecast_near", "forecast_far", *masses]
    assert len(table) == len(read_dataset(first / "data").samples)
    np.testing.assert_allclose(table[masses].sum(axis=1), 1.0, atol=1e-5)
    stored = result(first / "out")
    test = table.tail(len(stored["test"]))
    np.testing.assert_allclose(test[["forecast_near", "forecast_far"]], stored["test"], atol=1e-5)
    np.testing.assert_allclose(test[masses], stored["mass"], atol=1e-5)


def test_a_forecast_has_the_target_s_name_whatever_is_in_it(first: Path, tmp_path: Path) -> None:
    stored = StoredModel.load(first / "out" / RUN)
    names = ("target_near, and soon", "target_far")
    dataclasses.replace(stored, needs={**stored.needs, "target_ columns": names}).save(tmp_path)
    path = tmp_path / "f.parquet"
    assert predict.main([str(tmp_path), "--data", str(first / "data"), "--out", str(path)]) == 0
    assert list(pd.read_parquet(path))[2:4] == ["forecast_near, and soon", "forecast_far"]


def test_classes_are_forecast_as_probabilities(first: Path, tmp_path: Path) -> None:
    info, samples, tokens = market_of_classes()
    write_dataset(tmp_path / "data", info, samples, tokens)
    assert train(first, tmp_path / "out", f"data.path={tmp_path / 'data'}") == 0
    write_dataset(tmp_path / "new", info, samples.drop(columns="target_up"), tokens)
    path = tmp_path / "f.parquet"
    assert predict.main([str(tmp_path / "out" / RUN), "--data", str(tmp_path / "new"), "--out", str(path)]) == 0
    found = pd.read_parquet(path)[["probability_0", "probability_1"]]
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-5)


def test_embeddings_of_a_text_model_are_stored_too(first: Path, tmp_path: Path) -> None:
    """Its projection comes back bit for bit; the cache, a path of this machine, stays behind."""
    embeddings = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    encoder = ModelEncoder.fit(embeddings, dim=4, seed=0)
    empty = Scaler(np.zeros(0, np.float32), np.ones(0, np.float32), 5.0)
    config = FeatureConfig(text_dim=4, text_model="some-model", text_cache="/cache")
    featurizer = Featurizer(config, {}, {"text": encoder}, empty, np.zeros(1, np.float32), np.ones(1, np.float32))
    dataclasses.replace(StoredModel.load(first / "out" / RUN), featurizer=featurizer).save(tmp_path)
    loaded = StoredModel.load(tmp_path).featurizer
    assert loaded.config == dataclasses.replace(config, text_cache="")
    np.testing.assert_array_equal(loaded.encoders["text"].transform(embeddings), encoder.transform(embeddings))
