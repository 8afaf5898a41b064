"""`python -m benchmarks readme`: writes the README's performance section from committed results alone.

Nothing in that section is typed by hand: what has no committed result says "not measured yet", with the command that
will measure it.
"""

from collections.abc import Sequence

from benchmarks.cases import builders
from benchmarks.harness import ratio
from benchmarks.results import RESULTS, ROOT, TIMED, Result, Run, latest
from benchmarks.static import Row, read_rows

README = ROOT / "README.md"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
NOT_MEASURED = "not measured yet: `ci/gpu --quick`"
GPU_COMMAND = "`ci/gpu` on a machine with a GPU, then append its results.jsonl to benchmarks/results/"
STATIC_ARCH = "sm_90"
STATIC_NAMES = ("d64,bf16", "d128,bf16", "distillation")
Latest = dict[tuple[str, str, str], tuple[Run, Result]]


def run(*, check: bool) -> int:
    """Rewrite the section; with ``check`` only say whether it would change."""
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"readme: README.md must have one {BEGIN} and one {END}.")
        return 1
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    new = f"{head}{BEGIN}\n{section()}\n{END}{tail}"
    if check:
        fresh = new == text
        print("readme: up to date" if fresh else "readme: out of date. Run python -m benchmarks readme.")
        return 0 if fresh else 1
    README.write_text(new)
    print("readme: wrote the performance section")
    return 0


def section() -> str:
    """The whole section."""
    parts = [gpu_part(latest("cuda")), cpu_part(latest("cpu")), static_part()]
    return "\n\n".join(part for part in parts if part)


def gpu_part(found: Latest) -> str:
    """Every GPU case: time, rate, share of the measured ceiling, and the fastest other; or that it is not measured."""
    if not found:
        names = ", ".join(f"`{name}`" for name in builders("cuda"))
        return f"**GPU: not measured yet.** Command: {GPU_COMMAND}. It will fill: {names}."
    lines = [f"**GPU: {_machine(found)}**", ""]
    lines += ["| case | mode | median ms | TFLOP/s | of ceiling | peak MiB | fastest other | times as long |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in builders("cuda"):
        modes = [mode for mode in ("forward", "both") if (name, mode, "fusedmm") in found]
        if not modes:
            lines.append(f"| {name} | | {NOT_MEASURED} | | | | | |")
        for mode in modes:
            lines.append(_row(name, mode, found, with_rate=True))
    return "\n".join(lines)


def cpu_part(found: Latest) -> str:
    """Ratios only: times on a shared CPU mean little by themselves."""
    if not found:
        return "**CPU: not measured yet.** Command: `python -m benchmarks --device cpu --save`."
    lines = [f"**CPU, the eager path: {_machine(found)}** (`python -m benchmarks --device cpu --save`)", ""]
    lines += [
        "| case | mode | fastest other | times as long as fusedmm | its peak memory / fusedmm's |",
        "|---|---|---|---|---|",
    ]
    for name in builders("cpu"):
        for mode in ("forward", "both"):
            if (name, mode, "fusedmm") in found:
                lines.append(_row(name, mode, found, with_rate=False))
    return "\n".join(lines)


def _row(name: str, mode: str, found: Latest, *, with_rate: bool) -> str:
    ours = found[name, mode, "fusedmm"][1]
    others = [
        result
        for (case, found_mode, variant), (_, result) in found.items()
        if (case, found_mode, result.run) == (name, mode, ours.run)
        and not variant.startswith("fusedmm")
        and result.status == TIMED
    ]
    # Only of the same run: a time of another day says nothing beside this one.
    best = min(others, key=lambda result: result.median_ms or float("inf"), default=None)
    times = None if best is None else ratio(ours, best)
    compared = "no ratio: clocks differ" if times is None else f"{times:.2f}"
    rival = "-" if best is None else best.variant
    if not with_rate:
        memory = "-" if best is None or not ours.peak_mib else f"{(best.peak_mib or 0) / ours.peak_mib:.1f}"
        return f"| {name} | {mode} | {rival} | {compared} | {memory} |"
    if ours.status != TIMED or ours.share is None:
        return f"| {name} | {mode} | {ours.status}: {ours.reason} | | | | | |"
    return (
        f"| {name} | {mode} | {ours.median_ms:.3f} | {ours.tflops:.1f} | {ours.share:.0%} | {ours.peak_mib:.0f} "
        f"| {rival} | {compared} |"
    )


def static_part() -> str:
    """The Hopper kernels from the newest committed static table: read from machine code, the share modelled."""
    files = sorted(RESULTS.glob("static-*.jsonl"), key=lambda file: [int(x) for x in file.stem[7:].split(".")])
    if not files:
        return "**Static table: not compiled yet.** Command: `python -m benchmarks static --update`."
    rows = [
        row
        for row in read_rows(files[-1]).values()
        if row.arch == STATIC_ARCH and row.matrix and any(part in row.name for part in STATIC_NAMES)
    ]
    version = files[-1].stem.removeprefix("static-")
    lines = [
        f"**Compiled for {STATIC_ARCH} by Triton {version}** (`python -m benchmarks static`; the share is a model's)",
        "",
    ]
    lines += [
        "| kernel | registers | spills in the main loop | shared KiB | programs | wgmma in flight | modelled share |"
    ]
    return "\n".join([*lines, "|---|---|---|---|---|---|---|", *(_static_row(row) for row in _shown(rows))])


def _shown(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "plain" in row.name or "gated" in row.name or "attention" not in row.name]


def _static_row(row: Row) -> str:
    flight = "-" if row.in_flight is None else f"{row.in_flight:.0%}"
    share = "-" if row.share is None else f"{row.share:.0%}"
    return (
        f"| `{row.name}` | {row.registers} | {row.main_spills} | {row.shared / 1024:.0f} | {row.programs} "
        f"| {flight} | {share} |"
    )


def _machine(found: Latest) -> str:
    run = max((run for run, _ in found.values()), key=lambda run: run.began)
    threads = f", {run.threads} threads" if run.threads else ""
    software = f"torch {run.versions['torch']}, triton {run.versions['triton']}"
    return f"{run.device}{threads}, {software}, commit {run.commit}, {run.began[:10]}"
