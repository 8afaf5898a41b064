"""`python -m benchmarks compare A B`: what got slower or larger from one result file to another, beyond the noise."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import TIMED, Result, read
from benchmarks.timing import comparable

SLOWER = 1.03  # least ratio of medians that counts, once the quantiles are apart
OWN_CORE_SLOWER = 2.0  # where only one of the two had the core to itself: beside someone else all takes up to 1.8 times
LARGER = 1.02


@dataclass(frozen=True)
class Change:
    """One case, mode and variant; ``verdict`` is "slower", "larger", "faster", "lost" or "not comparable"."""

    key: tuple[str, str, str]
    verdict: str
    detail: str

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "larger", "lost")


def newest(results: Iterable[Result]) -> dict[tuple[str, str, str], Result]:
    """The last result of every case, mode and variant."""
    return {result.key: result for result in results}


def changes(before: Iterable[Result], after: Iterable[Result]) -> list[Change]:
    """Compare what both have, and what only the first could do."""
    old, new = newest(before), newest(after)
    found = []
    for key, was in old.items():
        now = new.get(key)
        if now is None or was.status != TIMED:
            continue
        if now.status != TIMED:
            found.append(Change(key, "lost", f"{now.status}: {now.reason}"))
            continue
        found += _compare(key, was, now)
    return found


def _compare(key: tuple[str, str, str], was: Result, now: Result) -> list[Change]:
    found = []
    assert was.median_ms is not None
    assert now.median_ms is not None
    if not comparable([was.clock_mhz, now.clock_mhz]):
        clocks = f"clocks {was.clock_mhz} and {now.clock_mhz} MHz"
        return [Change(key, "not comparable", f"{clocks} differ by more than 5 %")]
    if was.sizes != now.sizes:
        changed = [f"{name} {was.sizes.get(name)} -> {x}" for name, x in now.sizes.items() if was.sizes.get(name) != x]
        return [Change(key, "not comparable", f"sizes differ: {', '.join(changed)}")]
    least = SLOWER if was.own_core == now.own_core else OWN_CORE_SLOWER
    times = f"{was.median_ms:.4g} -> {now.median_ms:.4g} ms"
    assert was.p20_ms is not None
    assert was.p80_ms is not None
    assert now.p20_ms is not None
    assert now.p80_ms is not None
    if now.p20_ms > was.p80_ms and now.median_ms > least * was.median_ms:
        found.append(Change(key, "slower", times))
    elif now.p80_ms < was.p20_ms and was.median_ms > least * now.median_ms:
        found.append(Change(key, "faster", times))
    if was.peak_mib is not None and now.peak_mib is not None and now.peak_mib > LARGER * was.peak_mib + 1:
        found.append(Change(key, "larger", f"{was.peak_mib:.0f} -> {now.peak_mib:.0f} MiB"))
    return found


def report(found: Iterable[Change]) -> int:
    """Print the changes; 1 where one is a regression."""
    listed = sorted(found, key=lambda change: (not change.is_regression, change.key))
    for change in listed:
        case, mode, variant = change.key
        print(f"{change.verdict:<15}{case} {mode} {variant}: {change.detail}")
    regressions = sum(change.is_regression for change in listed)
    unknown = sum(change.verdict == "not comparable" for change in listed)
    others = len(listed) - regressions - unknown
    print(f"compare: {regressions} regressions, {others} other changes beyond the noise, {unknown} not comparable")
    return 1 if regressions else 0


def run(before: Path, after: Path) -> int:
    """Compare two result files of one device; 2 where they are of several."""
    (runs, old), (later, new) = read(before), read(after)
    devices = sorted({run.device for run in (*runs.values(), *later.values())})
    if len(devices) > 1:
        print(f"compare: the results are of different devices: {', '.join(devices)}", file=sys.stderr)
        return 2
    return report(changes(old, new))
