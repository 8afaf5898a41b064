"""Checkpoints of sharded state through torch.distributed.checkpoint (DCP): any number of ranks writes, any number
reads.

A step's directory is written under a temporary name and renamed when all ranks are done, so a directory with the final
name is complete.
"""

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from fusedmm.train.parallel import World


class Checkpoints:
    """The checkpoints of one run: ``<directory>/step-<n>``.

    Args:
        directory: made on the first save.
        keep: newest checkpoints that stay.
        background: write while training goes on. Collectives of the writer get their own gloo group: sharing training's
            deadlocks.
    """

    def __init__(self, directory: Path, world: World, keep: int, background: bool = False) -> None:
        self.directory = directory
        self._world = world
        self._keep = keep
        self._group = dist.new_group(backend="gloo") if background else None
        self._pending: tuple[Future[Any], Path] | None = None

    def latest(self) -> int | None:
        """The newest complete step, or None; the same on every rank. What a killed run left half written goes."""
        if self._world.is_main:
            for partial in self.directory.glob("partial-*"):
                shutil.rmtree(partial)
        self._world.barrier()
        steps = self._steps()
        return steps[-1] if steps else None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after ``step`` steps."""
        self.wait()
        target = self.directory / f"step-{step:08d}"
        partial = self.directory / f"partial-{step:08d}"
        if self._group is None:
            save(state, checkpoint_id=partial)
            self._publish(partial, target)
        else:
            future = async_save(state, checkpoint_id=partial, process_group=self._group)
            assert isinstance(future, Future)
            self._pending = (future, target)

    def wait(self) -> None:
        """Finish a write that is under way."""
        if self._pending is not None:
            future, target = self._pending
            future.result()
            self._pending = None
            self._publish(target.with_name(target.name.replace("step-", "partial-")), target)

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Read the state of a step into the tensors of ``state``, resharding where the ranks have changed."""
        load(state, checkpoint_id=self.directory / f"step-{step:08d}")

    def _publish(self, partial: Path, target: Path) -> None:
        self._world.barrier()
        if self._world.is_main:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for step in self._steps()[: -self._keep]:
                shutil.rmtree(self.directory / f"step-{step:08d}")
        self._world.barrier()

    def _steps(self) -> list[int]:
        return sorted(
            int(path.name.removeprefix("step-"))
            for path in self.directory.glob("step-*")
            if (path / ".metadata").is_file()
        )
