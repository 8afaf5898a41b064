"""`python -m benchmarks readme`: writes the README's performance section, docs/performance.md and the table of small
losses in docs/distillation.md.

All come from committed results alone, nothing is typed by hand: what has no committed result says "not measured yet",
with the command that will measure it. The README holds the GPU's table and one line each on the rest.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from benchmarks.cases import builders, scaling
from benchmarks.harness import ratio
from benchmarks.results import RESULTS, ROOT, TIMED, Result, Run, latest
from benchmarks.static import Row, read_rows

README = ROOT / "README.md"
DETAILS = ROOT / "docs" / "performance.md"
DISTILLATION = ROOT / "docs" / "distillation.md"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
GRID_BEGIN, GRID_END = "<!-- grid:begin -->", "<!-- grid:end -->"
GRID_COMMAND = "`python -m benchmarks scaling/grid --device cpu --seconds 2 --save`"
NOT_MEASURED = "not measured yet: `ci/gpu --quick`"
GPU_COMMAND = "`ci/gpu` on a machine with a GPU, then `python -m benchmarks keep gpu-results/results.jsonl`"
MODES = ("forward", "both", "forward-graph", "both-graph")
FIGURE = "docs/figures/speed-and-memory.svg"
SHOWN = (  # of the CPU's cases, in the README; the worst row comes on top of them
    "attention/dense-gated",
    "attention/jagged-market-day",
    "attention/jagged-call",
    "attention/active-0.125",
    "attention/per-modality",
    "distillation/jsd",
    "distillation/cross-entropy",
    "distillation/scores",
)
STATIC_ARCH = "sm_90"
STATIC_NAMES = ("d64,bf16", "d128,bf16", "distillation")
CPU_HEAD = (
    "| case | mode | fastest other | its time / fusedmm's | its peak memory / fusedmm's |",
    "|---|---|---|---|---|",
)
CPU_MORE = (" called again | shared core |", "---|---|")  # of every row, in the details
Latest = dict[tuple[str, str, str], tuple[Run, Result]]


def run(*, check: bool) -> int:
    """Rewrite all; with ``check`` only say whether they would change."""
    pages = {DETAILS: details()}
    for page, begin, end, part in ((README, BEGIN, END, section()), (DISTILLATION, GRID_BEGIN, GRID_END, grid_part())):
        text = page.read_text()
        if text.count(begin) != 1 or text.count(end) != 1:
            print(f"readme: {page.name} must have one {begin} and one {end}.")
            return 1
        pages[page] = f"{text.split(begin)[0]}{begin}\n{part}\n{end}{text.split(end)[1]}"
    if check:
        stale = [page.name for page, new in pages.items() if not page.exists() or page.read_text() != new]
        print(f"readme: {', '.join(stale)} out of date. Run python -m benchmarks readme." if stale else "readme: fresh")
        return 1 if stale else 0
    for page, new in pages.items():
        page.write_text(new)
    print(f"readme: wrote {', '.join(page.name for page in pages)}")
    return 0


def section() -> str:
    """The README's part: the GPU's rows, the figure, the CPU's telling rows, a line on the compiled kernels."""
    gpu, cpu = latest("cuda"), latest("cpu")
    parts = [gpu_part(gpu) if gpu else f"**GPU: not measured yet.** Command: {GPU_COMMAND}."]
    if gpu or cpu:
        where = "GPU" if gpu else "CPU, eager path"
        parts.append(f"![Time and peak memory against what else does the same work: {where}]({FIGURE})")
    parts += [cpu_line(cpu), *cpu_table(cpu), static_line()]
    return "\n\n".join((*parts, PAGES))


PAGES = """\
Every row of these tables: [docs/performance.md](docs/performance.md); small losses, where calls of operators are what
costs: [docs/distillation.md](docs/distillation.md#speed)."""
LEGEND = """\
- **case**: its inputs, FLOPs, bytes and competitors are in benchmarks/cases; everyone computes the same outputs and
  gradients, and who fails the correctness gate has no number. dense-plain asks for the output alone: on a CPU
  fusedmm's (`need_mass=False`) is then PyTorch's own attention.
- **mode**: forward; both: forward and backward; -graph: replayed as a CUDA graph.
- **on a CPU** a variant's call comes after those of the others. **Called again**: the same ratio of a second call in
  turn, on inputs in other memory, which finds the variant's code in the caches (benchmarks/timing.py).
- **shared core**: the same ratio of calls during which something else was on the core (benchmarks/core.py). Rows whose
  times are of such calls too, for want of others, say so.
- **fastest other**: of everyone else in the same run. Above 1.00 its time is longer than fusedmm's, or its peak
  memory larger.
- **of ceiling**: share of the copy bandwidth or matrix rate measured in the same run, whichever bounds the case.
- **modelled share**: of the matrix units' peak, from the instructions of the main loop; no measurement."""


def details() -> str:
    """Every row that is committed, what is missing, and the curves."""
    title = "# Performance\n\nWritten by `python -m benchmarks readme` from benchmarks/results."
    curves = "![How cost grows](figures/scaling.svg)\n\n![Rate under the measured ceilings](figures/roofline.svg)"
    parts = (title, LEGEND, gpu_part(latest("cuda")), cpu_part(latest("cpu")), curves, static_part())
    return "\n\n".join(parts) + "\n"


NEAR = 1 / 1.1  # within 10 %
# The line counts the first, and names the worst of the others; those of `CURVES` are in figures, not in tables.
OPERATORS, MODULES, CURVES = ("attention/", "distillation/"), "modules/", "scaling/"


def cpu_line(found: Latest) -> str:
    """How many rows of operators in the CPU comparison are at least as fast as the fastest composition, the worst of
    them, and the worst of modules and of curves' points.
    """
    every = _cpu_ratios(found, builders("cpu"))
    ratios, modules, curves = (
        {row: times for row, times in every.items() if row[0].startswith(names)}
        for names in (OPERATORS, MODULES, CURVES)
    )
    if not ratios:
        return cpu_part({})
    good, near = (_count(ratios, least) for least in (1.0, NEAR))
    return (
        f"**CPU, the eager path ({_machine(found)}):** of {len(ratios)} rows of operators {good} are at least as fast "
        f"as the fastest of PyTorch's compositions and {near} within 10 %; the slowest takes {_worst(ratios)}"
        + (f", of modules {_worst(modules)}" if modules else "")
        + (f", of the points of curves {_worst(curves)}" if curves else "")
        + f".{_otherwise(found)}"
    )


def _otherwise(found: Latest) -> str:
    """What the same rows read when called again, and while something else was on the core."""
    operators = [name for name in _listed("cpu") if name.startswith(OPERATORS)]
    again, shared = (_cpu_ratios(_timed_by(found, name), operators) for name in ("again_ms", "shared_ms"))
    lines = []
    if again:
        lines.append(
            f" Called again, with their code in the caches, {_count(again, NEAR)} of {len(again)} are within 10 %; the "
            f"slowest takes {_worst(again)}."
        )
    if shared:
        lines.append(
            f" While something else computes on the same core, {_count(shared, NEAR)} of {len(shared)} are; the "
            f"slowest takes {_worst(shared)}."
        )
    return "".join(lines)


def _timed_by(found: Latest, name: str) -> Latest:
    """Rows with another of their times in place of the median; none of a case and mode in which someone lacks it."""
    lacking = {(row.case, row.mode) for _, row in found.values() if row.status == TIMED and getattr(row, name) is None}
    return {
        key: (run, replace(row, median_ms=getattr(row, name)))
        for key, (run, row) in found.items()
        if (row.case, row.mode) not in lacking
    }


def _count(ratios: Mapping[tuple[str, str], float], least: float) -> int:
    return sum(times >= least for times in ratios.values())


def _worst(ratios: Mapping[tuple[str, str], float]) -> str:
    name, mode = min(ratios, key=lambda row: ratios[row])
    return f"{1 / ratios[name, mode]:.2f} times as long ({name} {mode})"


def cpu_table(found: Latest) -> list[str]:
    """The rows that `SHOWN` names, and the worst one: how many times fusedmm's the fastest other takes and holds."""
    ratios = _cpu_ratios(found, _listed("cpu"))
    if not ratios:
        return []
    worst = min(ratios, key=lambda row: ratios[row])
    rows = [(name, "both" if (name, "both") in ratios else "forward") for name in SHOWN]
    rows = [row for row in rows if row in ratios]
    return ["\n".join([*CPU_HEAD, *(_row(*row, found, with_rate=False) for row in dict.fromkeys([*rows, worst]))])]


def _cpu_ratios(found: Latest, names: Collection[str]) -> dict[tuple[str, str], float]:
    """How many times as long the fastest other takes, by case, of these, and mode."""
    ratios = {}
    for (name, mode, variant), (_, ours) in found.items():
        shown = variant == "fusedmm" and mode in MODES and ours.status == TIMED and name in names
        best = _fastest_other(name, mode, ours, found) if shown else None
        times = None if best is None else ratio(ours, best)
        if times is not None:
            ratios[name, mode] = times
    return ratios


def _listed(kind: str) -> list[str]:
    """Cases that are in tables; the points of curves are in a figure."""
    return [name for name in builders(kind) if not name.startswith(CURVES)]


def static_line() -> str:
    """How many Hopper kernels are compiled, and whether any spills where it matters."""
    version, rows = _static_rows()
    if not rows:
        return static_part()
    spilling = sum(row.spills > 0 for row in rows)
    return (
        f"**Compiled for {STATIC_ARCH} by Triton {version}:** {len(rows)} kernels with matrix products, "
        f"{spilling} of them with register spills (`python -m benchmarks static`)."
    )


def gpu_part(found: Latest) -> str:
    """Every GPU case: time, rate, share of the measured ceiling, and the fastest other; or that it is not measured."""
    if not found:
        names = ", ".join(f"`{name}`" for name in _listed("cuda"))
        return f"**GPU: not measured yet.** Command: {GPU_COMMAND}. It will fill: {names}."
    lines = [f"**GPU: {_machine(found)}**", ""]
    lines += ["| case | mode | median ms | TFLOP/s | of ceiling | peak MiB | fastest other | times as long |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in _listed("cuda"):
        modes = [mode for mode in MODES if (name, mode, "fusedmm") in found]
        modes = modes or ["all"] * ((name, "all", "fusedmm") in found)  # the whole case failed
        if not modes:
            lines.append(f"| {name} | | {NOT_MEASURED} | | | | | |")
        for mode in modes:
            lines.append(_row(name, mode, found, with_rate=True))
    return "\n".join(lines)


def cpu_part(found: Latest) -> str:
    """Ratios only: times on a shared CPU mean little by themselves."""
    if not found:
        return "**CPU: not measured yet.** Command: `python -m benchmarks --device cpu --save`."
    lines = [f"**CPU, the eager path: {_machine(found)}** ({_commands(found)})", ""]
    lines += [f"{line}{more}" for line, more in zip(CPU_HEAD, CPU_MORE, strict=True)]
    again, shared = (_cpu_ratios(_timed_by(found, name), _listed("cpu")) for name in ("again_ms", "shared_ms"))
    for name in _listed("cpu"):
        for mode in MODES:
            if (name, mode, "fusedmm") in found:
                cells = (f"{ratios[name, mode]:.2f}" if (name, mode) in ratios else "-" for ratios in (again, shared))
                lines.append(f"{_row(name, mode, found, with_rate=False)} {' | '.join(cells)} |")
    return "\n".join(lines)


def grid_part() -> str:
    """Losses of few rows and classes: the fastest composition's time, fusedmm's, and how many times as long it is."""
    found = {key: row for key, row in latest("cpu").items() if key[0].startswith("scaling/grid-")}
    if not found:
        return f"**CPU: not measured yet.** Command: {GRID_COMMAND}."
    lines = [
        f"{_machine(found)} ({_commands(found)}, then `python -m benchmarks readme`; these rows alone: {GRID_COMMAND})",
        "",
        "| N | V | forward KL | half forward KL, half cross entropy | JSD(0.5) |",
        "|---|---|---|---|---|",
    ]
    for rows, classes in scaling.GRID:
        names = [scaling.grid_name(rows, classes, loss) for loss in scaling.LOSSES]
        lines.append(f"| {rows} | {classes} | {' | '.join(_grid_cell(name, found) for name in names)} |")
    return "\n".join(lines)


def _grid_cell(name: str, found: Latest) -> str:
    ours = found[name, "both", "fusedmm"][1] if (name, "both", "fusedmm") in found else None
    best = None if ours is None else _fastest_other(name, "both", ours, found)
    times = None if ours is None or best is None else ratio(ours, best)
    if ours is None or best is None or times is None:
        return "not measured yet"
    return f"{best.median_ms:.3f} / {ours.median_ms:.3f} ms: {times:.2f}x"


def _row(name: str, mode: str, found: Latest, *, with_rate: bool) -> str:
    ours = found[name, mode, "fusedmm"][1]
    best = _fastest_other(name, mode, ours, found)
    times = None if best is None else ratio(ours, best)
    compared = "-" if best is None else "no ratio: clocks differ" if times is None else f"{times:.2f}"
    rival = "-" if best is None else best.variant
    if not with_rate:
        compared += ", shared core" if ours.own_core is False else ""
        memory = "-" if best is None or not ours.peak_mib else f"{(best.peak_mib or 0) / ours.peak_mib:.1f}"
        return f"| {name} | {mode} | {rival} | {compared} | {memory} |"
    if ours.status != TIMED or ours.share is None:
        return f"| {name} | {mode} | {ours.status}: {ours.reason} | | | | | |"
    return (
        f"| {name} | {mode} | {ours.median_ms:.3f} | {ours.tflops:.1f} | {ours.share:.0%} | {ours.peak_mib:.0f} "
        f"| {rival} | {compared} |"
    )


def _fastest_other(name: str, mode: str, ours: Result, found: Latest) -> Result | None:
    """Only of the same run: a time of another day says nothing beside this one."""
    others = [
        result
        for (case, found_mode, variant), (_, result) in found.items()
        if (case, found_mode, result.run) == (name, mode, ours.run)
        and not variant.startswith("fusedmm")
        and result.status == TIMED
    ]
    return min(others, key=lambda result: result.median_ms or float("inf"), default=None)


def _static_rows() -> tuple[str, list[Row]]:
    """Triton's version and the Hopper kernels of the newest committed static table."""
    files = sorted(RESULTS.glob("static-*.jsonl"), key=lambda file: [int(x) for x in file.stem[7:].split(".")])
    if not files:
        return "", []
    rows = [row for row in read_rows(files[-1]).values() if row.arch == STATIC_ARCH and row.matrix]
    return files[-1].stem.removeprefix("static-"), rows


def static_part() -> str:
    """The kernels people ask about: read from machine code, the share modelled."""
    version, rows = _static_rows()
    if not rows:
        return "**Static table: not compiled yet.** Command: `python -m benchmarks static --update`."
    rows = [row for row in rows if any(part in row.name for part in STATIC_NAMES)]
    lines = [
        f"**Compiled for {STATIC_ARCH} by Triton {version}** (`python -m benchmarks static`; the share is a model's)",
        "",
    ]
    lines += ["| kernel | registers | spills | shared KiB | programs | wgmma in flight | modelled share |"]
    return "\n".join([*lines, "|---|---|---|---|---|---|---|", *(_static_row(row) for row in _shown(rows))])


def _shown(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "plain" in row.name or "gated" in row.name or "attention" not in row.name]


def _static_row(row: Row) -> str:
    flight = "-" if row.in_flight is None else f"{row.in_flight:.0%}"
    share = "-" if row.share is None else f"{row.share:.0%}"
    return (
        f"| `{row.name}` | {row.registers} | {row.spills} | {row.shared / 1024:.0f} | {row.programs} "
        f"| {flight} | {share} |"
    )


def _runs(found: Latest) -> list[Run]:
    """Of the rows in tables, or, where there are none, of the curves' points."""
    listed = [run for (case, _, _), (run, _) in found.items() if not case.startswith(CURVES)]
    return listed or [run for run, _ in found.values()]


def _run(found: Latest) -> Run:
    """The newest."""
    return max(_runs(found), key=lambda run: run.began)


def _commands(found: Latest) -> str:
    """All that the rows are from: a later one took the place of the rows that it names."""
    runs = sorted(_runs(found), key=lambda run: run.began)
    return ", then ".join(dict.fromkeys(f"`{run.command}`" for run in runs))


def _machine(found: Latest) -> str:
    run, commits = _run(found), len({run.commit for run in _runs(found)})
    threads = f", {run.threads} thread{'s' * (run.threads > 1)}" if run.threads else ""
    software = f"torch {run.versions['torch']}, triton {run.versions['triton']}"
    newest = f" (the newest of {commits})" if commits > 1 else ""
    return f"{run.device}{threads}, {software}, commit {run.commit}{newest}, {run.began[:10]}"
