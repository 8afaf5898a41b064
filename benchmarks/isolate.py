"""Cases in a child process that is started anew after a crash or a hang: it costs the case at hand, and no other."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRESS = "FUSEDMM_BENCH_PROGRESS"  # to a child, names the file that it tells the case at hand
POLL_S = 0.2
KILL_S = 10.0
CRASHED = 70  # exit status of a child whose GPU no longer answers; signals are negative, argparse's is 2


def run(
    names: Sequence[str],
    command: Callable[[Sequence[str]], list[str]],
    progress: Path,
    case_limit_s: float,
    report: Callable[[str, str], None],
) -> int:
    """Run every case; the worst exit status that is not a crash's, 1 where there was one.

    Args:
        names: cases, in order.
        command: of a child that runs the cases it is given and adds the name of each to ``progress`` as it begins it.
        progress: a file.
        case_limit_s: most seconds of one case.
        report: is told the case and why, where a case ends its process.
    """
    left, worst = list(names), 0
    while left:
        progress.write_text("")
        child = subprocess.Popen(command(left), env={**os.environ, PROGRESS: str(progress)})
        status, why = _watch(child, progress, case_limit_s)
        if status in (0, 1):
            return max(worst, status)
        begun = progress.read_text().split()
        if not begun:
            print(f"benchmarks: the process ends before its first case: {why}", file=sys.stderr, flush=True)
            return status
        report(begun[-1], why)
        worst = 1
        left = left[left.index(begun[-1]) + 1 :]
    return worst


def _watch(child: "subprocess.Popen[bytes]", progress: Path, case_limit_s: float) -> tuple[int, str]:
    """Wait for a child, or end it where a case takes too long; exit status and why it ended."""
    seen, since = "", time.monotonic()
    while child.poll() is None:
        time.sleep(POLL_S)
        now = progress.read_text()
        if now != seen:
            seen, since = now, time.monotonic()
        if seen and time.monotonic() - since > case_limit_s:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process whose GPU hangs may be left behind
                child.wait(timeout=KILL_S)
            return CRASHED, f"stopped after {case_limit_s:g} s"
    return child.returncode, f"exit status {child.returncode}"
