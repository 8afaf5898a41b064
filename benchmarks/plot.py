"""`python -m benchmarks plot`: figures from committed results alone, as SVG.

Speed and memory against peers, the roofline, and scaling curves; of the GPU results where there are any, else of the
CPU's. The caption names machine, versions and commit.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import ratio
from benchmarks.results import TIMED, Result, Run, latest

OURS = "#1b5e9b"
# One look for each peer in every figure: told apart by shape too, so that a print in grey still reads.
COLOURS = ("#d1495b", "#e0913b", "#3a7d44", "#6d597a", "#8c6d46", "#17808f", "#b56576", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
CURVES = {  # what grows, and the cases whose names end with how much
    "tokens of a sample": "scaling/tokens-",
    "modalities": "scaling/modalities-",
    "share of the modalities that is active": "attention/active-",
    "rows N": "scaling/rows-",
    "classes V": "scaling/classes-",
}

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
    cases = [
        case for case in dict.fromkeys(case for case, _, _ in timed) if not case.startswith(("scaling/", "overheads/"))
    ]
    cases = [case for case in cases if any((case, mode, "fusedmm") in timed for mode in ("both", "forward"))]
    looks = _looks(timed, cases)
    figure, axes = _figure(1, 2, width=10, height=1.6 + 0.24 * len(cases))
    for axis, compare, title in zip(axes, (ratio, _memory_ratio), ("time", "peak memory"), strict=True):
        for place, case in enumerate(cases):
            mode = "both" if (case, "both", "fusedmm") in timed else "forward"
            ours = timed[case, mode, "fusedmm"][1]
            for variant, look in looks.items():
                other = timed.get((case, mode, variant))
                multiple = None if other is None else compare(ours, other[1])
                if multiple:
                    axis.plot(multiple, -place, linestyle="", markersize=5, alpha=0.9, label=variant, **look)
        axis.axvline(1.0, color=OURS, linewidth=1.5)
        axis.annotate("fusedmm", (1.0, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=OURS)
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis, lowest=0.1)
        axis.set_xlabel(f"{title}, times fusedmm's (right of the line: fusedmm is better)")
        labels = [case if (case, "both", "fusedmm") in timed else f"{case} (forward)" for case in cases]
        axis.set_yticks([-place for place in range(len(cases))], labels if compare is ratio else [])
        axis.grid(alpha=0.25)
    _legend(figure, axes)
    _save(figure, _of(timed, cases), file, "Forward and backward against what else does the same work")


def roofline(timed: Measured, file: Path) -> None:
    """Rate over arithmetic intensity, under the ceilings measured in the same run."""
    mine = {key: row for key, row in timed.items() if key[2] == "fusedmm" and row[1].intensity and row[1].tflops}
    run = max((run for run, _ in (mine or timed).values()), key=lambda run: run.began)
    figure, axes = _figure(1, 1, width=7, height=4.5)
    axis = axes[0]
    rate = max(run.matrix_tflops.values())
    knee = rate * 1e3 / run.copy_gb_s
    intensities = [result.intensity or knee for _, result in mine.values()]
    span = [min([knee, *intensities]) / 4, knee, max([knee, *intensities]) * 4]
    ceiling = f"copying {run.copy_gb_s:g} GB/s, matrix products {rate:g} TFLOP/s"
    axis.plot(span, [min(x * run.copy_gb_s / 1e3, rate) for x in span], color="#444444", linewidth=1, label=ceiling)
    for rank, mode in enumerate(("forward", "both")):
        points = [(r.intensity, r.tflops) for (_, found, _), (_, r) in mine.items() if found == mode]
        if points:
            axis.plot(*zip(*points, strict=True), "o", color=(OURS, COLOURS[0])[rank], label=f"fusedmm, {mode}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP for each byte that must move")
    axis.set_ylabel("TFLOP/s")
    axis.legend(fontsize=8)
    _save(figure, mine or timed, file, "Reached rate under the measured ceilings")


def scaling(timed: Measured, file: Path) -> None:
    """Time of forward and backward over what grows, everything else fixed."""
    shown = {label: prefix for label, prefix in CURVES.items() if any(case.startswith(prefix) for case, _, _ in timed)}
    cases = [case for case, _, _ in timed if case.startswith(tuple(shown.values()))]
    looks = {"fusedmm": {"color": OURS, "marker": "o"}, **_looks(timed, cases)}
    figure, axes = _figure(1, max(1, len(shown)), width=3.2 * max(2, len(shown)), height=3.6)
    for axis, (label, prefix) in zip(axes, shown.items(), strict=False):
        for variant, look in looks.items():
            points = sorted(
                (float(case.removeprefix(prefix)), result.median_ms)
                for (case, mode, found), (_, result) in timed.items()
                if found == variant and mode == "both" and case.startswith(prefix)
            )
            if points:
                width = 2.0 if variant == "fusedmm" else 1.0
                axis.plot(*zip(*points, strict=True), linewidth=width, markersize=4, label=variant, **look)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _plain_ticks(axis.xaxis)
        axis.tick_params(axis="x", labelrotation=45)
        _plain_ticks(axis.yaxis)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, high / 8), high)  # or noise on a flat curve fills the panel
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("forward and backward, ms")
    _legend(figure, axes)
    _save(figure, _of(timed, cases), file, "How cost grows")


FIGURES = {"speed-and-memory": speed_and_memory, "roofline": roofline, "scaling": scaling}


def _memory_ratio(ours: Result, other: Result) -> float | None:
    """How many times as much memory the other holds."""
    return other.peak_mib / ours.peak_mib if ours.peak_mib and other.peak_mib else None


def _of(timed: Measured, cases: Collection[str]) -> Measured:
    """The rows of these cases."""
    return {key: row for key, row in timed.items() if key[0] in cases}


def _looks(timed: Measured, cases: Collection[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of everyone else who has a row of these cases, fusedmm's other variants among them."""
    everyone = sorted({variant for _, _, variant in timed if variant != "fusedmm"})
    here = {variant for case, _, variant in timed if case in cases}
    return {
        variant: {
            "color": COLOURS[rank % len(COLOURS)],
            "marker": MARKERS[(rank + rank // len(COLOURS)) % len(MARKERS)],  # no two alike: a GPU's are more than 8
        }
        for rank, variant in enumerate(everyone)
        if variant in here
    }


def _legend(figure: Any, axes: list[Any]) -> None:
    """One legend for all panels, each name once."""
    named = {name: mark for axis in axes for mark, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), fontsize=8, loc="lower center", ncols=max(1, min(9, len(named))))


def _plain_ticks(axis: Any, lowest: float = 0.0) -> None:
    """Numbers as one writes them, at 1, 2 and 5, and not as powers of ten."""
    from matplotlib import ticker

    if axis.axis_name == "y" or lowest:
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, place: f"{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fusedmm"  # the same results give the same file
    matplotlib.rcParams["font.size"] = 8
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False)
    return figure, list(axes.flat)


def _save(figure: Any, timed: Measured, file: Path, title: str) -> None:
    from matplotlib import pyplot

    last = max((run for run, _ in timed.values()), key=lambda run: run.began)
    path = "GPU" if last.kind == "cuda" else f"CPU, eager path, {last.threads} thread{'s' * (last.threads > 1)}"
    facts = f"torch {last.versions['torch']}, triton {last.versions['triton']}, commit {last.commit}, {last.began[:10]}"
    figure.suptitle(f"{title}: {path}\n{last.device}, {facts}", fontsize=9)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
