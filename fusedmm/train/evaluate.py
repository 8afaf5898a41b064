"""Losses and predictions: every rank takes its share of a split, all get the whole."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmm.train.batches import Batch, MultimodalDataset, collate, evaluation_batches
from fusedmm.train.dataset import Float32Array
from fusedmm.train.model import Forecast
from fusedmm.train.parallel import World
from fusedmm.train.task import Task

EVALUATION_BATCH = 128


class Predictions(NamedTuple):
    """Predictions for a split, in the order of its rows, on the CPU."""

    prediction: Tensor
    """[n, T] float32."""
    mass: Tensor
    """[n, M] float32, attention mass by modality of the model."""


def forecast(model: nn.Module, batch: Batch) -> Forecast:
    """Run the model on a batch."""
    output: Forecast = model(batch.tokens, batch.masks, batch.times, batch.time, batch.past)
    return output


def batch_loss(prediction: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Training loss of each sample, [B] float32: squared error over the targets' mean train variance, or
    cross-entropy.
    """
    if task.classes:
        return F.cross_entropy(prediction, targets[:, 0].long(), reduction="none")
    return ((prediction - targets) / task.target_scale).square().mean(dim=1)


class RunResult(NamedTuple):
    """What one run predicts; n rows of a split, T targets, M modalities of the variant."""

    dev: Float32Array  # [n_dev, T]
    test: Float32Array  # [n_test, T]
    mass: Float32Array  # [n_test, M]
    hidden: Float32Array  # [M, n_test, T]: predictions with one modality hidden
    kept: npt.NDArray[np.bool_]  # [M]: modalities that the filter left on
    seconds: float  # of all sessions, where it was interrupted
    best_step: int
    parameters: int


@torch.no_grad()
def predict(model: nn.Module, rows: MultimodalDataset, world: World, hidden: str | None = None) -> Predictions:
    """Predict every row of a split.

    Args:
        model: sharded or not; left in evaluation mode.
        rows: the split.
        world: shares the work; collectives match because every rank runs as many batches.
        hidden: a modality that is treated as missing.
    """
    model.eval()
    gathered = []
    for indices in evaluation_batches(len(rows), EVALUATION_BATCH, world.rank, world.size):
        batch = collate([rows[int(index)] for index in indices]).to(world.device)
        if hidden is not None:
            batch = batch._replace(masks={**batch.masks, hidden: torch.zeros_like(batch.masks[hidden])})
        output = forecast(model, batch)
        both = torch.cat([output.prediction, output.mass], dim=1)
        gathered.append(world.gather(both))
    whole = torch.cat(gathered)[: len(rows)].cpu()  # the tail repeats the last row
    targets = whole.shape[1] - output.mass.shape[1]
    return Predictions(whole[:, :targets], whole[:, targets:])
