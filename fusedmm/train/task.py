"""What is learned from what: data read, split by date, featurised on the training split or as the run was that this one
starts from, with the frozen ridge that models start from.
"""

import difflib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusedmm.train.batches import MultimodalDataset
from fusedmm.train.config import DataConfig, Recipe, RecipeError, VariantConfig
from fusedmm.train.dataset import Dataset
from fusedmm.train.features import FeatureConfig, Features, Featurizer
from fusedmm.train.format import read_dataset, write_dataset
from fusedmm.train.model import Sizes
from fusedmm.train.pool import pool_dataset
from fusedmm.train.simulate import MarketConfig, simulate
from fusedmm.train.splits import Split, split_by_date
from fusedmm.train.stored import check_start, data_needs, load_start

RIDGE_PENALTY = 10.0
"""Of the frozen ridge on scaled features: a few features and a thousand rows leave it without influence."""


@dataclass(frozen=True)
class Task:
    """A data set that is ready to be learned."""

    dataset: Dataset
    featurizer: Featurizer
    features: Features
    rows: Split
    train: MultimodalDataset
    dev: MultimodalDataset
    test: MultimodalDataset
    target_scale: float
    """Root of the targets' mean train variance (1 for classes): predictions and losses are in its units."""

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """What a model that has learned this must find in other data."""
        return data_needs(self.dataset)

    @property
    def classes(self) -> int | None:
        """Number of classes, None in a regression."""
        return self.features.classes

    def split(self, name: str) -> MultimodalDataset:
        """The split "train", "dev" or "test"."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[name]

    def targets(self, rows: MultimodalDataset) -> Tensor:
        """[n, T] targets of a split."""
        return torch.from_numpy(self.features.targets[rows.rows])

    def sizes_of(self, variant: VariantConfig) -> Sizes:
        """What a variant's model must know of the data."""
        names = variant.modalities or self.features.names
        outputs = self.classes or self.features.targets.shape[1]
        return Sizes({name: self.features.widths[name] for name in names}, self.features.past.shape[1], outputs)

    def skip(self, kind: str) -> tuple[Tensor, Tensor]:
        """Weight [T, P] and bias [T] of what the model's head is added to: "ridge" on past features, or "none", the
        train mean.
        """
        outputs = self.classes or self.features.targets.shape[1]
        past = self.features.past[self.rows.train].astype(np.float64)
        if self.classes:
            return torch.zeros(outputs, past.shape[1]), torch.zeros(outputs)
        targets = self.features.targets[self.rows.train].astype(np.float64)
        if kind == "none":
            return torch.zeros(outputs, past.shape[1]), torch.from_numpy(targets.mean(axis=0)).float()
        center, mean = past.mean(axis=0), targets.mean(axis=0)
        gram = (past - center).T @ (past - center) + RIDGE_PENALTY * np.eye(past.shape[1])
        weight = np.linalg.solve(gram, (past - center).T @ (targets - mean)).T
        return torch.from_numpy(weight).float(), torch.from_numpy(mean - weight @ center).float()


def load_task(recipe: Recipe) -> Task:
    """Read or simulate the data, split, featurise; every check of data and variants happens here, before anything is
    trained.

    Raises:
        RecipeError: for a modality that the data has not, or a skip without past features.
        DataFormatError, FileNotFoundError, ValueError: from reading, splitting and featurising, each naming its file or
            argument.
    """
    data = recipe.data
    if data.path:
        dataset = read_dataset(Path(data.path))
    else:
        with tempfile.TemporaryDirectory() as directory:
            market = MarketConfig(days=data.simulate_days, entities=data.simulate_entities, seed=data.simulate_seed)
            write_dataset(Path(directory), *simulate(market))
            dataset = read_dataset(Path(directory))
    _check_variants(recipe, dataset.info.modalities)
    dataset = pool_dataset(dataset, data.pool_modalities, data.pool_tokens)
    rows = split_by_date(
        dataset.samples,
        train_end=data.train_end or None,
        dev_start=data.dev_start or None,
        dev_end=data.dev_end or None,
        test_start=data.test_start or None,
        test_end=data.test_end or None,
        embargo_days=data.embargo_days,
    )
    featurizer = _starting_featurizer(recipe, dataset)
    if featurizer is None:
        config = FeatureConfig(text_dim=data.text_dim, text_model=data.text_model, text_cache=data.text_cache)
        featurizer = Featurizer.fit(dataset, rows.train, config)
    features = featurizer.transform(dataset)
    caps = token_caps(data, dataset)
    train, dev, test = (MultimodalDataset(features, split, caps) for split in (rows.train, rows.dev, rows.test))
    scale = float(np.sqrt(np.square(features.target_std).mean()))
    return Task(dataset, featurizer, features, rows, train, dev, test, scale)


def token_caps(data: DataConfig, dataset: Dataset) -> dict[str, int]:
    """The most tokens of a sample, for each modality that has a limit: half an image is none."""
    kinds = dataset.info.modalities.items()
    return {name: data.max_tokens for name, modality in kinds if data.max_tokens and modality.kind != "image"}


def _starting_featurizer(recipe: Recipe, dataset: Dataset) -> Featurizer | None:
    """That of the runs ``train.init`` names, each checked; runs of one ``run.out`` have the same."""
    featurizer = None
    for variant in recipe.variant:
        for seed in recipe.train.seeds:
            stored = load_start(recipe, variant, seed)
            if stored is not None:
                check_start(stored, recipe, variant, dataset)
                featurizer = featurizer or stored.featurizer
    return featurizer


def _check_variants(recipe: Recipe, known: Mapping[str, object]) -> None:
    for variant in recipe.variant:
        for name in variant.modalities:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise RecipeError(
                    f"train: modalities of variant {variant.name!r} must be among {', '.join(known)}, got {name!r}. "
                    f"Did you mean {near!r}?"
                )
