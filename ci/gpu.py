"""The steps of `ci/gpu`, each with its share of the time budget, its output in one log, and a table at the end."""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESERVE_S = 15.0  # kept back to write the table
KILL_S = 10.0  # a process whose GPU hangs may take so long to die, or longer: then it is left behind
NVIDIA_SMI = "nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader"
HOPPER = "tests/test_hopper_numerics.py"
HOPPER_S = 120.0  # what a kernel that waits for ever may cost
# Tests that say nothing about kernels on a GPU, which ci/check runs on any machine, and those of a step of their own.
ELSEWHERE = (
    "benchmark_*",
    "ci",
    "cpu_speed",
    "docs",
    "hopper_numerics",
    "hopper_overlap",
    "hopper_protocol",
    "machine_code",
    "package",
    "static",
    "targets",
    "train*",
)
# Prints what a folder of packages adds to the path
ADDED = """
import site, sys
was = sys.path[:]
site.addsitedir(sys.argv[1])
print(*(path for path in sys.path if path not in was), sep="\\n")
"""


@dataclass(frozen=True)
class Step:
    """A command and the time it may take.

    Attributes:
        name: in the table.
        command: to run.
        share: of the time still left.
        limit_s: seconds, whatever is left.
        relies_on: name of an earlier step.
        otherwise: arguments added to the command where that step did not pass.
    """

    name: str
    command: list[str]
    share: float
    limit_s: float = math.inf
    relies_on: str = ""
    otherwise: tuple[str, ...] = ()


def steps(args: argparse.Namespace, out: Path) -> list[Step]:
    """What runs, in order: is it right, does it keep the contract, how fast is it, which kernels should run. What the
    benchmarks compile is compiled before them on all cores: else they would not be done in ten minutes.

    The warp-specialised Hopper kernels have a step of their own: a fault in their barriers is a hang. It costs that
    step alone, and the benchmarks then leave them out.
    """
    python = sys.executable
    # The machine's packages are not those of ci/constraints.txt: their deprecation warnings are not this project's.
    pytest = [python, "-m", "pytest", "-W", "default", "-m", "not speed", "--numprocesses", str(args.workers)]
    ignored = [f"--ignore-glob=tests/test_{name}.py" for name in ELSEWHERE]
    found = [
        Step("tests", [*pytest, "tests", *ignored], 0.16 if args.quick else 0.4),
        Step("Hopper tests", [*pytest, "-v", "-o", "faulthandler_timeout=60", HOPPER], 0.16, HOPPER_S),
    ]
    if args.conformance is not None:
        run = str(args.conformance / "run.py")
        check = [python, run, "--device", "cuda", "--impl", "triton", "--cases", "24"]
        found += [Step(f"conformance seed {seed}", [*check, "--seed", str(seed)], 0.05) for seed in range(3)]
    results = str(out / "results.jsonl")
    bench = [python, "-m", "benchmarks"]
    quick = ["--quick"] if args.quick else []
    cases = [*bench, "--device", "cuda", "--isolate", "--json", results, *(quick or ["--energy"])]
    without = ("--without", "fusedmm-hopper")
    found += [
        Step(
            "compiling", [*bench, "warm", "--device", "cuda", *quick], 0.22, relies_on="Hopper tests", otherwise=without
        ),
        Step("overheads", [*bench, "overheads", "--device", "cuda", "--json", results], 0.12, 60.0),
        Step("benchmarks", cases, 0.95, relies_on="Hopper tests", otherwise=without),
        Step("choice of kernels", [*bench, "paths", results], 1.0),
    ]
    return [step for step in found if not args.only or any(word in step.name for word in args.only)]


def run_step(step: Step, deadline: float, log: Path) -> tuple[str, float]:
    """Run one step inside its share of the time, its output to the screen and the log; (verdict, seconds)."""
    began = time.monotonic()
    limit = min((deadline - began) * step.share, step.limit_s)
    if limit < 5:
        return "not run: the time budget is spent", 0.0
    environment = {**os.environ, "FUSEDMM_BENCH_BUDGET_S": f"{limit - 5:.0f}"}
    with log.open("a") as file:
        file.write(f"\n== {step.name}: {' '.join(step.command)}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            code = process.wait(timeout=limit)
            verdict = "passed" if code == 0 else f"FAILED with exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # test workers and compilers too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=KILL_S)
            verdict = f"STOPPED after its {limit:.0f} s"
    with log.open() as file:
        file.seek(start)
        print(f"\n== {step.name}", "".join(file.readlines()[-40:]), sep="\n", flush=True)
    return verdict, time.monotonic() - began


def show_plan(planned: list[Step], budget: float) -> int:
    """Print the steps with the most that each may take, and the benchmark's cases in their order."""
    left = budget - RESERVE_S
    for step in planned:
        limit = min(left * step.share, step.limit_s)
        print(f"{step.name}, at most {limit:.0f} s: {' '.join(step.command)}", flush=True)
        left -= limit
    print(f"all, at most {budget:.0f} s\n", flush=True)
    cases = [step for step in planned if step.name == "benchmarks"]
    return max((subprocess.run([*step.command, "--plan"], cwd=ROOT).returncode for step in cases), default=0)


def provenance() -> dict[str, str]:
    """What the results depend on and this tree does not hold."""
    import torch
    import triton

    from benchmarks.results import answer, commit

    return {
        "gpu": answer(*NVIDIA_SMI.split()),
        "commit": commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def add_wheels(folder: Path, out: Path) -> str:
    """Unpack the peers' wheels into a folder of this run and put it on the path of the steps; nothing else changes.

    A wheel that is not for this machine costs its peer alone. The verdict, for the table.
    """
    from benchmarks.peers import join

    site = out / ".peers"
    site.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", str(site)]
    wheels = [str(wheel) for wheel in join(folder, out)]
    lost: list[str] = []
    # All at once: some share a package, and pip replaces one that it finds.
    if not wheels or subprocess.run([*pip, *wheels]).returncode:
        fit = [wheel for wheel in wheels if subprocess.run([*pip, "--dry-run", wheel]).returncode == 0]
        lost = [Path(wheel).name for wheel in wheels if wheel not in fit]
        if not fit or subprocess.run([*pip, *fit]).returncode:
            return f"FAILED: no wheel of {folder} could be unpacked"
    # PYTHONPATH is not searched for .pth files, with which CUTLASS's wheels add the folder of their modules: ask site.
    done = subprocess.run([sys.executable, "-c", ADDED, str(site)], capture_output=True, text=True, check=True)
    # After this tree and before the machine's own packages: PYTHONPATH is searched first.
    os.environ["PYTHONPATH"] = ":".join([os.environ["PYTHONPATH"], *done.stdout.splitlines()])
    return f"FAILED for {', '.join(lost)}" if lost else "passed"


def main() -> int:
    """Run every step; 0 only if each ran to its end and passed."""
    parser = argparse.ArgumentParser(prog="ci/gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results")
    parser.add_argument("--budget-s", type=float, help="stop by then, seconds; default 580 with --quick, else 14400")
    parser.add_argument("--only", nargs="+", help="only steps with one of these words in their name")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="test processes")
    parser.add_argument("--wheels", type=Path, help="folder of peers' wheels, from ci/wheels")
    parser.add_argument("--conformance", type=Path, help="folder with the conformance oracle's run.py")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would run and how long it may take; needs no GPU"
    )
    args = parser.parse_args()
    budget = args.budget_s or (580.0 if args.quick else 14400.0)
    deadline = time.monotonic() + budget - RESERVE_S
    out = args.out.resolve()
    if args.dry_run:
        return show_plan(steps(args, out), budget)

    import torch

    if not torch.cuda.is_available():
        print("ci/gpu: no CUDA device here. Run ci/test on a machine without one.", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    (out / "provenance.json").write_text(json.dumps(provenance(), indent=1) + "\n")
    verdicts: dict[str, str] = {}
    rows = []
    if args.wheels is not None:
        began = time.monotonic()
        verdicts["wheels"] = add_wheels(args.wheels, out)
        rows.append(f"{'wheels':<22}{time.monotonic() - began:7.1f} s  {verdicts['wheels']}")
    for step in steps(args, out):
        if verdicts.get(step.relies_on, "passed") != "passed":
            step = replace(step, command=[*step.command, *step.otherwise])
        verdicts[step.name], seconds = run_step(step, deadline, out / "log.txt")
        rows.append(f"{step.name:<22}{seconds:7.1f} s  {verdicts[step.name]}")
    failed = any(verdict != "passed" for verdict in verdicts.values())
    table = "\n".join(rows)
    (out / "table.txt").write_text(table + "\n")
    print(f"\n{table}\nresults in {out}; where this tree is kept: python -m benchmarks keep {out / 'results.jsonl'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
