"""A training job of a dozen steps on a small simulated market: its recipe, data to give it instead, what it leaves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from fusedmm.train.dataset import DatasetInfo
from fusedmm.train.format import RawTokens
from fusedmm.train.simulate import MarketConfig, simulate

RECIPE = """
[data]
simulate_days = 80
simulate_entities = 5
max_tokens = 6
[model]
layers = 1
[train]
steps = 12
batch_size = 16
warmup = 2
eval_every = 6
[run]
device = "cpu"
checkpoint_every = 6
keep_checkpoints = 2
bootstrap = 100
"""
NO_EVENTS = "run.tensorboard=false"
DONE = (0, 2)  # 2: done, but so few steps need not find the truth


def market(seed: int = 0) -> tuple[DatasetInfo, pd.DataFrame, dict[str, RawTokens]]:
    """The recipe's data, for `write_dataset`."""
    return simulate(MarketConfig(days=80, entities=5, seed=seed))


def market_of_classes() -> tuple[DatasetInfo, pd.DataFrame, dict[str, RawTokens]]:
    """The same with up and down for a target, and without the truth that only a simulation knows."""
    info, samples, tokens = market()
    samples["target_up"] = (samples.pop("target_near") > 0).astype("int64")
    truth = ("importance_", "oracle_", "target_far")
    samples = samples[[name for name in samples.columns if not name.startswith(truth)]]
    return replace(info, task="classification", classes=2), samples, tokens


def result(out: Path, run: str = "gated-seed0") -> dict[str, np.ndarray]:
    with np.load(out / "runs" / run / "result.npz") as stored:
        return dict(stored)


def logged(out: Path, name: str, run: str = "gated-seed0") -> dict[int, float]:
    """step -> a number of the log."""
    lines = [json.loads(line) for line in (out / "runs" / run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}
