"""The command line: `python -m benchmarks [case ...]`, and one more command for each name in `COMMANDS`."""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from benchmarks import (
    compare,
    isolate,
    overheads,
    paths,
    peers,
    plan,
    plot,
    readme,
    results,
    roofline,
    static_command,
    targets,
    warm,
)
from benchmarks.against import ROUNDS, Against, against, is_commit
from benchmarks.cases import Builder, builders
from benchmarks.harness import Harness, ratio, untimed, usable
from benchmarks.results import ROOT, Result, Run
from benchmarks.telemetry import Telemetry

QUICK_SECONDS = 0.2  # at least timing.MIN_ROUNDS calls all the same
FULL_SECONDS = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]][0](words[1:])
    return _bench(words)


def _bench(words: list[str]) -> int:
    described = (f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure cases side by side with what else does the same work, on one device in one run.",
        epilog="other commands, each with a --help of its own:\n" + "\n".join(described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", help="names of cases, or parts of them; default: all for the device")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="no curves, short timing, new rows first, little that compiles",
    )
    parser.add_argument("--variants", nargs="+", default=[], help="only these, by name")
    parser.add_argument("--without", nargs="+", default=[], help="not these variants")
    parser.add_argument("--seconds", type=float, help="timing of one case and mode, over all variants")
    parser.add_argument("--budget-s", type=float, default=_budget(), help="start no case after this many seconds")
    parser.add_argument("--energy", action="store_true", help="measure energy too (a second a variant and mode more)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="append the results to this file, each as soon as it exists")
    parser.add_argument("--save", action="store_true", help="append the results to benchmarks/results/<device>.jsonl")
    parser.add_argument(
        "--against",
        metavar="REV",
        help="time this project's variants here and at another commit, in processes that take turns, and name what got "
        "slower beyond what processes of one tree differ by: wants an idle machine",
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="survive crashes and hangs: run in a child process, started anew without the variant that ended it",
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        default=120.0,
        help="with --isolate: most seconds of making one variant ready, or of timing one mode",
    )
    parser.add_argument("--list", action="store_true", help="only name the cases, in the order in which they run")
    parser.add_argument("--plan", action="store_true", help="only name the cases and when each should be done")
    args = parser.parse_args(words)
    if args.against is not None and not is_commit(args.against):
        parser.error(f"--against: no such commit here: {args.against}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    kind = _kind(args.device)
    chosen = _chosen(kind, args.cases, args.json if args.quick else None, quick=args.quick)
    seconds = args.seconds or (QUICK_SECONDS if args.quick else FULL_SECONDS)
    if not chosen:
        print(f"benchmarks: no case for {kind} contains {', '.join(args.cases)}. See --list.", file=sys.stderr)
        return 2
    if args.list:
        print(f"{len(chosen)} cases in the order in which they run: what the targets ask for first", file=sys.stderr)
        print("\n".join(chosen))
        return 0
    if args.plan:
        print(plan.table([build() for build in chosen.values()], seconds, quick=args.quick, energy=args.energy))
        return 0
    if kind == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks: {len(chosen)} GPU cases skipped: no CUDA device here. On one, run ci/gpu.", file=sys.stderr)
        return 2
    if args.isolate:
        return _isolated(args, words, list(chosen))
    return _measure(args, kind, chosen, seconds)


def _chosen(kind: str, wanted: Sequence[str], seen: Path | None, *, quick: bool) -> dict[str, Builder]:
    """Cases by name, or by a part of it where there is none of that name, in the order in which they run: quickly means
    what has no row first, neither a committed one nor one in the file ``seen``.
    """
    known = builders(kind)
    names = {name for word in wanted for name in ([word] if word in known else [n for n in known if word in n])}
    measured = {case for case, _, _ in results.latest(kind)} if quick else set()
    if seen is not None and seen.exists():
        measured |= {row.case for row in results.read(seen)[1]}
    chosen = (name for name in known if name in names or not wanted)
    return {name: known[name] for name in plan.ordered(chosen, measured)}


def _kind(device: str) -> str:
    """The kind of device that an option means."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _files(args: argparse.Namespace, run: Run) -> list[Path]:
    """Where the results of a run go."""
    saved = results.RESULTS / f"{results.slug(run.device)}.jsonl"
    return [args.json] * bool(args.json) + [saved] * args.save


def _budget() -> float:
    return float(os.environ.get("FUSEDMM_BENCH_BUDGET_S", "inf"))


def _isolated(args: argparse.Namespace, words: list[str], names: list[str]) -> int:
    """The same in a child, started anew where a variant ended it."""
    deadline = time.monotonic() + args.budget_s
    options = [word for word in words if word not in args.cases and word != "--isolate"]
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"

        def command(left: Sequence[str], without: Sequence[str]) -> list[str]:
            last = ["--budget-s", str(max(0.0, deadline - time.monotonic()))]
            if without:
                last += ["--without", *args.without, *without]
            return [sys.executable, "-m", "benchmarks", *left, *options, *last]

        def report(case: str, variant: str, why: str) -> None:
            print(f"\n{case}\n  {variant} crashed: {why}", flush=True)
            if args.json is not None and args.json.exists():
                run = list(results.read(args.json)[0])[-1]
                results.append(args.json, [Result(run, case, "all", variant, {}, "crashed", why)])

        return isolate.run(names, command, progress, args.limit_s, report)


def _measure(args: argparse.Namespace, kind: str, chosen: dict[str, Builder], seconds: float) -> int:
    deadline = time.monotonic() + args.budget_s
    device = torch.device(kind)
    telemetry, ceilings = Telemetry(device), roofline.measure(device)
    run = results.describe_run(device, ceilings, telemetry)
    print(f"{run.device}: copy {run.copy_gb_s} GB/s, matrix product {run.matrix_tflops} TFLOP/s, commit {run.commit}")
    print("median [20th, 80th percentile]; of ceiling: share of what bounds it, above; x: times as long as fusedmm")
    if kind == "cuda" and telemetry.missing:
        print(f"clocks, power and energy are not read ({telemetry.missing}): no ratios are shown")
    files = _files(args, run)
    for file in files:
        results.append(file, [run])

    def keep(result: Result) -> None:
        for file in files:
            results.append(file, [result])

    compiling = plan.compiled_quickly() if args.quick else None
    harness = Harness(
        device, ceilings, telemetry, run.id, seconds, args.energy, args.variants, args.without, compiling, keep, _begin
    )
    found: list[Result] = []
    theirs: list[Result] = []
    each = max(QUICK_SECONDS, seconds / ROUNDS)  # of a process, which takes seconds to start
    options = ["--device", kind, "--seconds", str(each), "--threads", str(torch.get_num_threads())]
    with against(args.against, options) if args.against else nullcontext() as other:
        for name, build in chosen.items():
            left = deadline - time.monotonic()
            try:
                rows, beside = _case(name, build, harness, other, quick=args.quick, left_s=left)
            except Exception as error:  # it costs this case, and no other
                traceback.print_exc()
                rows, beside = [untimed(Result(run.id, name, "all", "fusedmm", {}, ""), error)], []
                if usable(device):
                    keep(rows[0])
            if not usable(device):
                print(f"{name}: this process can no longer use the GPU", flush=True)
                return isolate.CRASHED
            found += rows
            theirs += beside
    wrong = [r for r in found if r.variant.startswith("fusedmm") and r.status not in (results.TIMED, "skipped")]
    for result in wrong:
        print(f"benchmarks: {result.case} {result.mode} {result.variant} {result.status}: {result.reason}")
    if args.against is not None:
        return compare.report(compare.changes(theirs, found)) or bool(wrong)
    return 1 if wrong else 0


def _begin(case: str, variant: str = "") -> None:
    """Tell whoever watches this process what is at hand."""
    if isolate.PROGRESS in os.environ:
        with open(os.environ[isolate.PROGRESS], "a") as progress:
            progress.write(f"{case} {variant}\n")


def _case(
    name: str, build: Builder, harness: Harness, other: Against | None, *, quick: bool, left_s: float
) -> tuple[list[Result], list[Result]]:
    """One case here or, if asked for, in turn with the other commit; printed as one table.

    Not where less time is left than it should take: then a shorter one may still be run.
    """
    if left_s <= 0:
        print(f"{name}: not run, the time budget is spent", flush=True)
        return [], []
    try:
        case = build()
    except ImportError as error:
        print(f"{name}: skipped, {error}", flush=True)
        return [], []
    if quick and not case.quick:
        print(f"{name}: left out by --quick", flush=True)
        return [], []
    needed = plan.estimate_s(case, harness.seconds, quick=quick, energy=harness.energy)
    if left_s < needed:
        print(f"{name}: not run, it may take {needed:.0f} s and {left_s:.0f} s are left", flush=True)
        return [], []
    _begin(name)
    named = [variant.name for variant in case.variants]
    if harness.only and not set(harness.only) & set(named):
        print(f"{name}: nothing to run, its variants are {', '.join(named)}", flush=True)
        return [], []
    if other is None:
        rows = harness.results(case)
        print(table(name, rows), flush=True)
        return rows, []
    ours = [v for v in case.variants if v.ours and v.name not in harness.without]
    blanks = [
        Result(harness.run, name, mode, variant.name, dict(case.sizes), status="")
        for mode in case.modes
        for variant in ours
        if mode in variant.modes and (not harness.only or variant.name in harness.only)
    ]
    if not blanks:
        print(f"{name}: nothing to compare, none of its variants is this project's", flush=True)
        return [], []
    rows, beside = other.results(blanks)
    for row in rows:
        harness.keep(row)
    print(table(name, [*rows, *other.renamed(beside)]), flush=True)
    return rows, beside


def table(name: str, rows: Sequence[Result]) -> str:
    """One case for people; the ratio is how many times as long a variant takes as fusedmm, where clocks allow one."""
    width = max((len(row.variant) for row in rows), default=7)
    modes = list(dict.fromkeys(row.mode for row in rows))
    lines = [f"\n{name}"]
    for row in sorted(rows, key=lambda row: modes.index(row.mode)):
        if row.median_ms is None:
            lines.append(f"  {row.mode:<14}{row.variant:<{width}}  {row.status}: {row.reason}")
            continue
        ours = [other for other in rows if other.mode == row.mode and other.variant == "fusedmm"]
        times = ratio(ours[0], row) if ours else None
        against = "-" if times is None else f"{times:.2f}x"
        lines.append(
            f"  {row.mode:<14}{row.variant:<{width}}{row.median_ms:>11.4f} ms [{row.p20_ms:.4f}, {row.p80_ms:.4f}]"
            f"  {row.tflops:8.3g} TFLOP/s  {row.share:6.1%} of ceiling  {row.peak_mib:9.1f} MiB"
            f"  {against:>7}  error {row.worst_error:.1e}{_state(row)}"
        )
    return "\n".join(lines)


def _state(row: Result) -> str:
    """What was read of the GPU while a variant ran."""
    parts = []
    if row.clock_mhz:
        parts.append(f"{row.clock_mhz:.0f} MHz")
    if row.power_w is not None and row.energy_mj is not None:
        parts.append(f"{row.power_w:.0f} W, {row.energy_mj:g} mJ")
    if row.throttled not in (None, "no"):
        parts.append(f"throttled: {row.throttled}")
    return "".join(f"  {part}" for part in parts)


def _static(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks static", description=static_command.__doc__)
    static_command.add_arguments(parser)
    args = parser.parse_args(words)
    status = static_command.run(args)
    return readme.run(check=False) or status if args.update else status  # the README shows the table


def _compare(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=compare.__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args(words)
    for file in (args.before, args.after):
        if not file.is_file():
            parser.error(f"no such file: {file}")
    return compare.run(args.before, args.after)


def _plot(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=plot.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    return plot.run(parser.parse_args(words).out)


def _keep(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks keep", description=results.keep.__doc__)
    parser.add_argument("results", type=Path, help="a result file, such as ci/gpu leaves")
    file = parser.parse_args(words).results
    if not file.is_file():
        parser.error(f"no such file: {file}")
    for kept in results.keep(file):
        print(f"keep: appended to {kept}")
    return max(plot.run(ROOT / "docs" / "figures"), readme.run(check=False), targets.run(check=False))


def _readme(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=readme.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the README is out of date")
    return readme.run(check=parser.parse_args(words).check)


def _targets(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks targets", description=targets.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page is out of date")
    return targets.run(check=parser.parse_args(words).check)


def _paths(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks paths", description=paths.__doc__)
    parser.add_argument("results", type=Path, help="a result file; its newest run of each case counts")
    return paths.run(parser.parse_args(words).results)


def _overheads(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overheads", description=overheads.__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="append the results to this file")
    parser.add_argument("--save", action="store_true", help="append the results to benchmarks/results/<device>.jsonl")
    parser.add_argument("--list", action="store_true", help="only name what is measured")
    args = parser.parse_args(words)
    if args.list:
        print("\n".join(overheads.CASES))
        return 0
    kind = _kind(args.device)
    if kind == "cuda" and not torch.cuda.is_available():
        print("benchmarks: overheads of a GPU skipped: no CUDA device here. On one, run ci/gpu.", file=sys.stderr)
        return 2
    device = torch.device(kind)
    telemetry = Telemetry(device)
    run = results.describe_run(device, roofline.measure(device), telemetry)
    found = list(overheads.Overheads(device, telemetry, run.id).rows())
    print(overheads.table(found))
    for file in _files(args, run):
        results.append(file, [run, *found])
    return int(any(row.status not in (results.TIMED, "skipped") for row in found))


def _warm(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks warm", description=warm.__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases, or parts of them; default: all for the device")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="only what a run with --quick needs")
    parser.add_argument("--without", nargs="+", default=[], help="not these variants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; 1: all in this one")
    args = parser.parse_args(words)
    kind = _kind(args.device)
    if kind == "cuda" and not torch.cuda.is_available():
        print("benchmarks: nothing to warm up: no CUDA device here. On one, run ci/gpu.", file=sys.stderr)
        return 2
    chosen = _chosen(kind, args.cases, None, quick=args.quick)
    if not chosen:
        print(f"benchmarks: no case for {kind} contains {', '.join(args.cases)}. See --list.", file=sys.stderr)
        return 2
    cases = {}
    for name, build in chosen.items():
        with suppress(ImportError):
            cases[name] = build()
    if args.jobs > 1:
        cost = {name: plan.estimate_s(case, 0.0, quick=args.quick, energy=False) for name, case in cases.items()}
        cost = {name: seconds for name, seconds in cost.items() if seconds}  # --quick leaves out the others
        options = ["--device", kind, "--jobs", "1", *["--quick"] * args.quick]
        without = ["--without", *args.without] if args.without else []
        command = [sys.executable, "-m", "benchmarks", "warm", *options, *without, "--"]
        return warm.side_by_side(cost, command, args.jobs)
    compiling = plan.compiled_quickly() if args.quick else None
    for case in cases.values():
        warm.once(case, torch.device(kind), args.without, compiling)
    return 0


def _wheels(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ci/wheels", description=peers.__doc__)
    parser.add_argument("--group", default="default")
    parser.add_argument("--out", type=Path, default=ROOT / ".wheels")
    args = parser.parse_args(words)
    return peers.gather(args.group, args.out)


COMMANDS = {
    "warm": (_warm, "what a run would compile, compiled side by side before it"),
    "static": (_static, "registers, spills and modelled share of every kernel, compiled without a GPU"),
    "compare": (_compare, "what got slower or larger from one result file to another"),
    "overheads": (_overheads, "host time, CUDA graphs, metadata, recompilation"),
    "paths": (_paths, "which Hopper kernels a measurement justifies"),
    "keep": (_keep, "a result file's rows to benchmarks/results, and all that is written from there anew"),
    "plot": (_plot, "figures from committed results"),
    "readme": (_readme, "the README's performance section and docs/performance.md, from committed results"),
    "targets": (_targets, "docs/targets.md, from committed results"),
    "wheels": (_wheels, "the peers' wheels, for a machine without a network"),
}
