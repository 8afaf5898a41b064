"""What a run starts from: a new model or a finished run's, what of it is trained, and how it is sharded."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import nn

from fusedmm.train.config import Recipe, RecipeError, TrainConfig, VariantConfig
from fusedmm.train.model import Forecaster
from fusedmm.train.parallel import World, shard_model
from fusedmm.train.stored import load_start
from fusedmm.train.task import Task


def new_model(recipe: Recipe, variant: VariantConfig, task: Task) -> Forecaster:
    """An untrained model of a variant."""
    return Forecaster(task.sizes_of(variant), recipe.model, variant.fusion, variant.filter)


def build_model(recipe: Recipe, variant: VariantConfig, seed: int, task: Task, world: World) -> nn.Module:
    """The sharded model. Every rank initialises the whole of it, so that the start does not depend on the number of
    ranks.
    """
    torch.manual_seed(seed)
    model = new_model(recipe, variant, task)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name, recipe.train))
    stored = load_start(recipe, variant, seed)
    if stored is None:
        model.set_skip(*task.skip(recipe.model.skip), task.target_scale)
    else:
        model.load_state_dict(stored.weights)
    precision = recipe.train.precision
    dtype = (
        torch.bfloat16
        if precision == "bf16" or (precision == "auto" and world.device.type == "cuda")
        else torch.float32
    )
    return shard_model(model.to(world.device), list(model.blocks), world, dtype)


def check_patterns(config: TrainConfig, models: Mapping[str, nn.Module]) -> None:
    """Raise `RecipeError` for a pattern that no parameter of any variant matches, and for a variant with nothing left
    to train.

    Args:
        config: with ``freeze`` and ``lr_scale``.
        models: by variant; without data, on the meta device, they are enough.
    """
    parameters = {variant: [name for name, _ in model.named_parameters()] for variant, model in models.items()}
    names = sorted(set(chain(*parameters.values())))
    for key, patterns in (("freeze", config.freeze), ("lr_scale", tuple(config.lr_scale))):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                parts = ", ".join(sorted({name.partition(".")[0] + ".*" * ("." in name) for name in names}))
                raise RecipeError(
                    f"train: train.{key} must match a parameter, got {pattern!r}. There are {parts}, such as "
                    f"{names[0]}."
                )
    for variant, own in parameters.items():
        if all(is_frozen(name, config) for name in own):
            raise RecipeError(
                f"train: train.freeze must leave something to train, got {list(config.freeze)}, all of {variant!r}. "
                "To only score it, leave train.freeze out and pass train.steps=0."
            )


def is_frozen(name: str, config: TrainConfig) -> bool:
    """Whether a parameter of this name is not trained."""
    return any(fnmatchcase(name, pattern) for pattern in config.freeze)
