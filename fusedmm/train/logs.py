"""What a run writes while it runs: JSON lines always, TensorBoard where asked for, a progress bar on the terminal. Rank
0 only.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


def run_directory(out: Path, variant: str, seed: int) -> Path:
    """Where a run writes."""
    return out / "runs" / f"{variant}-seed{seed}"


class RunLog:
    """The log of one run.

    Args:
        directory: gets ``log.jsonl`` and ``tensorboard/``.
        title: shown before the progress bar.
        steps: length of the bar.
        start: first step of this process; lines of later steps, written before an interruption, are dropped.
        active: False on ranks that stay silent.
        tensorboard: also write event files.
    """

    def __init__(self, directory: Path, title: str, steps: int, *, start: int, active: bool, tensorboard: bool) -> None:
        self._writer: Any = None
        self._file: Any = None
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=title,
            disable=not active,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,  # a file keeps every line
            leave=False,
        )
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "log.jsonl"
        kept = (
            [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= start]
            if start and path.exists()
            else []
        )
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, and one point a value in TensorBoard; ``step`` counts finished steps."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def advance(self, steps: int, shown: Mapping[str, float]) -> None:
        """Move the progress bar."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self._bar.update(steps)

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def require_tensorboard() -> None:
    """Complain before anything starts where event files are asked for and the package is absent."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "train: run.tensorboard needs the package tensorboard, which is not installed. Install fusedmm[train], or "
            "pass run.tensorboard=false."
        )
