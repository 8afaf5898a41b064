"""`python -m benchmarks paths RESULTS`: which entries of the attention kernels' table a measurement justifies.

The table, `fusedmm.kernels.attention.select.MEASURED`, switches the Hopper kernels on for a pass, a softmax and a head
size, whatever the batch. So an entry is justified if they win on the whole over all cases measured side by side with
the portable kernels, and lose noticeably on none.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ratio
from benchmarks.results import Result, read
from fusedmm.kernels.attention.config import head_block

GAIN = 1.03  # least geometric mean of portable time over Hopper time
LOSS = 0.98  # least such ratio of any case
PASSES = ("forward", "backward")
Entry = tuple[str, str, int]  # pass, softmax, head size


@dataclass(frozen=True)
class Evidence:
    """Cases that speak about an entry: times as long as portable takes, and complaints where there is no ratio."""

    ratios: dict[str, float]
    complaints: dict[str, str]

    @property
    def gain(self) -> float:
        """Geometric mean of the ratios."""
        return math.exp(sum(map(math.log, self.ratios.values())) / len(self.ratios)) if self.ratios else 0.0

    @property
    def justifies(self) -> bool:
        """Whether the entry belongs in the table."""
        return not self.complaints and self.gain >= GAIN and min(self.ratios.values()) >= LOSS


def evidence(results: Iterable[Result]) -> dict[Entry, Evidence]:
    """What the rows of the variants "fusedmm-portable" and "fusedmm-hopper" say, by entry.

    A case that Hopper's kernels do not support is no complaint: there the portable ones run anyway.
    """
    newest = {result.key: result for result in results}
    found: dict[Entry, Evidence] = {}
    for (case, mode, variant), hopper in newest.items():
        if variant != "fusedmm-hopper" or mode not in PASSES or hopper.status == "skipped":
            continue
        entry = (mode, str(hopper.sizes["softmax"]), head_block(int(hopper.sizes["head_dim"])))
        said = found.setdefault(entry, Evidence({}, {}))
        portable = newest.get((case, mode, "fusedmm-portable"))
        times = None if portable is None or portable.run != hopper.run else ratio(hopper, portable)
        if times is not None:
            said.ratios[case] = times
        elif hopper.median_ms is None:
            said.complaints[case] = f"{hopper.status}: {hopper.reason}"
        else:
            said.complaints[case] = "no portable time of the same run at a comparable clock"
    return found


def proposal(results: Iterable[Result]) -> dict[tuple[str, str], frozenset[int]]:
    """What `MEASURED` should be by these results."""
    table: dict[tuple[str, str], frozenset[int]] = {}
    for (direction, softmax, size), said in sorted(evidence(results).items()):
        if said.justifies:
            table[direction, softmax] = table.get((direction, softmax), frozenset()) | {size}
    return table


def report(results: Iterable[Result]) -> str:
    """The table as it can be pasted, and for every entry what speaks for and against it."""
    rows = list(results)
    lines = ["MEASURED: dict[tuple[str, str], frozenset[int]] = {"]
    for (direction, softmax), sizes in proposal(rows).items():
        lines.append(f'    ("{direction}", "{softmax}"): frozenset({sorted(sizes)}),')
    lines += ["}", ""]
    for entry, said in sorted(evidence(rows).items()):
        verdict = "justified" if said.justifies else "not justified"
        lines.append(f"{entry}: {verdict}, portable takes {said.gain:.2f}x as long over {len(said.ratios)} cases")
        lines += [f"    {case} {times:.2f}x" for case, times in said.ratios.items() if times < LOSS]
        lines += [f"    {case} {reason}" for case, reason in said.complaints.items()]
    return "\n".join(lines)


def run(file: Path) -> int:
    """Print the report on a result file; 2 where it is none."""
    if not file.exists():
        print(f"paths: no results in {file}. Run python -m benchmarks --json {file} first.")
        return 2
    try:
        rows = read(file)[1]
    except ValueError as error:
        print(f"paths: {error}")
        return 2
    if not any(row.variant == "fusedmm-portable" for row in rows):
        print(f"paths: {file} holds no time of a portable kernel: it is of no GPU, or of one without another path.")
        return 2
    print(report(rows))
    return 0
