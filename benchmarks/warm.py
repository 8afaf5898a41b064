"""`python -m benchmarks warm`: makes every variant ready and calls it once, in processes side by side, so that a run
finds in the caches on disk what Triton, Inductor and CuTe compile.

A kernel takes seconds of one core to compile and a case has dozens of them: one after another they would be most of a
short run. No time is taken here, and what fails costs nothing: the run that follows says why.
"""

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import torch
from torch._functorch import config as functorch

from benchmarks import plan
from benchmarks.arguments import count
from benchmarks.case import Case, Variant
from benchmarks.gate import Gate
from benchmarks.harness import call_of, quiet, usable
from benchmarks.run_command import add_device, device_kind, is_missing

SINGLE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # of processes that share the cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("cases", nargs="*", help="names of cases, or parts of them; default: all for the device")
    add_device(parser)
    parser.add_argument("--quick", action="store_true", help="only what a run with --quick needs")
    parser.add_argument("--without", nargs="+", default=[], help="not these variants")
    parser.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="processes; 1: all in this one")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where a process did not end well, 2 where there is nothing to warm up."""
    kind = device_kind(args.device)
    if is_missing(kind, "nothing to warm up"):
        return 2
    chosen = plan.chosen(kind, args.cases, None, quick=args.quick)
    if not chosen:
        print(plan.no_case(kind, args.cases), file=sys.stderr)
        return 2
    cases = {}
    for name, build in chosen.items():
        with suppress(ImportError):
            case = build()
            if case.quick or not args.quick:
                cases[name] = case
    if args.jobs > 1:
        cost = {name: plan.estimate_s(case, 0.0, quick=args.quick, energy=False) for name, case in cases.items()}
        options = ["--device", kind, "--jobs", "1", *["--quick"] * args.quick]
        without = ["--without", *args.without] if args.without else []
        command = [sys.executable, "-m", "benchmarks", "warm", *options, *without, "--"]
        return side_by_side(cost, command, args.jobs)
    compiling = plan.compiled_quickly() if args.quick else None
    for name, case in cases.items():
        failed = once(case, torch.device(kind), args.without, compiling)
        print(f"{name}: ready" + f", but for {', '.join(failed)}: a run says why" * bool(failed), flush=True)
    return 0


def side_by_side(cost: Mapping[str, float], command: Sequence[str], jobs: int) -> int:
    """Run ``command`` with every case, divided among at most ``jobs`` processes; 1 where one did not end well.

    Args:
        cost: of a case by name, in any unit.
        command: that takes names of cases as its last arguments.
        jobs: at least 1.
    """
    children = [
        subprocess.Popen([*command, *names], env={**os.environ, **SINGLE}) for names in divided(cost, jobs) if names
    ]
    return int(sum(child.wait() != 0 for child in children) > 0)


def divided(cost: Mapping[str, float], jobs: int) -> list[list[str]]:
    """Names in ``jobs`` lists of about the same cost: longest first, each to the shortest list."""
    lists: list[list[str]] = [[] for _ in range(jobs)]
    spent = [0.0] * jobs
    for name in sorted(cost, key=lambda name: -cost[name]):
        least = spent.index(min(spent))
        lists[least].append(name)
        spent[least] += cost[name]
    return lists


def once(
    case: Case, device: torch.device, without: Collection[str], compiling: Collection[tuple[str, str]] | None
) -> list[str]:
    """Pass every variant of a case through the gate and call it once in each mode; names of those that failed.

    Args:
        case: to make ready.
        device: where.
        without: names of variants to leave out.
        compiling: as in `benchmarks.harness.Harness`.

    Raises:
        Exception: whatever a variant raises that leaves the device unusable to this process.
    """
    gate, problem = Gate(case, device), case.problem(device)
    failed = []
    with functorch.patch(donated_buffer=False), quiet():  # as where it is timed: the caches tell the two apart
        for variant in case.variants:
            if variant.name not in without and case.may_take(variant, compiling):
                if not _call(case, variant, gate, problem):
                    failed.append(variant.name)
                gc.collect()
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return failed


def _call(case: Case, variant: Variant, gate: Gate, problem: object) -> bool:
    """Whether it could be called."""
    try:
        gate.check(variant)
        prepared = variant.prepare(problem)
        for mode in case.modes:
            if mode in variant.modes:
                call_of(prepared, mode)()
    except Exception:
        if not usable(gate.device):
            raise
        return False
    return True
