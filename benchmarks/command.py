"""The command line: `python -m benchmarks [case ...]`, and one more command for each name in `COMMANDS`."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import compare, overheads, paths, peers, plot, readme, results, roofline, static_command, targets
from benchmarks.cases import Builder, builders
from benchmarks.harness import Harness, ratio
from benchmarks.results import ROOT, Result, Run
from benchmarks.telemetry import Telemetry

QUICK_SECONDS = 1.0
FULL_SECONDS = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    return _bench(words)


def _bench(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", help="parts of case names; default: all for the device")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="the shorter list of cases and shorter timing")
    parser.add_argument("--variants", nargs="+", default=[], help="only these, by name")
    parser.add_argument("--without", nargs="+", default=[], help="not these variants")
    parser.add_argument("--seconds", type=float, help="timing of one case and mode, over all variants")
    parser.add_argument("--budget-s", type=float, default=_budget(), help="start no case after this many seconds")
    parser.add_argument("--energy", action="store_true", help="measure energy too (a second a variant and mode more)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="append the results to this file")
    parser.add_argument("--save", action="store_true", help="append the results to benchmarks/results/<device>.jsonl")
    parser.add_argument("--against", metavar="REV", help="run the same on another commit and name what got slower")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    args = parser.parse_args(words)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {
        name: build for name, build in builders(kind).items() if not args.cases or any(c in name for c in args.cases)
    }
    if not chosen:
        print(f"benchmarks: no case for {kind} contains {', '.join(args.cases)}. See --list.", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(chosen))
        return 0
    if kind == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks: {len(chosen)} GPU cases skipped: no CUDA device here. On one, run ci/gpu.", file=sys.stderr)
        return 2
    run, found = _measure(args, kind, chosen)
    for file in [args.json] * bool(args.json) + [results.RESULTS / f"{results.slug(run.device)}.jsonl"] * args.save:
        results.append(file, [run, *found])
    wrong = [r for r in found if r.variant.startswith("fusedmm") and r.status not in (results.TIMED, "skipped")]
    for result in wrong:
        print(f"benchmarks: {result.case} {result.mode} {result.variant} {result.status}: {result.reason}")
    if args.against is not None:
        return compare.report(compare.changes(_other_commit(args.against, words), found)) or bool(wrong)
    return 1 if wrong else 0


def _budget() -> float:
    return float(os.environ.get("FUSEDMM_BENCH_BUDGET_S", "inf"))


def _measure(args: argparse.Namespace, kind: str, chosen: dict[str, Builder]) -> tuple[Run, list[Result]]:
    deadline = time.monotonic() + args.budget_s
    device = torch.device(kind)
    telemetry = Telemetry(device)
    ceilings = roofline.measure(device)
    run = results.describe_run(device, ceilings.copy_gb_s, dict(ceilings.matrix_tflops), telemetry.power_limit_w())
    print(f"{run.device}: copy {run.copy_gb_s} GB/s, matrix product {run.matrix_tflops} TFLOP/s, commit {run.commit}")
    if kind == "cuda" and telemetry.missing:
        print(f"clocks, power and energy are not read ({telemetry.missing}): no ratios are shown")
    seconds = args.seconds or (QUICK_SECONDS if args.quick else FULL_SECONDS)
    harness = Harness(device, ceilings, telemetry, run.id, seconds, args.energy, args.variants, args.without)
    found: list[Result] = []
    for name, build in chosen.items():
        if time.monotonic() > deadline:
            print(f"{name}: not run, the time budget is spent", flush=True)
            continue
        try:
            case = build()
        except ImportError as error:
            print(f"{name}: skipped, {error}", flush=True)
            continue
        if args.quick and not case.quick:
            print(f"{name}: left out by --quick", flush=True)
            continue
        rows = harness.results(case)
        print(table(name, rows), flush=True)
        found += rows
    return run, found


def table(name: str, rows: Sequence[Result]) -> str:
    """One case for people; the ratio is how many times as long a variant takes as fusedmm, where clocks allow one."""
    width = max((len(row.variant) for row in rows), default=7)
    lines = [f"\n{name}"]
    for row in rows:
        if row.median_ms is None:
            lines.append(f"  {row.mode:<9}{row.variant:<{width}}  {row.status}: {row.reason}")
            continue
        ours = [other for other in rows if other.mode == row.mode and other.variant == "fusedmm"]
        times = ratio(ours[0], row) if ours else None
        against = "-" if times is None else f"{times:.2f}x"
        lines.append(
            f"  {row.mode:<9}{row.variant:<{width}}{row.median_ms:>11.4f} ms [{row.p20_ms:.4f}, {row.p80_ms:.4f}]"
            f"  {row.tflops:8.3g} TFLOP/s  {row.share:6.1%} of ceiling  {row.peak_mib:9.1f} MiB"
            f"  {against:>7}  error {row.worst_error:.1e}"
        )
    return "\n".join(lines)


def _other_commit(revision: str, words: list[str]) -> list[Result]:
    """Results of this tree's benchmarks on another commit's package, in a worktree that is thrown away."""
    place = words.index("--against")
    rest = [word for word in words[:place] + words[place + 2 :] if word != "--save"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tree, out = scratch / "tree", scratch / "results.jsonl"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), revision], cwd=ROOT, check=True)
        try:
            (scratch / "run").mkdir()
            (scratch / "run" / "benchmarks").symlink_to(ROOT / "benchmarks")
            (scratch / "run" / "fusedmm").symlink_to(tree / "fusedmm")
            environment = {**os.environ, "PYTHONPATH": str(scratch / "run")}
            command = [sys.executable, "-m", "benchmarks", *rest, "--json", str(out)]
            print(f"\n== the same at {revision}", flush=True)
            subprocess.run(command, cwd=scratch / "run", env=environment, check=False)
            return results.read(out)[1] if out.exists() else []
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


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
    return compare.run(args.before, args.after)


def _plot(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=plot.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    return plot.run(parser.parse_args(words).out)


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
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        print("benchmarks: overheads of a GPU skipped: no CUDA device here. On one, run ci/gpu.", file=sys.stderr)
        return 2
    device = torch.device(kind)
    telemetry = Telemetry(device)
    ceilings = roofline.measure(device)
    run = results.describe_run(device, ceilings.copy_gb_s, dict(ceilings.matrix_tflops), telemetry.power_limit_w())
    found = list(overheads.Overheads(device, telemetry, run.id).rows())
    print(overheads.table(found))
    for file in [args.json] * bool(args.json) + [results.RESULTS / f"{results.slug(run.device)}.jsonl"] * args.save:
        results.append(file, [run, *found])
    return int(any(row.status not in (results.TIMED, "skipped") for row in found))


def _wheels(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ci/wheels", description=peers.__doc__)
    parser.add_argument("--group", default="default")
    parser.add_argument("--out", type=Path, default=ROOT / ".wheels")
    args = parser.parse_args(words)
    return peers.gather(args.group, args.out)


COMMANDS = {
    "static": _static,
    "compare": _compare,
    "overheads": _overheads,
    "paths": _paths,
    "plot": _plot,
    "readme": _readme,
    "targets": _targets,
    "wheels": _wheels,
}
