"""The main job end to end on a small simulated market: report, resuming, ranks, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fusedmm.train import __main__ as command
from fusedmm.train import trainer
from fusedmm.train.__main__ import main
from fusedmm.train.format import write_dataset
from fusedmm.train.stored import StoredModel
from tests.small_job import DONE, NO_EVENTS, RECIPE, logged, market, market_of_classes, result

ROOT = Path(__file__).resolve().parents[1]
BOTH = '[[variant]]\nname = "concat"\nfusion = "concat"\n[[variant]]\nname = "gated"\n'
LINEAR = ["train mean", "ridge", "oracle", "ridge, then text", "ridge, then all"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank, its checkpoints after 6 and 12 steps kept."""
    out = tmp_path_factory.mktemp("one")
    assert main([str(recipe), f"run.out={out}", NO_EVENTS]) in DONE
    return out


def losses(out: Path) -> dict[int, float]:
    return logged(out, "loss")


def interrupted_copy(source: Path, target: Path) -> Path:
    """What the run's directory held when the step after the first checkpoint was interrupted."""
    shutil.copytree(source, target)
    run = target / "runs" / "gated-seed0"
    (run / "result.npz").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    return target


def test_report_compares_baselines_and_fusions(recipe: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.toml"
    both.write_text(RECIPE + BOTH)
    out = tmp_path / "out"
    assert main([str(both), f"run.out={out}"]) in DONE
    report = json.loads((out / "report.json").read_text())
    scores = {score["name"]: score for score in report["scores"]}
    assert list(scores) == [*LINEAR, "concat", "gated"]
    assert scores["ridge"]["paired"] is None
    for name in ("concat", "gated"):
        value, low, high = scores[name]["headline"]
        assert scores["oracle"]["headline"][0] < low < value < high
        difference = value - scores["ridge"]["headline"][0]
        np.testing.assert_allclose(scores[name]["paired"][0], difference, atol=1e-9)
    for name, margin in report["margins"].items():
        difference = scores[name]["headline"][0] - scores["gated"]["headline"][0]
        np.testing.assert_allclose(margin["value"], difference, atol=1e-9)
    assert "gated" not in report["margins"]
    use = report["modalities"]["gated"][0]
    assert use["names"] == ["price", "text", "audio", "chart", "weather", "orders"]
    np.testing.assert_allclose(sum(use["mass"]), 1.0, atol=1e-5)
    np.testing.assert_allclose(sum(use["known"]), 1.0, atol=1e-5)
    assert any("rank correlation" in check["text"] for check in report["checks"])
    text = (out / "report.md").read_text()
    assert "| gated |" in text
    assert "| oracle |" in text
    for check in report["checks"]:
        assert f"{'PASS' if check['passed'] else 'FAIL'}  {check['text']}\n" in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "runs" / "gated-seed0" / "tensorboard").glob("events*"))


def test_training_lowers_the_loss_and_beats_the_mean(finished: Path) -> None:
    assert len(losses(finished)) == 12
    report = json.loads((finished / "report.json").read_text())
    scores = {score["name"]: score["headline"][0] for score in report["scores"]}
    assert scores["gated"] < scores["train mean"]


def test_resumed_run_is_the_uninterrupted_run(
    recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = interrupted_copy(finished, tmp_path / "resumed")
    half_written = out / "runs" / "gated-seed0" / "checkpoints" / "partial-00000012"
    half_written.mkdir()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: 0.0))  # this session takes no time
    assert main([str(recipe), f"run.out={out}", NO_EVENTS]) in DONE
    assert 0 < result(out)["seconds"] < result(finished)["seconds"]  # what the first six steps took
    assert not half_written.exists()
    assert losses(out) == losses(finished)
    for name in ("dev", "test", "mass", "hidden"):
        np.testing.assert_array_equal(result(out)[name], result(finished)[name])


def test_two_ranks_are_one_and_one_rank_continues_them(recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fusedmm.train", str(recipe), f"run.out={out}", NO_EVENTS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (out / "report.json").is_file(), done.stderr[-2000:]
    np.testing.assert_allclose(list(losses(out).values()), list(losses(finished).values()), rtol=1e-5)
    # forecasts are 0.1 to 0.5; the order of sums differs, with PyTorch 2.15 by 1.01e-5
    np.testing.assert_allclose(result(out)["test"], result(finished)["test"], atol=2e-5)
    sharded, whole = (StoredModel.load(path / "runs" / "gated-seed0").weights for path in (out, finished))
    assert list(sharded) == list(whole)
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=1e-4)
    alone = interrupted_copy(out, tmp_path / "alone")
    assert main([str(recipe), f"run.out={alone}", NO_EVENTS]) in DONE
    np.testing.assert_allclose(result(alone)["test"], result(out)["test"], atol=1e-5)


def test_finished_run_is_not_repeated(recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = finished / "runs" / "gated-seed0" / "result.npz"
    before = stored.stat().st_mtime_ns
    assert main([str(recipe), f"run.out={finished}", NO_EVENTS]) in DONE
    assert stored.stat().st_mtime_ns == before
    assert "| gated |" in capsys.readouterr().out


def test_sigterm_writes_a_checkpoint_and_the_same_command_goes_on(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    code = (
        "import os, signal, sys\n"
        "from fusedmm.train import trainer\n"
        "step = trainer.Trainer.train_step\n"
        "def stopped(self, number):\n"
        "    step(self, number)\n"
        "    if number == 3: os.kill(os.getpid(), signal.SIGTERM)\n"
        "trainer.Trainer.train_step = stopped\n"
        "from fusedmm.train.__main__ import main\n"
        f"sys.exit(main([{str(recipe)!r}, 'run.out={out}', {NO_EVENTS!r}]))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 143, done.stderr[-2000:]
    assert "after step 4" in done.stderr
    assert "run the same command" in done.stderr
    assert (out / "runs" / "gated-seed0" / "checkpoints" / "step-00000004" / ".metadata").is_file()
    assert not (out / "report.json").exists()


def test_loss_that_is_not_finite_ends_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "batch_loss", lambda prediction, targets, task: prediction.sum(dim=1) * float("nan"))
    assert main([str(recipe), f"run.out={tmp_path}", NO_EVENTS, "train.max_skips=4"]) == 1
    error = capsys.readouterr().err
    assert "must be finite" in error
    assert "gated, seed 0" in error
    assert "train.lr" in error


def test_other_recipe_in_the_same_directory_is_refused(
    recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe), f"run.out={finished}", NO_EVENTS, "train.lr=0.5"]) == 1
    error = capsys.readouterr().err
    assert "train.lr was 0.002, is 0.5" in error
    assert "run.resume=false" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=/nowhere"], "/nowhere/dataset.json must exist"),
        (["train.batch_size=4096"], "train.batch_size must be at most the "),
        (["data.train_end=2020-02-30", "data.test_start=2020-03-10"], "train_end must be a date"),
        (["data.train_end=2020-03-01", "data.test_start=2020-02-01"], "dev_end must be"),
        (["run.device=cuda"], "no CUDA device"),
        (["run.shard=2"], "must divide the number of ranks 1"),
    ],
)
def test_refusals_come_before_any_work(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    if "run.device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has the CUDA device that the test asks for in vain")
    out = tmp_path / "out"
    assert main([str(recipe), f"run.out={out}", NO_EVENTS, *overrides]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_unknown_modality_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE + '[[variant]]\nname = "a"\nmodalities = ["prise"]\n')
    assert main([str(path), f"run.out={tmp_path / 'out'}", NO_EVENTS]) == 1
    assert "got 'prise'. Did you mean 'price'?" in capsys.readouterr().err


def test_text_model_without_its_package_is_one_line(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert main([str(recipe), f"run.out={tmp_path / 'out'}", NO_EVENTS, "data.text_model=some-model"]) == 1
    assert "Install fusedmm[text]" in capsys.readouterr().err


def test_empty_dataset_is_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info, samples, tokens = market()
    write_dataset(tmp_path / "data", info, samples.iloc[:0], tokens)
    assert main([str(recipe), f"run.out={tmp_path / 'out'}", NO_EVENTS, f"data.path={tmp_path / 'data'}"]) == 1
    assert "has no rows: the data set is empty" in capsys.readouterr().err


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in ("simulate_days", "softmax", "weight_decay", "checkpoint_async", "modalities"):
        assert f"  {key} = " in text


def test_classes_are_scored_by_accuracy_and_correlation(recipe: Path, tmp_path: Path) -> None:
    info, samples, tokens = market_of_classes()
    write_dataset(tmp_path / "data", info, samples, tokens)
    out = tmp_path / "out"
    assert main([str(recipe), f"run.out={out}", NO_EVENTS, f"data.path={tmp_path / 'data'}"]) == 0
    report = json.loads((out / "report.json").read_text())
    scores = {score["name"]: score for score in report["scores"]}
    assert list(scores) == ["majority", "logistic", "gated"]
    predicted = result(out)["test"].argmax(axis=1)
    test = samples.tail(len(predicted))
    np.testing.assert_allclose(scores["gated"]["headline"][0], (predicted == test["target_up"]).mean())
    assert -1 <= scores["gated"]["correlation"][0] <= 1
    assert report["checks"] == []
    assert report["modalities"]["gated"][0]["known"] is None


def test_data_option_takes_the_recipe_of_that_name(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", *market())
    mine, theirs = tmp_path / "mine.toml", tmp_path / "simulated-market.toml"
    mine.write_text(RECIPE)
    theirs.write_text(RECIPE + "[[variant]]\nfusion = 'nothing'\n")
    arguments = [str(mine), "--data", str(tmp_path / "data"), f"run.out={tmp_path / 'out'}", NO_EVENTS]
    assert main(arguments) == 1
    assert "simulated-market.toml" in capsys.readouterr().err
    theirs.unlink()
    assert main(arguments) in DONE
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["data"]["path"] == str(tmp_path / "data")


@pytest.mark.parametrize(("name", "words"), [("absent", "which is not there"), ("empty", "with nothing. Convert")])
def test_data_option_refuses(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(recipe), "--data", str(tmp_path / name)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.gpu
def test_gpu_trains_close_to_the_cpu(recipe: Path, finished: Path, tmp_path: Path) -> None:
    assert main([str(recipe), f"run.out={tmp_path}", NO_EVENTS, "run.device=cuda", "train.precision=bf16"]) in DONE
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(finished).values()), rtol=0.05)


def test_bf16_trains_close_to_float32(recipe: Path, finished: Path, tmp_path: Path) -> None:
    assert main([str(recipe), f"run.out={tmp_path}", NO_EVENTS, "train.precision=bf16"]) in DONE
    low, high = list(losses(tmp_path).values()), list(losses(finished).values())
    assert low != high
    np.testing.assert_allclose(low, high, rtol=0.05)


def test_torchrun_is_told_why_a_process_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would say no more than the exit status, and that tracebacks may be had."""
    recipe, file = tmp_path / "recipe.toml", tmp_path / "error.json"
    recipe.write_text(RECIPE + "[[variant]]\nname = 'gated'\n")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(command, "run_recipe", lambda recipe: False)
    for words, status, reason in (
        ([], 2, "a check against the truth"),
        (["model.dim=31"], 1, "must divide model.dim=31"),
    ):
        assert main([str(recipe), *words]) == status
        shown = capsys.readouterr().err
        assert reason in shown
        assert ProcessFailure(0, 1, status, str(file)).message == shown.strip()
