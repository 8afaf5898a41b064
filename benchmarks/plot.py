"""`python -m benchmarks plot`: figures from committed results alone, as SVG.

Speed and memory against peers, the roofline, and scaling curves; of the GPU results where there are any, else of the
CPU's. The caption names machine, versions and commit.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import TIMED, Result, Run, latest

COLOURS = ("#1b5e9b", "#8fb8de", "#c9c9c9", "#a3a380", "#d8a47f", "#b56576", "#6d597a", "#84a59d", "#444444", "#e0b34f")
OURS = COLOURS[0]

Measured = Mapping[tuple[str, str, str], tuple[Run, Result]]


def run(out: Path) -> int:
    """Draw every figure for which there are results; 1 where there are none."""
    found = latest("cuda") or latest("cpu")
    ours = {(case, mode): result.run for (case, mode, variant), (_, result) in found.items() if variant == "fusedmm"}
    # Only rows of the run that this project's row is from: a time of another day says nothing beside it.
    timed = {
        key: (run, result)
        for key, (run, result) in found.items()
        if result.status == TIMED and ours.get(key[:2]) == run.id
    }
    if not timed:
        print("plot: no committed results. Run python -m benchmarks --save, or ci/gpu on a GPU machine.")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        file = out / f"{name}.svg"
        draw(timed, file)
        print(f"plot: {file}")
    return 0


def speed_and_memory(timed: Measured, file: Path) -> None:
    """Time and peak memory of forward and backward (of the forward, for scores), as multiples of this project's."""
    cases = sorted({case for case, mode, variant in timed if variant == "fusedmm"})
    variants = _variants(timed)
    figure, axes = _figure(1, 2, width=11, height=1.4 + 0.3 * len(cases))
    for axis, attribute, title in zip(axes, ("median_ms", "peak_mib"), ("time", "peak memory"), strict=True):
        for place, case in enumerate(cases):
            mode = "both" if (case, "both", "fusedmm") in timed else "forward"
            base = getattr(timed[case, mode, "fusedmm"][1], attribute)
            for rank, variant in enumerate(variants):
                if (case, mode, variant) in timed:
                    multiple = getattr(timed[case, mode, variant][1], attribute) / max(base, 1e-9)
                    label = None if _labelled(axis, variant) else variant
                    axis.plot(multiple, -place, "o", color=COLOURS[rank % len(COLOURS)], label=label, markersize=5)
        axis.axvline(1.0, color=OURS, linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel(f"{title}, multiple of fusedmm's (left of the line is better than it)")
        axis.set_yticks([-place for place in range(len(cases))], cases if attribute == "median_ms" else [])
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="lower center", ncols=len(variants))
    _save(figure, timed, file)


def roofline(timed: Measured, file: Path) -> None:
    """Rate over arithmetic intensity, under the ceilings measured in the same run."""
    run = next(iter(timed.values()))[0]
    figure, axes = _figure(1, 1, width=7, height=4.5)
    axis = axes[0]
    rate = max(run.matrix_tflops.values())
    knee = rate * 1e3 / run.copy_gb_s
    span = [0.1, knee, 1e4]
    axis.plot(span, [x * run.copy_gb_s / 1e3 if x < knee else rate for x in span], color="#444444", linewidth=1)
    for rank, mode in enumerate(("forward", "both")):
        points = [
            (result.tflops, result.share)
            for (_, found_mode, variant), (_, result) in timed.items()
            if variant == "fusedmm" and found_mode == mode and result.tflops and result.share
        ]
        # A share is of the ceiling at this intensity: where that is the sloped part, it tells the intensity.
        xs = [min(max(tflops / share * 1e3 / run.copy_gb_s, 0.1), 1e4) for tflops, share in points]
        axis.plot(xs, [tflops for tflops, _ in points], "o", color=COLOURS[2 * rank], label=f"fusedmm, {mode}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP for each byte that must move (at the knee or right of it: bound by arithmetic)")
    axis.set_ylabel("TFLOP/s")
    axis.legend(fontsize=8)
    _save(figure, timed, file)


def scaling(timed: Measured, file: Path) -> None:
    """Time over what grows: share of active modalities, attended pairs, classes."""
    panels: list[tuple[str, str, Callable[[Result], float | None]]] = [
        ("share of modalities that is active", "attention/active", lambda r: r.sizes["active"]),
        ("visible query-key pairs", "attention/", lambda r: r.sizes["visible_pairs"] * r.sizes["heads"]),
        ("rows times classes", "distillation/", lambda r: r.sizes["rows"] * r.sizes["classes"]),
    ]
    figure, axes = _figure(1, len(panels), width=12, height=3.8)
    for axis, (label, prefix, size) in zip(axes, panels, strict=True):
        for rank, variant in enumerate(_variants(timed)):
            points = sorted(
                (size(result), result.median_ms)
                for (case, mode, found), (_, result) in timed.items()
                if found == variant and mode == "forward" and case.startswith(prefix)
            )
            if points:
                xs, ys = zip(*points, strict=True)
                colour = COLOURS[rank % len(COLOURS)]
                axis.plot(xs, ys, "o-" if prefix.endswith("active") else "o", color=colour, label=variant, markersize=4)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward, ms")
    axes[0].legend(fontsize=7)
    _save(figure, timed, file)


FIGURES = {"speed-and-memory": speed_and_memory, "roofline": roofline, "scaling": scaling}


def _variants(timed: Measured) -> list[str]:
    names = {variant for _, _, variant in timed}
    return sorted(names, key=lambda name: (not name.startswith("fusedmm"), name))


def _labelled(axis: Any, label: str) -> bool:
    return label in axis.get_legend_handles_labels()[1]


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fusedmm"  # the same results give the same file
    matplotlib.rcParams["font.size"] = 8
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False)
    return figure, list(axes.flat)


def _save(figure: Any, timed: Measured, file: Path) -> None:
    from matplotlib import pyplot

    runs = {run.id: run for run, _ in timed.values()}
    last = max(runs.values(), key=lambda run: run.began)
    threads = f", {last.threads} threads" if last.threads else ""
    caption = f"{last.device}{threads}, torch {last.versions['torch']}, triton {last.versions['triton']}"
    figure.suptitle(f"{caption}, commit {last.commit}, {last.began[:10]}", fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
