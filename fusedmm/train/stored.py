"""A finished run as one file, ``model.pt``: its weights, the featurizer they were trained with, and what both need.

Tensors, strings and numbers only: ``torch.load(path, weights_only=True)`` reads it, and runs no code of the file's. The
scale of the targets and the frozen ridge are buffers of the model, so they are among the weights.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedmm.train.config import DataConfig, ModelConfig, Recipe, RecipeError, VariantConfig
from fusedmm.train.dataset import Dataset
from fusedmm.train.features import FeatureConfig, Featurizer, Scaler
from fusedmm.train.logs import run_directory
from fusedmm.train.text import HashingEncoder, ModelEncoder

FILE = "model.pt"
FORMAT_VERSION = 2
TARGETS = "target_ columns"
FREE = ("dropout", "skip")
"""Keys of [model] that may differ from the run's: neither is a size, and the run's own skip is among its weights."""


@dataclass(frozen=True)
class StoredModel:
    """What a run leaves to those that start from it or forecast with it.

    Attributes:
        data, model, variant: of the recipe.
        needs: what the data must be, see `data_needs`.
        featurizer: as fitted on the run's train split.
        weights: the best ones, whole and on the CPU, by name; the ``state_dict`` of a `Forecaster`.
    """

    data: DataConfig
    model: ModelConfig
    variant: VariantConfig
    needs: dict[str, tuple[str, ...]]
    featurizer: Featurizer
    weights: dict[str, Tensor]

    @property
    def targets(self) -> list[str]:
        """Names of what it forecasts, in the order of its outputs; of classes that of their column."""
        return [name.removeprefix("target_") for name in self.needs[TARGETS]]

    def save(self, run: Path) -> None:
        """Write ``model.pt`` into a run's folder, all of it or nothing."""
        featurizer = replace(self.featurizer, config=replace(self.featurizer.config, text_cache=""))
        content = {"format": FORMAT_VERSION, "needs": self.needs, "weights": self.weights}
        content |= {name: asdict(getattr(self, name)) for name in ("data", "model", "variant")}
        partial = run / f"partial-{FILE}"
        torch.save(content | {"featurizer": _to_tensors(asdict(featurizer))}, partial)
        partial.rename(run / FILE)

    @classmethod
    def load(cls, run: Path | str) -> "StoredModel":
        """Read a run's ``model.pt``.

        Raises:
            RecipeError: where there is none, or one of another version.
        """
        path = Path(run) / FILE
        if not path.is_file():
            raise RecipeError(
                f"train: {run} must be the folder of a finished run, got no {FILE} there. Train it first; the folder "
                "of a run is <run.out>/runs/<variant>-seed<n>."
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT_VERSION:
            raise RecipeError(
                f"train: {path} must have format {FORMAT_VERSION}, got {content['format']}. Train it anew."
            )
        return cls(
            DataConfig(**content["data"]),
            ModelConfig(**content["model"]),
            VariantConfig(**content["variant"]),
            content["needs"],
            _featurizer(content["featurizer"]),
            content["weights"],
        )


def load_start(recipe: Recipe, variant: VariantConfig, seed: int) -> StoredModel | None:
    """The run that ``train.init`` says a run starts from, or None."""
    if not recipe.train.init:
        return None
    root = Path(recipe.train.init)
    stored = StoredModel.load(root if (root / FILE).is_file() else run_directory(root, variant.name, seed))
    config = replace(stored.featurizer.config, text_cache=recipe.data.text_cache)
    return replace(stored, featurizer=replace(stored.featurizer, config=config))


def data_needs(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    """What weights and featurizer take for granted about data, in words that can be compared and shown."""
    needs = {"modalities": tuple(dataset.info.modalities)}
    for name, modality in dataset.info.modalities.items():
        values = dataset.tokens[name].values
        width = "" if values is None else f" of width {values.shape[1]}"
        units = f" in {', '.join(modality.units)}" if modality.units else ""
        needs[f"modality {name}"] = (f"{modality.kind}{width}{units}",)
    needs["past_ columns"] = tuple(dataset.columns("past_"))
    classes = f" of {dataset.info.classes} classes" if dataset.info.classes else ""
    needs["task"] = (f"{dataset.info.task}{classes}",)
    needs[TARGETS] = tuple(dataset.columns("target_"))
    return needs


def check_data(stored: StoredModel, dataset: Dataset, *, need_targets: bool = True) -> None:
    """Raise `RecipeError` for the first thing in which the data is not as the run's was."""
    found = data_needs(dataset)
    for what, needed in stored.needs.items():
        if found.get(what) != needed and (need_targets or what != TARGETS):
            wanted, got = (", ".join(words) or "none" for words in (needed, found.get(what, ())))
            raise RecipeError(
                f"train: {what} of data {dataset.info.name!r} must be {wanted!r}, as in the run it is given to, got "
                f"{got!r}. Write the data in the run's form, or train anew."
            )


def check_start(stored: StoredModel, recipe: Recipe, variant: VariantConfig, dataset: Dataset) -> None:
    """Raise `RecipeError` where data, sizes or variant are not those of the run that ``train.init`` names."""
    check_data(stored, dataset)
    for key, needed, got in _pairs(stored, recipe, variant, tuple(dataset.info.modalities)):
        if needed != got:
            raise RecipeError(
                f"train: {key} must be {needed!r}, as in the run that train.init={recipe.train.init!r} names for "
                f"variant {variant.name!r}, got {got!r}. Change the recipe, or leave train.init empty."
            )


def _pairs(
    stored: StoredModel, recipe: Recipe, variant: VariantConfig, names: tuple[str, ...]
) -> list[tuple[str, Any, Any]]:
    """Keys that must agree, with the run's value and this recipe's."""
    theirs, mine = stored.data, recipe.data
    keys = ["text_dim", "text_model", "pool_modalities", *(["pool_tokens"] if mine.pool_modalities else [])]
    pairs = [(f"data.{key}", getattr(theirs, key), getattr(mine, key)) for key in keys]
    sizes = [field.name for field in fields(ModelConfig) if field.name not in FREE]
    pairs += [(f"model.{key}", getattr(stored.model, key), getattr(recipe.model, key)) for key in sizes]
    pairs += [("variant.modalities", stored.variant.modalities or names, variant.modalities or names)]
    pairs += [("variant.fusion", stored.variant.fusion, variant.fusion)]
    return [*pairs, ("variant.filter > 0", stored.variant.filter > 0, variant.filter > 0)]


def _to_tensors(tree: Any) -> Any:
    """The same nested dicts with tensors in place of arrays."""
    if isinstance(tree, dict):
        return {name: _to_tensors(value) for name, value in tree.items()}
    return torch.from_numpy(tree) if isinstance(tree, np.ndarray) else tree


def _featurizer(tables: dict[str, Any]) -> Featurizer:
    """Undo `_to_tensors` of ``asdict``."""

    def arrays(table: dict[str, Any]) -> dict[str, Any]:
        return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in table.items()}

    encoder = ModelEncoder if tables["config"]["text_model"] else HashingEncoder
    return Featurizer(
        FeatureConfig(**tables["config"]),
        {name: Scaler(**arrays(table)) for name, table in tables["scalers"].items()},
        {name: encoder(**arrays(table)) for name, table in tables["encoders"].items()},
        Scaler(**arrays(tables["past"])),
        tables["target_mean"].numpy(),
        tables["target_std"].numpy(),
    )
