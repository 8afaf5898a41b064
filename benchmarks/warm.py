"""`python -m benchmarks warm`: makes every variant ready and calls it once, in processes side by side, so that a run
finds in the caches on disk what Triton, Inductor and CuTe compile.

A kernel takes seconds of one core to compile and a case has dozens of them: one after another they would be most of a
short run. No time is taken here, and what fails costs nothing: the run that follows says why.
"""

import gc
import os
import subprocess
from collections.abc import Collection, Mapping, Sequence

import torch
from torch._functorch import config as functorch

from benchmarks.case import Case, Variant
from benchmarks.gate import Gate
from benchmarks.harness import call_of, quiet, usable

# of a process that shares the cores with the others
SINGLE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


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
    """Names in ``jobs`` lists of about the same cost: the dearest first, each to the list that has cost least."""
    lists: list[list[str]] = [[] for _ in range(jobs)]
    spent = [0.0] * jobs
    for name in sorted(cost, key=lambda name: -cost[name]):
        least = spent.index(min(spent))
        lists[least].append(name)
        spent[least] += cost[name]
    return lists


def once(
    case: Case, device: torch.device, without: Collection[str], compiling: Collection[tuple[str, str]] | None
) -> None:
    """Pass every variant of a case through the gate and call it once in each mode.

    Args:
        case: to make ready.
        device: where.
        without: names of variants to leave out.
        compiling: as in `benchmarks.harness.Harness`.

    Raises:
        Exception: whatever a variant raises that leaves the device unusable to this process.
    """
    gate, problem = Gate(case, device), case.problem(device)
    with functorch.patch(donated_buffer=False), quiet():  # as where it is timed: the caches tell the two apart
        for variant in case.variants:
            is_chosen = compiling is None or not variant.compiles or (case.name, variant.name) in compiling
            if variant.name not in without and is_chosen:
                _call(case, variant, gate, problem)
                gc.collect()
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _call(case: Case, variant: Variant, gate: Gate, problem: object) -> None:
    try:
        gate.check(variant)
        prepared = variant.prepare(problem)
        for mode in case.modes:
            if mode in variant.modes:
                call_of(prepared, mode)()
    except Exception:
        if not usable(gate.device):
            raise
