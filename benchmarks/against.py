"""The same cases on this tree and on another commit's package, taking turns: `--against REV`.

Two processes of one tree differ by more than the calls within each, by where their memory lies, and a machine drifts.
So each tree gets `ROUNDS` short processes, in the order A B B A A B B A, and what its processes differ by is its noise.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.results import ROOT, TIMED, Result, read

ROUNDS = 4  # processes of each tree; an even number, so that a steady drift costs both the same
Key = tuple[str, str, str]  # case, mode and variant


@dataclass(frozen=True)
class Against:
    """A commit whose package this tree's benchmarks can run in turn with this tree's own.

    Attributes:
        revision: the commit.
        here, there: folders to run this tree and the commit in.
        options: of the command line, for every process.
    """

    revision: str
    here: Path
    there: Path
    options: Sequence[str]

    def results(self, blanks: Sequence[Result]) -> tuple[list[Result], list[Result]]:
        """This tree's and the commit's results of one case, over all rounds; ``blanks`` are the rows to fill."""
        rounds: dict[Path, list[dict[Key, Result]]] = {self.here: [], self.there: []}
        for turn in range(ROUNDS):
            for folder in (self.there, self.here) if turn % 2 else (self.here, self.there):
                rounds[folder].append(self._round(folder, blanks))
        seen = {key: row for found in rounds.values() for rows in found for key, row in rows.items()}
        lost = {
            key: Result(row.run, *key, row.sizes, "crashed", "its process ended first") for key, row in seen.items()
        }
        ours, theirs = (
            [over_rounds([rows.get(key, lost[key]) for rows in found]) for key in seen] for found in rounds.values()
        )
        return ours, theirs

    def _round(self, folder: Path, blanks: Sequence[Result]) -> dict[Key, Result]:
        """One process; what it leaves out has crashed."""
        out = folder / "results.jsonl"
        out.unlink(missing_ok=True)
        variants = dict.fromkeys(blank.variant for blank in blanks)
        command = [sys.executable, "-m", "benchmarks", blanks[0].case, *self.options, "--json", str(out)]
        done = subprocess.run(
            [*command, "--variants", *variants],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
        )
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        found = read(out)[1] if out.exists() else []
        crashed = {blank.key: replace(blank, status="crashed", reason=why) for blank in blanks}
        return {**crashed, **{result.key: replace(result, run=blanks[0].run) for result in found}}

    def renamed(self, found: Sequence[Result]) -> list[Result]:
        """Results under a name that says where they are from."""
        return [replace(result, variant=f"{result.variant}@{self.revision}") for result in found]


def over_rounds(rows: Sequence[Result]) -> Result:
    """One result of several processes of one tree; a process without a time is the result.

    The row is that of the median process. Its percentiles are the median ones of all processes, widened to the least
    and the largest of their medians: what `benchmarks.compare` takes for noise then holds what processes differ by, but
    not the slow calls of a single one.
    """
    for row in rows:
        if row.status != TIMED:
            return row
    middle = (len(rows) - 1) // 2
    lows, medians, highs = (
        sorted(value for row in rows if (value := getattr(row, name)) is not None)
        for name in ("p20_ms", "median_ms", "p80_ms")
    )
    return replace(
        next(row for row in rows if row.median_ms == medians[middle]),
        p20_ms=min(lows[middle], medians[0]),
        p80_ms=max(highs[middle], medians[-1]),
        repeats=sum(row.repeats for row in rows),
        own_core=None if rows[0].own_core is None else all(row.own_core for row in rows),
    )


def is_commit(revision: str) -> bool:
    """Whether git knows a commit by that name here."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@contextmanager
def against(revision: str, options: Sequence[str]) -> Iterator[Against]:
    """That commit in a worktree which is thrown away, with this tree's benchmarks beside either package."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), revision], cwd=ROOT, check=True)
        try:
            yield Against(revision, _folder(Path(name) / "a", ROOT), _folder(Path(name) / "b", tree), options)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def _folder(folder: Path, tree: Path) -> Path:
    """A place where this tree's benchmarks find that tree's package."""
    folder.mkdir()
    for name, origin in (("benchmarks", ROOT), ("recipes", ROOT), ("fusedmm", tree)):
        (folder / name).symlink_to(origin / name)
    return folder
