"""The linear yardstick of the fusions: ridge on the past features, then ridge on the mean token vectors for the rest.

It sees the same vectors as the networks. What a network gains over it comes from fusing, not from the features.
"""

import numpy as np

from fusedmm.train.baselines import Forecast
from fusedmm.train.dataset import Float64Array, Int64Array
from fusedmm.train.task import Task

PENALTIES = (100.0, 300.0, 1000.0, 3000.0, 10_000.0)


def residual_forecasts(task: Task) -> list[Forecast]:
    """Forecasts of "ridge, then text", where there is text, and "ridge, then all" modalities; none in a classification.

    Fitted on train rows; the penalty is the best on dev rows.
    """
    if task.classes or not task.features.past.shape[1]:
        return []
    kinds = task.dataset.info.modalities
    text = [name for name in task.features.names if kinds[name].kind == "text"]
    chosen = {"ridge, then text": text, "ridge, then all": list(task.features.names)}
    return [Forecast(name, _forecast(task, names)) for name, names in chosen.items() if names]


def mean_vectors(task: Task, name: str) -> Float64Array:
    """[N, F + 1]: the mean vector of each sample's tokens (0 where there is none), and whether there is any."""
    table = task.features.tokens[name]
    total = np.concatenate([np.zeros((1, table.values.shape[1])), np.cumsum(table.values, axis=0, dtype=np.float64)])
    count = np.diff(table.offsets)[:, None]
    sums = total[table.offsets[1:]] - total[table.offsets[:-1]]
    return np.concatenate([sums / np.maximum(count, 1), count > 0], axis=1)


def _forecast(task: Task, names: list[str]) -> Float64Array:
    rows, targets = task.rows, task.features.targets.astype(np.float64)
    weight, bias = task.skip("ridge")
    skip = task.features.past.astype(np.float64) @ weight.numpy().T + bias.numpy()
    inputs = np.concatenate([mean_vectors(task, name) for name in names], axis=1)
    center, scale = inputs[rows.train].mean(axis=0), inputs[rows.train].std(axis=0)
    inputs = (inputs - center) / np.where(scale > 0, scale, 1.0)
    fits = [skip + inputs @ _solve(inputs, targets - skip, rows.train, penalty) for penalty in PENALTIES]
    errors = [np.square(fit - targets)[rows.dev].mean() for fit in fits]
    best: Float64Array = fits[int(np.argmin(errors))][rows.test]
    return best


def _solve(inputs: Float64Array, targets: Float64Array, rows: Int64Array, penalty: float) -> Float64Array:
    """Ridge weights [F, T] on centred rows."""
    x, y = inputs[rows], targets[rows]
    weights: Float64Array = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y).astype(np.float64)
    return weights
