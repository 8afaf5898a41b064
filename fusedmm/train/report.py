"""The report of a recipe: one table of baselines and fusions, what each modality earned, a figure; Markdown and
JSON.
"""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import softmax

import fusedmm
from fusedmm.train.baselines import Forecast, Score, baseline_forecasts, format_table, score_forecasts
from fusedmm.train.bootstrap import Bootstrap, Interval
from fusedmm.train.config import Recipe, VariantConfig
from fusedmm.train.dataset import Float32Array
from fusedmm.train.evaluate import RunResult
from fusedmm.train.figure import draw_report
from fusedmm.train.importance import Check, ModalityUse, check_filter, checks_against_truth, modality_use
from fusedmm.train.linear import residual_forecasts
from fusedmm.train.task import Task


class Report(NamedTuple):
    """What `build_report` finds."""

    reference: str
    scores: list[Score]
    margins: dict[str, Interval]
    """Mean difference of each other row's losses to the headline variant's, paired; above 0 the headline is better."""
    uses: dict[str, list[ModalityUse]]
    """For each variant that attends, how it uses its modalities."""
    switched_off: dict[str, dict[str, int]]
    """For each variant with a filter, its modalities and in how many of the runs they were switched off."""
    checks: list[Check]
    runs: list[dict[str, Any]]
    """One entry a run: variant, seed, seconds, best step, parameters."""


def write_report(recipe: Recipe, task: Task, results: Mapping[str, Sequence[RunResult]], out: Path) -> bool:
    """Write ``report.md``, ``report.json`` and ``report.png``, and print the first.

    Returns:
        Whether every check against the truth passed; True where there is none.
    """
    report = build_report(recipe, task, results)
    text = to_markdown(recipe, task, report)
    (out / "report.md").write_text(text)
    (out / "report.json").write_text(json.dumps(to_json(report), indent=1) + "\n")
    draw_report(recipe, task, report, headline_variant(recipe).name, mass_name(recipe), out)
    print(text)
    return all(check.passed for check in report.checks)


def build_report(recipe: Recipe, task: Task, results: Mapping[str, Sequence[RunResult]]) -> Report:
    """Score all forecasts on the test rows and measure what each modality earned."""
    baselines = [*baseline_forecasts(task.dataset, task.rows), *residual_forecasts(task)]
    known = [baseline.name for baseline in baselines]
    reference = next(name for name in ("ridge", "logistic", *known) if name in known)
    forecasts, uses, runs = baselines, {}, []
    switched_off = {}
    for variant in recipe.variant:
        runs_of = results[variant.name]
        prediction = average(task, [run.test for run in runs_of])
        classes = prediction.argmax(axis=1)[:, None] if task.classes else prediction
        forecasts.append(Forecast(variant.name, classes.astype(np.float64)))
        hidden = np.stack(
            [average(task, list(without)) for without in zip(*[run.hidden for run in runs_of], strict=True)]
        )
        mass = np.mean([run.mass for run in runs_of], axis=0)
        names = tuple(task.sizes_of(variant).modalities)
        uses[variant.name] = modality_use(task, names, prediction, mass, hidden)
        if variant.filter:
            times = np.sum([~run.kept for run in runs_of], axis=0)
            switched_off[variant.name] = dict(zip(names, times.tolist(), strict=True))
        for seed, run in zip(recipe.train.seeds, runs_of, strict=True):
            facts = {"seconds": float(run.seconds), "best_step": int(run.best_step), "parameters": int(run.parameters)}
            runs.append({"variant": variant.name, "seed": seed, **facts})
    bootstrap = Bootstrap(recipe.run.block_days, recipe.run.bootstrap)
    scores = score_forecasts(task.dataset, task.rows, forecasts, reference, bootstrap)
    headline = score_forecasts(task.dataset, task.rows, forecasts, headline_variant(recipe).name, bootstrap)
    margins = {score.name: score.paired for score in headline if score.paired is not None}
    checks = _checks(recipe, scores, uses, switched_off)
    return Report(reference, scores, margins, uses, switched_off, checks, runs)


def average(task: Task, predictions: Sequence[Float32Array]) -> npt.NDArray[np.floating[Any]]:
    """Mean over seeds of predicted values, or of class probabilities."""
    if task.classes:
        predictions = [softmax(prediction, axis=1) for prediction in predictions]
    mean: npt.NDArray[np.floating[Any]] = np.mean(predictions, axis=0)
    return mean


def mass_name(recipe: Recipe) -> str:
    """What the models' mass is."""
    return "share of the gates" if recipe.model.softmax == "per_modality" else "attention mass"


def headline_variant(recipe: Recipe) -> VariantConfig:
    """The variant whose modalities are looked at: the last gated one with all modalities, or else the last."""
    gated = [variant for variant in recipe.variant if variant.fusion == "gated" and not variant.modalities]
    return (gated or list(recipe.variant))[-1]


def _checks(
    recipe: Recipe,
    scores: Sequence[Score],
    uses: Mapping[str, list[ModalityUse]],
    switched_off: Mapping[str, Mapping[str, int]],
) -> list[Check]:
    name = headline_variant(recipe).name
    checks = checks_against_truth(uses[name])
    if not checks:
        return []
    paired = next(score.paired for score in scores if score.name == name)
    if paired is not None:
        text = f"{name} is better than the simple baseline: mean difference of losses {paired} (below 0)"
        checks.insert(0, Check(paired.high < 0, text))
    if name in switched_off:
        checks.append(check_filter(uses[name][0], switched_off[name], len(recipe.train.seeds)))
    return checks


def to_markdown(recipe: Recipe, task: Task, report: Report) -> str:
    """The report as text."""
    days = len(np.unique(task.dataset.samples["day"].to_numpy()[task.rows.test]))
    parts = ", ".join(f"{name} {len(task.split(name))}" for name in ("train", "dev", "test"))
    lines = [
        f"# {task.dataset.info.name}",
        "",
        f"Samples: {parts}; the test has {days} days. Fitted on train, tuned on dev, scored on test. "
        f"Intervals: bootstrap of whole days, block length {recipe.run.block_days}, {recipe.run.bootstrap} resamples. "
        f"Networks: mean prediction of seeds {', '.join(map(str, recipe.train.seeds))}.",
        "",
        format_table(task.dataset, report.scores, report.reference),
        "",
    ]
    name = headline_variant(recipe).name
    lines += [f"Paired by day, each row's loss minus that of `{name}` (above 0: `{name}` is better):", ""]
    lines += ["| row | difference [95 %] |", "|---|---|"]
    lines += [f"| {row} | {margin} |" for row, margin in report.margins.items()] + [""]
    measure = "negative log-likelihood" if task.classes else "MSE"
    lines += [
        f"What each modality earned in `{name}`: {mass_name(recipe)}, and rise of {measure} when it is hidden.",
        "",
    ]
    lines += [_use_table(report.uses[name]), ""]
    for variant, times in report.switched_off.items():
        gone = ", ".join(
            f"{modality} ({count} of {len(recipe.train.seeds)} runs)" for modality, count in times.items() if count
        )
        lines += [f"Switched off by the filter of `{variant}`: {gone or 'nothing'}.", ""]
    if report.checks:
        lines += ["Checks against the truth of the simulation:", "", "```", *map(str, report.checks), "```", ""]
    seconds = sum(run["seconds"] for run in report.runs)
    counts = {run["variant"]: run["parameters"] for run in report.runs}
    sizes = ", ".join(f"{variant} {count:,}" for variant, count in counts.items())
    lines += [f"Parameters: {sizes}. Training took {seconds:.0f} s. {provenance()}", ""]
    return "\n".join(lines)


def _use_table(uses: Sequence[ModalityUse]) -> str:
    known = uses[0].known is not None
    kinds = ["mass", "hidden", *(["known"] if known else [])]
    lines = ["| rows | n | | " + " | ".join(uses[0].names) + " |", "|---" * (3 + len(uses[0].names)) + "|"]
    for use in uses:
        values = {"mass": use.mass, "hidden": use.importance, "known": use.known}
        for number, kind in enumerate(kinds):
            row = values[kind]
            assert row is not None
            sign = "+" if kind == "hidden" else ""
            cells = " | ".join(f"{value:{sign}.3f}" for value in row)
            group = f"{use.group} | {use.rows}" if number == 0 else " | "
            lines.append(f"| {group} | {kind} | {cells} |")
    return "\n".join(lines)


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "provenance": provenance(),
        "reference": report.reference,
        "scores": [score._asdict() for score in report.scores],
        "margins": {name: margin._asdict() for name, margin in report.margins.items()},
        "modalities": {
            variant: [
                {
                    name: value.tolist() if isinstance(value, np.ndarray) else value
                    for name, value in use._asdict().items()
                }
                for use in uses
            ]
            for variant, uses in report.uses.items()
        },
        "switched_off": report.switched_off,
        "checks": [check._asdict() for check in report.checks],
        "runs": report.runs,
    }


def provenance() -> str:
    """Date, versions, machine and, in a git checkout, the commit."""
    root = Path(fusedmm.__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    commit = ""
    if (root / ".git").exists():
        commit = f", commit {subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()}"
    day = datetime.now(UTC).date()
    versions = f"fusedmm {fusedmm.__version__}{commit}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{day}, {versions}, {platform.machine()}, threads: {torch.get_num_threads()}."
