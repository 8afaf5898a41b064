"""Cases in a child process that is started anew after a crash or a hang: it costs the variant at hand, and no other.

The case is then run again without that variant. One that ends two processes is left out of all that follow.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRESS = "FUSEDMM_BENCH_PROGRESS"  # to a child, names the file that it tells the case and variant at hand
POLL_S = 0.2
KILL_S = 10.0
CRASHED = 70  # exit status of a child that can no longer use its GPU; signals are negative, argparse's is 2
OURS = "fusedmm"  # without it there is nothing to compare


def run(
    names: Sequence[str],
    command: Callable[[Sequence[str], Sequence[str]], list[str]],
    progress: Path,
    limit_s: float,
    report: Callable[[str, str, str], None],
) -> int:
    """Run every case; the worst exit status that is not a crash's, 1 where there was one.

    Args:
        names: cases, in order.
        command: of a child that runs the cases it is given without the variants it is given, and adds to ``progress``
            a line with the case, and the variant if there is one, as it begins either.
        progress: a file.
        limit_s: most seconds without a new line there.
        report: is told the case, the variant ("all" where it was not one alone), and why its process ended.
    """
    queue: list[tuple[list[str], list[str]]] = [(list(names), [])]
    crashes: Counter[str] = Counter()
    worst = 0
    while queue:
        left, without = queue.pop(0)
        if not left:
            continue
        progress.write_text("")
        child = subprocess.Popen(command(left, without), env={**os.environ, PROGRESS: str(progress)})
        status, why = _watch(child, progress, limit_s)
        if status in (0, 1):
            worst = max(worst, status)
            continue
        begun = [line.split() for line in progress.read_text().splitlines()]
        if not begun:
            print(f"benchmarks: the process ends before its first case: {why}", file=sys.stderr, flush=True)
            return status
        case, *variant = begun[-1]
        report(case, variant[0] if variant else "all", why)
        worst = 1
        again = [name for name in variant if name != OURS]
        crashes.update(again)
        done = {line[0] for line in begun}
        often = [name for name, count in crashes.items() if count > 1]
        queue = [
            ([case] if again else [], [*without, *again]),
            ([name for name in left if name not in done], often),
            *queue,
        ]
    return worst


def _watch(child: "subprocess.Popen[bytes]", progress: Path, limit_s: float) -> tuple[int, str]:
    """Wait for a child, or end it where nothing new begins for too long; exit status and why it ended."""
    seen, since = "", time.monotonic()
    while child.poll() is None:
        time.sleep(POLL_S)
        now = progress.read_text()
        if now != seen:
            seen, since = now, time.monotonic()
        if seen and time.monotonic() - since > limit_s:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process whose GPU hangs may be left behind
                child.wait(timeout=KILL_S)
            return CRASHED, f"stopped after {limit_s:g} s"
    if child.returncode == CRASHED:
        return CRASHED, "its process could no longer use the GPU"
    return child.returncode, f"exit status {child.returncode}"
