"""All runs of a recipe: every variant with every seed, one after the other, then the report.

What a run leaves: ``<out>/runs/<variant>-seed<n>/{log.jsonl, tensorboard, checkpoints, model.pt, result.npz}``. A
finished run is not repeated, an interrupted one continues from its newest checkpoint: the command that was stopped is
the command that goes on.
"""

import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedmm.train.config import Recipe, RecipeError, VariantConfig
from fusedmm.train.evaluate import RunResult
from fusedmm.train.logs import require_tensorboard, run_directory
from fusedmm.train.parallel import StopSignal, World, full, open_world
from fusedmm.train.report import write_report
from fusedmm.train.start import check_patterns, new_model
from fusedmm.train.stored import StoredModel
from fusedmm.train.task import Task, load_task
from fusedmm.train.trainer import Interrupted, Trainer


def run_recipe(recipe: Recipe) -> bool:
    """Train what the recipe says and write the report.

    Returns:
        Whether every check of the report passed, on rank 0; True elsewhere, and where the data has no known truth.

    Raises:
        RecipeError: where the output directory holds another recipe's results, or variant and data do not fit.
        Interrupted: after SIGTERM or SIGINT, with a checkpoint written.
    """
    if recipe.run.tensorboard:
        require_tensorboard()
    torch.set_num_threads(recipe.run.threads)
    with open_world(recipe.run.device, recipe.run.shard) as world:
        try:
            task = load_task(recipe)
        except ValueError as error:  # from reading, splitting, featurising: all of it is the user's to mend
            raise RecipeError(str(error)) from error
        _check_batch(recipe.train.batch_size, len(task.train), world.size)
        with torch.device("meta"):
            check_patterns(recipe.train, {variant.name: new_model(recipe, variant, task) for variant in recipe.variant})
        out = Path(recipe.run.out)
        if world.is_main:
            _claim(out, recipe, task)
            print(_greeting(task, world, out), flush=True)
        world.barrier()
        stop = StopSignal()
        try:
            results = {
                variant.name: [_run_once(recipe, variant, seed, task, world, stop) for seed in recipe.train.seeds]
                for variant in recipe.variant
            }
        finally:
            stop.restore()
        passed = write_report(recipe, task, results, out) if world.is_main else True
        world.barrier()
        return passed


def _check_batch(batch_size: int, samples: int, ranks: int) -> None:
    if batch_size > samples:
        raise RecipeError(f"train: train.batch_size must be at most the {samples} training samples, got {batch_size}.")
    if batch_size % ranks:
        raise RecipeError(f"train: train.batch_size must be a multiple of the {ranks} ranks, got {batch_size}.")


def _run_once(
    recipe: Recipe, variant: VariantConfig, seed: int, task: Task, world: World, stop: StopSignal
) -> RunResult:
    directory = run_directory(Path(recipe.run.out), variant.name, seed)
    finished = directory / "result.npz"
    if not world.any(finished.is_file()):
        trainer = Trainer(recipe, variant, seed, task, world, directory)
        trainer.fit(stop)
        dev, test = trainer.predict("dev"), trainer.predict("test")
        hidden = [trainer.predict("test", hidden=name).prediction for name in trainer.names]
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        result = RunResult(
            dev.prediction.numpy(),
            test.prediction.numpy(),
            test.mass.numpy(),
            np.stack([prediction.numpy() for prediction in hidden]),
            np.array([name in trainer.kept for name in trainer.names]),
            trainer.seconds,
            int(trainer.progress["best_step"]),
            parameters,
        )
        weights = {name: full(tensor).cpu() for name, tensor in trainer.best.items()}
        if world.is_main:
            StoredModel(recipe.data, recipe.model, variant, task.needs, task.featurizer, weights).save(directory)
            _write_result(finished, result)
        world.barrier()
        if world.any(stop.received):
            raise Interrupted("train: stopped by a signal between two runs; run the same command to continue.")
    with np.load(finished) as stored:
        arrays: dict[str, Any] = {name: stored[name] for name in RunResult._fields}
    return RunResult(**arrays)


def _write_result(path: Path, result: RunResult) -> None:
    partial = path.with_name("partial-result.npz")
    np.savez(partial, **result._asdict())
    partial.rename(path)


def _claim(out: Path, recipe: Recipe, task: Task) -> None:
    """Make the output directory this recipe's, or refuse to mix two recipes' results."""
    rows = np.concatenate([task.features.sample, task.features.targets.astype(np.float64).ravel()])
    mine = {name: value for name, value in dataclasses.asdict(recipe).items() if name != "run"}
    mine["data"]["fingerprint"] = zlib.crc32(rows.tobytes())
    mine = json.loads(json.dumps(mine))
    path = out / "recipe.json"
    if not recipe.run.resume:
        shutil.rmtree(out / "runs", ignore_errors=True)
    elif path.is_file():
        theirs = json.loads(path.read_text())
        if theirs != mine:
            raise RecipeError(
                f"train: run.out must not hold results of another recipe, got {out} "
                f"({_first_difference(theirs, mine)}). Choose another run.out, or pass run.resume=false to start over."
            )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1) + "\n")


def _first_difference(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    for section, table in mine.items():
        other = theirs.get(section)
        if isinstance(table, dict) and isinstance(other, dict):
            for name, value in table.items():
                if other.get(name) != value:
                    return f"{section}.{name} was {other.get(name)!r}, is {value!r}"
        elif other != table:
            return f"{section} differs"
    return "a key is gone"


def _greeting(task: Task, world: World, out: Path) -> str:
    splits = ", ".join(f"{name} {len(task.split(name))}" for name in ("train", "dev", "test"))
    modalities = ", ".join(f"{name} ({width})" for name, width in task.features.widths.items())
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
    return f"{task.dataset.info.name}: {splits}; {modalities}; {ranks} on {world.device.type}; results in {out}"
