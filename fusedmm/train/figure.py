"""The figure of a report: how the runs learned, where the model looks, what it needs, and what it reaches."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fusedmm.train.config import Recipe
from fusedmm.train.dataset import Float64Array
from fusedmm.train.importance import ModalityUse
from fusedmm.train.logs import read_log, run_directory
from fusedmm.train.task import Task

if TYPE_CHECKING:
    from fusedmm.train.report import Report

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = ("#0b6e99", "#e07a1f", "#3a8f5c", "#b83b5e", "#7a5ea8", "#8a6d3b", "#5b8def", "#c2a83e")
"""Told apart by people with the common colour blindnesses, in print as well."""
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}


def draw_report(recipe: Recipe, task: Task, report: "Report", headline: str, mass_name: str, out: Path) -> None:
    """Write ``report.png``.

    Args:
        recipe: names of variants and seeds.
        task: the data, for the title.
        report: scores and uses of modalities.
        headline: the variant whose modalities are drawn.
        mass_name: what its mass is: attention, or the share of the gates.
        out: the recipe's output directory; the runs' logs are read from it.
    """
    logs = {
        variant.name: [read_log(run_directory(out, variant.name, seed)) for seed in recipe.train.seeds]
        for variant in recipe.variant
    }
    uses = report.uses[headline]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.0, 8.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        figure.suptitle(f"{task.dataset.info.name}: {len(task.test)} test forecasts", fontsize=13, fontweight="bold")
        ((curves, mass), (need, reach)) = figure.subplots(2, 2)
        _draw_curves(curves, logs)
        _draw_mass(mass, f"{mass_name} by modality on dev, {headline}", logs[headline], uses[0].names)
        _draw_importance(need, headline, uses)
        _draw_scores(reach, report, set(logs), bool(task.classes))
        figure.savefig(out / "report.png", dpi=150)


def _series(runs: Sequence[Sequence[Mapping[str, float]]], name: str) -> tuple[Float64Array, Float64Array]:
    """Steps [K] and the mean over seeds [K] of a logged value."""
    found: dict[int, list[float]] = defaultdict(list)
    for lines in runs:
        for line in lines:
            if name in line:
                found[int(line["step"])].append(line[name])
    steps = sorted(found)
    return np.array(steps, np.float64), np.array([np.mean(found[step]) for step in steps], np.float64)


def _draw_curves(axes: Any, logs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> None:
    lowest = []
    for color, (name, runs) in zip(_cycle(len(logs)), logs.items(), strict=True):
        steps, loss = _series(runs, "loss")
        axes.plot(steps, _smooth(loss), color=color, linewidth=0.9, alpha=0.35)
        steps, dev = _series(runs, "dev_loss")
        axes.plot(steps, dev, color=color, linewidth=1.9, marker="o", markersize=3.2, label=name)
        lowest.append(dev.min())
    axes.set(title="Loss: dev (bold), train (thin)", xlabel="step", ylabel="loss")
    axes.set_ylim(top=_roof(axes, min(lowest)))
    axes.legend(ncols=2)


def _roof(axes: Any, lowest: float) -> float:
    """The first steps of a run may stand far above everything of interest: cut them."""
    return float(min(axes.get_ylim()[1], 3.0 * lowest))


def _draw_mass(axes: Any, title: str, runs: Sequence[Sequence[Mapping[str, float]]], names: Sequence[str]) -> None:
    for color, name in zip(_cycle(len(names)), names, strict=True):
        steps, share = _series(runs, f"mass_{name}")
        axes.plot(steps, share, color=color, linewidth=1.9, marker="o", markersize=3.2, label=name)
    axes.set(title=title[0].upper() + title[1:], xlabel="step", ylabel="share")
    axes.set_ylim(0, None)
    axes.legend(ncols=2)


def _draw_importance(axes: Any, headline: str, uses: Sequence[ModalityUse]) -> None:
    regimes = [use for use in uses if use.group != "all"] or list(uses)
    rows = []
    for use in regimes:
        if use.known is not None:
            rows.append((f"{use.group}: truth", use.known))
        rows.append((f"{use.group}: needed", use.importance.clip(min=0.0)))
        rows.append((f"{use.group}: attended", use.mass))
    each = len(rows) // len(regimes)
    heights = [-(number + 0.6 * (number // each)) for number in range(len(rows))]
    left = np.zeros(len(rows))
    shares = [values / max(values.sum(), 1e-12) for _, values in rows]
    for index, (color, name) in enumerate(zip(_cycle(len(uses[0].names)), uses[0].names, strict=True)):
        width = np.array([share[index] for share in shares])
        axes.barh(heights, width, left=left, color=color, height=0.86, label=name, edgecolor="white", linewidth=0.6)
        left += width
    axes.set_yticks(heights, [label for label, _ in rows])
    axes.set_ylim(min(heights[-1], -4.0) - 0.7, 0.7)  # two bars alone need not fill the panel
    axes.set(title=f"What {headline} needs (loss without it) and attends to", xlabel="share", xlim=(0, 1))
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.12), columnspacing=1.0, handlelength=1.0)


def _draw_scores(axes: Any, report: "Report", networks: set[str], accuracy: bool) -> None:
    scores = list(reversed(report.scores))
    for height, score in enumerate(scores):
        color = COLORS[0] if score.name in networks else MUTED
        value, low, high = score.headline
        axes.plot([low, high], [height, height], color=color, linewidth=2.2, solid_capstyle="round", alpha=0.55)
        axes.plot([value], [height], "o", color=color, markersize=6)
        label = axes.annotate(
            f"{value:.3f}", (value, height), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})
        if score.name == report.reference:
            axes.axvline(value, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(scores)), [score.name for score in scores])
    axes.set_ylim(-0.6, len(scores) - 0.2)
    axes.grid(axis="y", visible=False)
    measure = "accuracy (more is better)" if accuracy else "mean squared error (less is better)"
    axes.set(title="Test, with 95 % day-block intervals", xlabel=measure)


def _smooth(values: Float64Array) -> Float64Array:
    """Exponential moving average, without the bias of its start."""
    smoothed, decay = np.empty_like(values), 0.95
    total = weight = 0.0
    for number, value in enumerate(values):
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        smoothed[number] = total / weight
    return smoothed


def _cycle(count: int) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(count)]
