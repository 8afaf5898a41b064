"""The same cases on another commit's package, one after the other beside this tree's: `--against REV`."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.results import ROOT, Result, read


class Against:
    """A commit whose package this tree's benchmarks can run."""

    def __init__(self, revision: str, folder: Path, options: Sequence[str]) -> None:
        self.revision = revision
        self._folder = folder
        self._options = list(options)

    def results(self, case: str, variants: Sequence[str]) -> list[Result]:
        """One case on that commit, in a process of its own; says so where nothing can be had."""
        out = self._folder / "results.jsonl"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks", case, *self._options, "--json", str(out)]
        done = subprocess.run(
            [*command, "--variants", *variants],
            cwd=self._folder,
            env={**os.environ, "PYTHONPATH": str(self._folder)},
            capture_output=True,
            text=True,
        )
        found = read(out)[1] if out.exists() else []
        if not found:
            last = (done.stderr.strip().splitlines() or ["no result"])[-1]
            print(f"{case}: not at {self.revision}: {last}", flush=True)
        return found

    def renamed(self, found: Sequence[Result]) -> list[Result]:
        """Results under a name that says where they are from."""
        return [replace(result, variant=f"{result.variant}@{self.revision}") for result in found]


@contextmanager
def against(revision: str, options: Sequence[str]) -> Iterator[Against]:
    """That commit in a worktree which is thrown away, with this tree's benchmarks beside its package."""
    with tempfile.TemporaryDirectory() as name:
        tree, folder = Path(name) / "tree", Path(name) / "run"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), revision], cwd=ROOT, check=True)
        try:
            folder.mkdir()
            (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
            (folder / "recipes").symlink_to(ROOT / "recipes")
            (folder / "fusedmm").symlink_to(tree / "fusedmm")
            yield Against(revision, folder, options)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
