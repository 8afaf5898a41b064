"""Result files: JSON lines, appended and never rewritten, each result beside the run that it came from.

Committed are ``<device>.jsonl`` and, for runs after it is full, ``<device>.2.jsonl`` and so on. A file holds rows of
two kinds: ``run`` (machine, versions, commit, measured ceilings) and ``result`` (one case, mode and variant of that
run: timed, or with the reason why not).
"""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import core
from benchmarks.peers import versions
from benchmarks.roofline import Ceilings
from benchmarks.telemetry import Telemetry
from benchmarks.timing import MIN_ROUNDS, Times, ranked
from fusedmm.kernels.launch import device_arch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FULL_BYTES = 1 << 19  # of a file, which then gets no further run
TIMED = "timed"
COMMIT = "FUSEDMM_COMMIT"  # environment: the commit of a copy of the tree without git


@dataclass(frozen=True)
class Run:
    """Where and with what a set of results was measured.

    Attributes:
        id: of the run, unique in its file.
        device: name of the GPU, or of the processor.
        kind: "cuda" or "cpu".
        began: UTC.
        commit: of this project, ``-dirty`` where the tree differed from it.
        command: that was run.
        versions: Python, torch, triton, driver, peers.
        threads: CPU threads (0 for a GPU).
        power_limit_w: the GPU's, watts; None where it cannot be read.
        processors: multiprocessors of the GPU, cores of the processor.
        copy_gb_s: measured ceiling of memory, bytes read and written.
        matrix_tflops: measured ceiling of a large matrix product, by dtype.
        pace_us: on a CPU the fastest time of `benchmarks.core`'s loop; in two runs the same, where both had their core.
    """

    id: str
    device: str
    kind: str
    began: str
    commit: str
    command: str
    versions: dict[str, str]
    threads: int
    power_limit_w: float | None
    processors: int
    copy_gb_s: float
    matrix_tflops: dict[str, float]
    pace_us: float | None = None


@dataclass(frozen=True)
class Result:
    """One variant of one case in one mode.

    Attributes:
        run: id of its `Run`.
        case, mode, variant: which; mode and variant "all" where what happened was not of one alone.
        sizes: of the case, as `benchmarks.case.Case` has them.
        status: "timed", "skipped", "wrong" (the gate is red), "out of memory", "failed", or "crashed": it
            ended the process that ran the case, or had to be ended.
        reason: why there is no time.
        median_ms, p20_ms, p80_ms: of one call; None without a time. Of several processes (``--against``) as
            `benchmarks.against.over_rounds` says.
        repeats: calls that were timed.
        peak_mib: most memory that the call held beyond its inputs.
        tflops: on the FLOPs of the visible work, whoever does it.
        share: of the measured ceiling that bounds this case, memory or matrix products.
        intensity: FLOPs for each byte that must move.
        worst_error: largest relative error, in norm, of any result of the small twin that the gate computes.
        clock_mhz, power_w, energy_mj, throttled: of the GPU while this variant ran; None where they cannot be read, but
            for the clock, which then is 0: without it a GPU's times have no ratio.
        own_core: on a CPU whether the times are of calls during which nothing else was on the core (`benchmarks.core`);
            False where those were too few, None in older rows.
        again_ms: on a CPU, median of the same calls made a second time in turn (`benchmarks.timing`).
        shared_ms: on a CPU, median of the calls during which something was on the core, where there are enough.
        kernel: name in the static table of the kernel that does the work, for the model's error.
    """

    run: str
    case: str
    mode: str
    variant: str
    sizes: dict[str, Any]
    status: str
    reason: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int = 0
    peak_mib: float | None = None
    tflops: float | None = None
    share: float | None = None
    intensity: float | None = None
    worst_error: float | None = None
    clock_mhz: float | None = None
    power_w: float | None = None
    energy_mj: float | None = None
    throttled: str | None = None
    own_core: bool | None = None
    again_ms: float | None = None
    shared_ms: float | None = None
    kernel: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Case, mode and variant."""
        return self.case, self.mode, self.variant


def timed(blank: Result, times: Times) -> Result:
    """A row with the quantiles of some times, and what was read of the GPU meanwhile."""
    return replace(
        blank,
        status=TIMED,
        median_ms=round(times.quantile(0.5), 5),
        p20_ms=round(times.quantile(0.2), 5),
        p80_ms=round(times.quantile(0.8), 5),
        repeats=len(times.ms),
        clock_mhz=times.clock_mhz,
        power_w=times.power_w,
        energy_mj=times.energy_mj,
        throttled=times.throttled,
        own_core=times.own_core,
        again_ms=_median(times.again_ms),
        shared_ms=_median(times.shared_ms),
    )


def _median(ms: Sequence[float]) -> float | None:
    """None of fewer than would be timed."""
    return round(ranked(ms, 0.5), 5) if len(ms) >= MIN_ROUNDS else None


def slug(device: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str:
    """The commit of this tree, ``-dirty`` where it differs; FUSEDMM_COMMIT, or "unknown", where there is no git."""
    return answer("git", "describe", "--always", "--dirty", "--exclude", "*") or os.environ.get(COMMIT) or "unknown"


def answer(*command: str) -> str:
    """The first line that a command prints in this tree; "" where it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def command_of(words: Sequence[str]) -> str:
    """The command as anyone can give it: of a file somewhere on this machine the name alone."""
    return " ".join(("python -m benchmarks", *(re.sub(r"(^|=)/.*/", r"\1", word) for word in words)))


def describe_run(device: torch.device, ceilings: Ceilings, telemetry: Telemetry) -> Run:
    """Everything that a result on this machine depends on."""
    import triton

    began, tree = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), commit()
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **versions(),
    }
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        name, processors, threads = facts.name, facts.multi_processor_count, 0
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
        found["arch"] = device_arch(device)
    else:
        name, processors, threads = processor_name(), _cores(), torch.get_num_threads()
    return Run(
        id=f"{began}-{tree}",
        device=name,
        kind=device.type,
        began=began,
        commit=tree,
        command=command_of(sys.argv[1:]),
        versions=found,
        threads=threads,
        power_limit_w=telemetry.power_limit_w(),
        processors=processors,
        copy_gb_s=round(ceilings.copy_gb_s, 1),
        matrix_tflops={name: round(rate, 2) for name, rate in ceilings.matrix_tflops.items()},
        pace_us=round(core().fastest * 1e6, 2) if device.type == "cpu" else None,
    )


def processor_name() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def append(file: Path, rows: Sequence[Run | Result]) -> None:
    """Append rows to a result file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        for row in rows:
            facts = {name: value for name, value in asdict(row).items() if value is not None}
            stream.write(json.dumps({"kind_of_row": type(row).__name__.lower(), **facts}) + "\n")


def read(file: Path) -> tuple[dict[str, Run], list[Result]]:
    """Runs by id, and results in the order they were measured.

    Raises:
        ValueError: for a line that is neither, with file and line.
    """
    runs: dict[str, Run] = {}
    results: list[Result] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        facts = _facts(line)
        kind = facts.pop("kind_of_row", None)
        try:
            match kind:
                case "run":
                    row = Run(**{"power_limit_w": None, **facts})
                    runs[row.id] = row
                case "result":
                    results.append(Result(**facts))
                case other:
                    raise ValueError(f"benchmarks: {file}:{number} must be a run or a result, got {other!r}.")
        except TypeError as error:  # a field is missing, or is none of this version
            raise ValueError(f"benchmarks: {file}:{number} is no {kind} of this version: {error}.") from error
    return runs, results


def _facts(line: str) -> dict[str, Any]:
    """What a line holds; of one that is no JSON object, or a part of one, its first words as the kind of row."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"kind_of_row": line[:40]}


def keep(file: Path) -> list[Path]:
    """Append a file's runs, with their results, to those of their devices in benchmarks/results; what is there already
    is left out.
    """
    runs, rows = read(file)
    grown = []
    for run in runs.values():
        if not any(run.id in read(kept)[0] for kept in files_of(run.device)):
            grown.append(next_file(run.device))
            append(grown[-1], [run, *(row for row in rows if row.run == run.id)])
    return list(dict.fromkeys(grown))


def files_of(device: str) -> list[Path]:
    """What is committed of a device, oldest first."""
    return list(itertools.takewhile(Path.exists, _names(device)))


def next_file(device: str) -> Path:
    """Where a device's next run goes, all of it: the first file that is not full."""
    return next(file for file in _names(device) if not file.exists() or file.stat().st_size < FULL_BYTES)


def _names(device: str) -> Iterator[Path]:
    yield RESULTS / f"{slug(device)}.jsonl"
    yield from (RESULTS / f"{slug(device)}.{number}.jsonl" for number in itertools.count(2))


def committed(kind: str) -> list[tuple[Run, list[Result]]]:
    """Every committed run on a kind of device ("cuda" or "cpu") with its results, oldest first."""
    found = []
    for file in RESULTS.glob("*.jsonl"):
        if file.name.startswith("static-"):
            continue
        runs, results = read(file)
        found += [(run, [result for result in results if result.run == run.id]) for run in runs.values()]
    return sorted((pair for pair in found if pair[0].kind == kind), key=lambda pair: pair[0].began)


def latest(kind: str) -> dict[tuple[str, str, str], tuple[Run, Result]]:
    """The newest committed result of every case, mode and variant on a kind of device: on that of the newest run, since
    rows of several devices say nothing beside each other; of a CPU on one thread, as the command does by default.
    """
    found: dict[tuple[str, str, str], tuple[Run, Result]] = {}
    runs = [(run, rows) for run, rows in committed(kind) if run.threads <= 1]
    for run, results in runs:
        if run.device == runs[-1][0].device:
            found.update({result.key: (run, result) for result in results})
    return found


def measured_shares() -> dict[tuple[str, str], float]:
    """Measured share of the matrix peak at the clock that was read, by architecture and kernel name: of the case that
    reaches most, which has least of what the model leaves out.
    """
    from benchmarks.model import MATRIX_FLOPS

    found: dict[tuple[str, str], float] = {}
    for run, result in latest("cuda").values():
        arch = run.versions.get("arch", "")
        if result.kernel and result.tflops and result.clock_mhz and arch in MATRIX_FLOPS:
            peak = MATRIX_FLOPS[arch] * run.processors * result.clock_mhz * 1e6 / 1e12
            key = arch, result.kernel
            found[key] = max(found.get(key, 0.0), result.tflops / peak)
    return found
