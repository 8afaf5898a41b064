"""One run: a variant with a seed, from the first step to its predictions.

The loop reads as: fetch, forward, backward, clip, judge, step, average, log, look at dev, save. Everything random
depends on (seed, step) or (seed, step, rank) alone, so a run that continues from a checkpoint is the run that was never
interrupted.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict as dcp_state
from torch import Tensor, nn

from fusedmm.train.augment import hide_modalities
from fusedmm.train.batches import Batch, BatchSampler, collate
from fusedmm.train.checkpoint import Checkpoints
from fusedmm.train.config import Recipe, VariantConfig
from fusedmm.train.evaluate import Predictions, batch_loss, forecast, predict
from fusedmm.train.filter import START, active_modalities, modality_importance, update_gates
from fusedmm.train.logs import RunLog
from fusedmm.train.optim import SpikeGuard, WeightAverage, build_optimizer, copy_weights, learning_rate, put_weights
from fusedmm.train.parallel import StopSignal, World, full
from fusedmm.train.start import build_model
from fusedmm.train.task import Task

LOG_EVERY = 10
"""Steps between two reads of the device by the host; every step is logged nevertheless."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what happened and what to do."""


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived and a checkpoint was written."""


class Trainer:
    """Trains one model.

    Args:
        recipe: sizes, optimiser, output.
        variant: which modalities and which fusion.
        seed: of weights, batches and dropout.
        task: data, already split and featurised.
        world: the ranks.
        directory: of this run's log and checkpoints.
    """

    def __init__(
        self, recipe: Recipe, variant: VariantConfig, seed: int, task: Task, world: World, directory: Path
    ) -> None:
        self.config, self.run_config, self.variant, self.seed = recipe.train, recipe.run, variant, seed
        self.task, self.world, self.directory = task, world, directory
        self.sampler = BatchSampler(len(task.train), self.config.batch_size, seed, world.rank, world.size)
        self.model = build_model(recipe, variant, seed, task, world)
        self.optimizer = build_optimizer(self.model, self.config)
        self.guard = SpikeGuard(self.config.spike_sigma, self.config.spike_window, world.device)
        self.average = WeightAverage(self.model, self.config.ema)
        self.best = copy_weights(self.model)
        self.progress = {"step": 0, "best_step": 0, "stale": 0, "best_loss": float("inf"), "seconds": 0.0}
        self._began = time.monotonic()
        self.checkpoints = Checkpoints(
            directory / "checkpoints", world, recipe.run.keep_checkpoints, recipe.run.checkpoint_async
        )
        self._pending: list[Tensor] = []

    def fit(self, stop: StopSignal) -> None:
        """Train until the last step or until dev stops getting better; the model then has its best weights.

        Raises:
            Interrupted: after a signal, with a checkpoint written.
            TrainingError: where too many steps in a row had to be skipped.
        """
        self.restore()
        start = int(self.progress["step"])
        main, title = self.world.is_main, f"{self.variant.name} seed {self.seed}"
        log = RunLog(
            self.directory, title, self.config.steps, start=start, active=main, tensorboard=self.run_config.tensorboard
        )
        began = time.monotonic()
        try:
            if start == 0 and (self.config.init or not self.config.steps):
                self.look_at_dev(log)  # what fine-tuning has to beat
            for step in range(start, self.config.steps):
                if self.finished():
                    break
                self.train_step(step)
                done, last = step + 1, step + 1 == self.config.steps
                self.progress["step"] = done
                looking, stopping = last or done % self.config.eval_every == 0, self.world.any(stop.received)
                if looking or done % LOG_EVERY == 0:
                    self.flush(log, (time.monotonic() - began) / (done - start))
                if looking:
                    self.look_at_dev(log)
                if last or stopping or done % self.run_config.checkpoint_every == 0:
                    self.save(done)
                if stopping:
                    raise Interrupted(
                        f"train: stopped by a signal after step {done} of {title}; run the same command to continue."
                    )
        finally:
            self.checkpoints.wait()
            log.close()
        put_weights(self.model, self.best)

    def train_step(self, step: int) -> None:
        """One optimiser step; loss, gradient norm and the decision stay on the device."""
        torch.manual_seed(hash((self.seed, step, self.world.rank)) & 0x7FFFFFFF)  # dropout
        self.model.train()
        batch = self.fetch(step)
        losses = batch_loss(forecast(self.model, batch).prediction, batch.targets, self.task)
        loss = losses.sum() / self.config.batch_size  # of all ranks: gradients are summed, not averaged
        loss.backward()
        norm = full(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        loss = self.world.total(loss.detach())
        skip = self.guard.judge(loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(step, self.config)
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # fused AdamW leaves the step out where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model, step)
        self._pending.append(torch.stack([loss, norm, skip]))

    def fetch(self, step: int) -> Batch:
        """This rank's share of a step's batch, some modalities hidden where the recipe says so."""
        batch = collate([self.task.train[int(index)] for index in self.sampler.indices(step)]).to(self.world.device)
        return hide_modalities(batch, self.config.modality_dropout, self.seed, step)

    def flush(self, log: RunLog, seconds_per_step: float) -> None:
        """Read what the device has noted since the last time, write it, and give up where too many steps were
        skipped.
        """
        rows = torch.stack(self._pending).tolist()
        first = int(self.progress["step"]) - len(rows)
        self._pending.clear()
        for number, (loss, norm, skip) in enumerate(rows):
            rate = learning_rate(first + number, self.config)
            log.write(
                first + number + 1,
                {"loss": loss, "grad_norm": norm, "skipped": skip, "lr": rate, "seconds_per_step": seconds_per_step},
            )
        log.advance(len(rows), {"loss": rows[-1][0], "dev": self.progress["best_loss"]})
        streak = int(self.guard.state["streak"].item())
        if streak >= self.config.max_skips:
            raise TrainingError(
                f"train: loss and gradient norm must be finite and without spikes, got loss {rows[-1][0]:g} and norm "
                f"{rows[-1][1]:g} at step {first + len(rows)} of {self.variant.name}, seed {self.seed}: {streak} "
                "steps in a row were skipped. Lower train.lr, or look at the data of these steps."
            )

    def look_at_dev(self, log: RunLog) -> None:
        """Loss on dev with the averaged weights; the best ones are kept, and the filter learns what they need."""
        weights = copy_weights(self.model)
        put_weights(self.model, self.average.state)
        found = predict(self.model, self.task.dev, self.world)
        losses = self.dev_losses(found)
        dev = float(losses.mean())
        if dev < self.progress["best_loss"]:
            self.best = copy_weights(self.model)
            self.progress.update(best_loss=dev, best_step=self.progress["step"], stale=0)
        else:
            self.progress["stale"] += 1
        values = {"dev_loss": dev} | self.named("mass", found.mass.mean(dim=0))
        importance = None
        if self.variant.filter and START * self.config.steps < self.progress["step"] < self.config.steps:
            hidden = {name: self.dev_losses(self.predict("dev", hidden=name)) for name in self.kept}
            importance = modality_importance(losses, hidden, self.names)
            values |= self.named("importance", importance)
        put_weights(self.model, weights)
        if importance is not None and update_gates(self.model, importance, self.names):
            self.progress.update(best_loss=float("inf"), stale=0)
        log.write(int(self.progress["step"]), values)

    def dev_losses(self, found: Predictions) -> Tensor:
        """Loss of each row of dev, [n]."""
        return batch_loss(found.prediction, self.task.targets(self.task.dev), self.task)

    def named(self, what: str, values: Tensor) -> dict[str, float]:
        """[M] values for the log."""
        return {f"{what}_{name}": value for name, value in zip(self.names, values.tolist(), strict=True)}

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities this model sees."""
        return tuple(self.task.sizes_of(self.variant).modalities)

    @property
    def kept(self) -> tuple[str, ...]:
        """Those that the filter has not switched off."""
        return active_modalities(self.model, self.names)

    def finished(self) -> bool:
        """Whether dev has not improved for as long as the recipe waits."""
        return bool(self.config.patience and self.progress["stale"] >= self.config.patience)

    def predict(self, split: str, hidden: str | None = None) -> Predictions:
        """Predictions of the weights in place on "dev" or "test", with one modality hidden where asked."""
        return predict(self.model, self.task.split(split), self.world, hidden)

    @property
    def seconds(self) -> float:
        """Seconds that this run has taken so far, those before its checkpoint included."""
        return self.progress["seconds"] + time.monotonic() - self._began

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        self.progress["seconds"] = self.seconds
        self._began = time.monotonic()
        self.checkpoints.save(step, self.state())

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        step = self.checkpoints.latest()
        if step is None:
            return
        state = self.state()
        self.checkpoints.load(step, state)
        dcp_state.set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.progress = state["progress"]

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint holds; DCP reads the averaged and best weights and the detector's window in place."""
        model, optimizer = dcp_state.get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "average": self.average.state,
            "best": self.best,
            "guard": self.guard.state,
            "progress": dict(self.progress),
        }
