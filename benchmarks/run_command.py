"""`python -m benchmarks [case ...]`: measures cases, here or in a child process, and prints a table of each."""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from benchmarks import compare, isolate, plan, results, roofline
from benchmarks.against import ROUNDS, Against, against, is_commit
from benchmarks.arguments import count, new_file, seconds
from benchmarks.cases import Builder
from benchmarks.harness import Harness, ratio, untimed, usable
from benchmarks.memory import use_heap
from benchmarks.results import Result, Run
from benchmarks.telemetry import Telemetry

QUICK_SECONDS = 0.2  # at least timing.MIN_ROUNDS calls all the same
FULL_SECONDS = 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("cases", nargs="*", help="names of cases, or parts of them; default: all for the device")
    add_device(parser)
    parser.add_argument(
        "--quick", action="store_true", help="no curves, short timing, new rows first, little that compiles"
    )
    parser.add_argument("--variants", nargs="+", default=[], help="only these, by name")
    parser.add_argument("--without", nargs="+", default=[], help="not these variants")
    parser.add_argument("--seconds", type=seconds, help="timing of one case and mode, over all variants")
    parser.add_argument("--budget-s", type=float, default=_budget(), help="start no case after this many seconds")
    parser.add_argument("--energy", action="store_true", help="measure energy too (a second a variant and mode more)")
    parser.add_argument(
        "--threads", type=count, default=1, help="of a CPU; 1 tells when something else is on the core, more do not"
    )
    parser.add_argument("--json", type=new_file, help="append the results to this file, each as soon as it exists")
    parser.add_argument("--save", action="store_true", help="append the results to this device's in benchmarks/results")
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
        type=seconds,
        default=120.0,
        help="with --isolate: most seconds of making one variant ready, or of timing one mode",
    )
    parser.add_argument("--list", action="store_true", help="only name the cases, in the order in which they run")
    parser.add_argument("--plan", action="store_true", help="only name the cases and when each should be done")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option that `device_kind` reads."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def device_kind(option: str) -> str:
    """The kind of device that ``--device`` means: "cuda" or "cpu"."""
    return option if option != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def is_missing(kind: str, what: str) -> bool:
    """Whether there is no device of this kind here; then says what is not done for want of it."""
    if kind != "cuda" or torch.cuda.is_available():
        return False
    print(f"benchmarks: {what}: no CUDA device here. On one, run ci/gpu.", file=sys.stderr)
    return True


def files(args: argparse.Namespace, run: Run) -> list[Path]:
    """Where ``--json`` and ``--save`` put the results of a run."""
    return [args.json] * bool(args.json) + [results.next_file(run.device)] * args.save


def run(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Measure what the words ask for; 0 where all of this project's variants are timed, or say why not."""
    args = parser.parse_args(words)
    if args.against is not None and not is_commit(args.against):
        parser.error(f"--against: no such commit here: {args.against}")
    kind = device_kind(args.device)
    if kind == "cpu":
        torch.set_num_threads(args.threads)
    chosen = plan.chosen(kind, args.cases, args.json if args.quick else None, quick=args.quick)
    each_s = args.seconds or (QUICK_SECONDS if args.quick else FULL_SECONDS)
    if not chosen:
        print(plan.no_case(kind, args.cases), file=sys.stderr)
        return 2
    if args.list:
        print(f"{len(chosen)} cases in the order in which they run: what the targets ask for first", file=sys.stderr)
        print("\n".join(chosen))
        return 0
    if args.plan:
        print(plan.table([build() for build in chosen.values()], each_s, quick=args.quick, energy=args.energy))
        return 0
    if is_missing(kind, f"{len(chosen)} GPU cases skipped"):
        return 2
    if isolate.PROGRESS not in os.environ:
        unknown, known = _unknown(args.variants, chosen)
        if unknown and len(unknown) == len(set(args.variants)):
            parser.error(f"--variants: no case has {', '.join(unknown)}; there are {', '.join(known)}")
        if unknown:
            print(f"benchmarks: no case has {', '.join(unknown)}", file=sys.stderr)
    if args.isolate:
        return _isolated(args, words, list(chosen))
    return _measure(args, kind, chosen, each_s)


def _unknown(variants: Sequence[str], chosen: Mapping[str, Builder]) -> tuple[list[str], list[str]]:
    """Which of these no case has, and what those have that were built to find them."""
    left, known = set(variants), set[str]()
    for build in chosen.values():
        if not left:
            break
        with suppress(ImportError):
            known |= {variant.name for variant in build().variants}
            left -= known
    return sorted(left), sorted(known)


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


def _measure(args: argparse.Namespace, kind: str, chosen: Mapping[str, Builder], each_s: float) -> int:
    deadline = time.monotonic() + args.budget_s
    device = torch.device(kind)
    use_heap()
    telemetry, ceilings = Telemetry(device), roofline.measure(device)
    run = results.describe_run(device, ceilings, telemetry)
    print(f"{run.device}: copy {run.copy_gb_s} GB/s, matrix product {run.matrix_tflops} TFLOP/s, commit {run.commit}")
    print("median [20th, 80th percentile]; of ceiling: share of what bounds it, above; x: times as long as fusedmm")
    if kind == "cuda" and telemetry.missing:
        print(f"clocks, power and energy are not read ({telemetry.missing}): no ratios are shown")
    kept = files(args, run)
    for file in kept:
        results.append(file, [run])

    def keep(result: Result) -> None:
        for file in kept:
            results.append(file, [result])

    harness = Harness(
        device=device,
        ceilings=ceilings,
        telemetry=telemetry,
        run=run.id,
        seconds=each_s,
        energy=args.energy,
        only=args.variants,
        without=args.without,
        compiling=plan.compiled_quickly() if args.quick else None,
        keep=keep,
        begin=_begin,
    )
    found: list[Result] = []
    theirs: list[Result] = []
    round_s = max(QUICK_SECONDS, each_s / ROUNDS)  # of a process, which takes seconds to start
    options = ["--device", kind, "--seconds", str(round_s), "--threads", str(args.threads)]
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
    print(table(name, [*rows, *other.renamed(beside)], shares=False), flush=True)  # each process has its own ceilings
    return rows, beside


def table(name: str, rows: Sequence[Result], *, shares: bool = True) -> str:
    """One case for people; the ratio is how many times as long a variant takes as fusedmm, where clocks allow one.
    ``shares``: of the ceilings.
    """
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
            f"  {row.tflops:8.3g} TFLOP/s  {f'{row.share:6.1%} of ceiling  ' * shares}{row.peak_mib:9.1f} MiB"
            f"  {against:>7}  error {row.worst_error:.1e}{_state(row)}"
        )
    return "\n".join(lines)


def _state(row: Result) -> str:
    """What was read of the device while a variant ran."""
    parts = ["shared core"] if row.own_core is False else []
    if row.reason:
        parts.append(row.reason)
    if row.clock_mhz:
        parts.append(f"{row.clock_mhz:.0f} MHz")
    if row.power_w is not None and row.energy_mj is not None:
        parts.append(f"{row.power_w:.0f} W, {row.energy_mj:g} mJ")
    if row.throttled not in (None, "no"):
        parts.append(f"throttled: {row.throttled}")
    return "".join(f"  {part}" for part in parts)
