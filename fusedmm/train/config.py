"""The recipe: what `python -m fusedmm.train` reads. Frozen dataclasses, one TOML table each; a key carries its meaning
and its range.

A recipe that names an unknown key, a wrong type or a value out of range is refused with one message before anything
starts.
"""

import dataclasses
import datetime
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FUSIONS = ("gated", "plain", "concat")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key and the file."""


def key(
    default: Any, meaning: str, *, low: float | None = None, high: float | None = None, choices: Sequence[str] = ()
) -> Any:
    """A dataclass field with what the recipe's reader needs: default, meaning, inclusive range, choices."""
    metadata = {"default": default, "meaning": meaning, "low": low, "high": high, "choices": tuple(choices)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are split."""

    path: str = key("", "directory written by `python -m fusedmm.train.prepare`; empty: simulate a market")
    simulate_days: int = key(400, "days of the simulated market, where path is empty", low=60)
    simulate_entities: int = key(10, "entities of the simulated market", low=1)
    simulate_seed: int = key(0, "seed of the simulated market", low=0)
    train_end: str = key("", "last day of the training split, YYYY-MM-DD; empty: by shares of the days")
    dev_start: str = key("", "first day of the dev split")
    dev_end: str = key("", "last day of the dev split")
    test_start: str = key("", "first day of the test split")
    test_end: str = key("", "last day of the test split")
    embargo_days: int = key(0, "days left out before dev and before test, on top of the purge", low=0)
    text_dim: int = key(32, "size of a sentence's vector", low=1)
    text_model: str = key(
        "", "name or path of a sentence-transformers model; empty: hashed words, weighted and projected"
    )
    text_cache: str = key("", "directory where the model's sentence vectors are kept")
    pool_modalities: tuple[str, ...] = key((), "modalities whose consecutive tokens are merged before featurising")
    pool_tokens: int = key(32, "tokens of them that become one", low=2)
    max_tokens: int = key(64, "tokens kept of each modality of a sample, the latest; 0: all", low=0)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes shared by every variant, so that the fusions are compared at one budget."""

    dim: int = key(32, "width of tokens and latent queries", low=8, high=4096)
    heads: int = key(2, "attention heads; dim / heads is at least 16", low=1, high=128)
    layers: int = key(2, "fusion blocks", low=1, high=64)
    latents: int = key(2, "learned latent queries of a sample", low=1, high=8)
    mlp_ratio: float = key(2.0, "hidden width of a block's MLP over dim", low=0.25, high=16.0)
    dropout: float = key(0.0, "dropout after the encoders and before the head", low=0.0, high=0.9)
    softmax: str = key("joint", "softmax of the gated fusion", choices=("joint", "per_modality"))
    output_gate: bool = key(False, "sigmoid output gate in the gated fusion")
    skip: str = key(
        "ridge",
        "added to the head: ridge on the past features (fitted on the train split, frozen), or nothing",
        choices=("ridge", "none"),
    )


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser's loop."""

    steps: int = key(300, "optimiser steps of one run; 0: only evaluate the start", low=0)
    init: str = key(
        "",
        "what to start from: a finished run's folder, or a run.out with runs of the same variants and seeds; their "
        "featurizer is kept. Empty: from nothing",
    )
    batch_size: int = key(64, "samples of one step over all ranks; the ranks must divide it", low=1)
    lr: float = key(2e-3, "peak learning rate of AdamW", low=0.0, high=1.0)
    lr_scale: Mapping[str, float] = key(
        {},
        'factor of lr by pattern of parameter names, {"encoders.*" = 0.1}; of several that match the last counts',
        low=0.0,
        high=1000.0,
    )
    freeze: tuple[str, ...] = key((), 'patterns of names of parameters that are not trained, ["encoders.*", "latents"]')
    weight_decay: float = key(0.05, "decoupled weight decay of the matrices", low=0.0, high=10.0)
    warmup: int = key(20, "steps of linear warm-up; cosine to lr / 20 follows", low=0)
    clip: float = key(1.0, "largest gradient norm", low=1e-6)
    ema: float = key(
        0.98, "decay of the averaged weights that dev and test see; 0: the weights themselves", low=0.0, high=0.99999
    )
    modality_dropout: float = key(
        0.1,
        "share of (sample, modality) pairs hidden in training, so that the model copes without any of them",
        low=0.0,
        high=0.9,
    )
    seeds: tuple[int, ...] = key((0,), "one run a seed and variant; their predictions are averaged", low=0)
    eval_every: int = key(50, "steps between two looks at the dev split", low=1)
    patience: int = key(4, "looks without a better dev loss before a run stops early; 0: never", low=0)
    spike_sigma: float = key(
        6.0, "a step is skipped where loss or gradient norm lies this many deviations above its window", low=1.0
    )
    spike_window: int = key(128, "accepted steps the detector remembers", low=8)
    max_skips: int = key(20, "skipped steps in a row before the run is given up", low=1)
    precision: str = key(
        "auto",
        "forward and backward: bf16 with float32 weights, or float32; auto: bf16 on CUDA",
        choices=("auto", "fp32", "bf16"),
    )


@dataclass(frozen=True)
class RunConfig:
    """Where results go and on what."""

    out: str = key("runs/demo", "directory of logs, checkpoints and the report")
    device: str = key("auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))
    threads: int = key(1, "CPU threads of a rank; models as small as these lose time with more", low=1)
    shard: int = key(0, "ranks over which weights are sharded; the rest replicate (HSDP). 0: all", low=0)
    resume: bool = key(True, "continue from checkpoints of the same recipe in out; false: start over")
    checkpoint_every: int = key(
        200, "steps between two checkpoints; the last step and SIGTERM write one as well", low=1
    )
    checkpoint_async: bool = key(False, "write checkpoints while training goes on")
    keep_checkpoints: int = key(1, "checkpoints of a run that are kept", low=1)
    tensorboard: bool = key(True, "also write TensorBoard event files")
    block_days: int = key(
        1, "expected run of days of the bootstrap; more where labels of neighbouring days overlap", low=1
    )
    bootstrap: int = key(2000, "resamples of the day-block bootstrap", low=100)


@dataclass(frozen=True)
class VariantConfig:
    """One model of the comparison: what it may see and how it fuses."""

    name: str = key("gated", "row of the table")
    modalities: tuple[str, ...] = key((), "modalities it sees; none named: all")
    fusion: str = key(
        "gated",
        "gated: this project's module. plain: one softmax over all tokens. concat: mean of each modality, concatenated",
        choices=FUSIONS,
    )
    filter: float = key(
        0.0,
        "gated only: a modality goes for good once it earns less than this share of what all earn on dev; 0: none goes",
        low=0.0,
        high=1.0,
    )


@dataclass(frozen=True)
class Recipe:
    """The whole recipe, one attribute a table."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    variant: tuple[VariantConfig, ...] = (VariantConfig(),)


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "run": RunConfig,
    "variant": VariantConfig,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, apply ``section.key=value`` overrides, check every key.

    Args:
        path: the TOML file.
        overrides: values in TOML syntax; a bare word is a string: ``run.out=runs/a``, ``train.seeds=[0,1]``.

    Raises:
        RecipeError: for a file that is missing or no TOML, an unknown table or key, a wrong type, or a value out of
            range.
    """
    if not Path(path).is_file():
        raise RecipeError(
            f"train: recipe {path} does not exist. Start from one in recipes/, for example recipes/demo.toml."
        )
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"train: {path} is not valid TOML: {error}.") from error
    recipe = recipe_from_tables(tables, str(path))
    changed = {name: _as_tables(getattr(recipe, name)) for name in SECTIONS}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, option = name.partition(".")
        if not equals or not dot or section == "variant":
            raise RecipeError(
                f"train: override must be section.key=value, got {override!r}. For example train.steps=100."
            )
        _look_up(section, SECTIONS, "table", "the command line")
        changed[section][option] = _parse_value(text)
    return recipe_from_tables(changed, "the command line") if overrides else recipe


def recipe_from_tables(tables: Mapping[str, Any], origin: str) -> Recipe:
    """Check nested tables and build the recipe; ``origin`` is the file that messages name."""
    built: dict[str, Any] = {}
    for name, table in tables.items():
        _look_up(name, SECTIONS, "table", origin)
        if name == "variant":
            if not isinstance(table, list) or not table or not all(isinstance(entry, Mapping) for entry in table):
                raise RecipeError(f"train: variant in {origin} must be tables [[variant]], one a model, got {table!r}.")
            built[name] = tuple(_build(name, entry, origin) for entry in table)
        elif not isinstance(table, Mapping):
            raise RecipeError(f"train: {name} in {origin} must be a table [{name}], got {table!r}.")
        else:
            built[name] = _build(name, table, origin)
    recipe = Recipe(**built)
    _check_together(recipe, origin)
    return recipe


def describe_keys() -> str:
    """Every key with its default, range and meaning: what ``--help`` prints."""
    lines = []
    for name, section in SECTIONS.items():
        lines.append(f"[{name}]" if name != "variant" else "[[variant]]")
        for option in dataclasses.fields(section):
            allowed = _range_text(option.metadata)
            lines.append(f"  {option.name} = {_as_toml(option.metadata['default'])}{allowed and ', must be' + allowed}")
            lines.append(f"      {option.metadata['meaning']}")
    return "\n".join(lines)


def _build(section: str, table: Mapping[str, Any], origin: str) -> Any:
    schema = SECTIONS[section]
    fields = {option.name: option for option in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    values = {}
    for name, value in table.items():
        _look_up(name, fields, f"key in [{section}]", origin)
        values[name] = _checked(f"{section}.{name}", value, hints[name], fields[name].metadata, origin)
    return schema(**values)


def _checked(name: str, value: Any, hint: Any, metadata: Mapping[str, Any], origin: str) -> Any:
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise RecipeError(f"train: {name} in {origin} must be a table of patterns, got {value!r}.")
        wanted = typing.get_args(hint)[1]
        return {pattern: _checked(f"{name}.{pattern!r}", x, wanted, metadata, origin) for pattern, x in value.items()}
    if isinstance(hint, types.GenericAlias):  # tuple[int, ...] or tuple[str, ...]
        if not isinstance(value, list | tuple):
            raise RecipeError(f"train: {name} in {origin} must be a list, got {value!r}.")
        return tuple(_checked(name, entry, typing.get_args(hint)[0], metadata, origin) for entry in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and isinstance(value, datetime.date):  # TOML reads an unquoted day as a date
        value = value.isoformat()
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"train: {name} in {origin} must be {hint.__name__}, got {value!r}.")
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    inside = value in choices if choices else (low is None or value >= low) and (high is None or value <= high)
    if not inside:
        raise RecipeError(f"train: {name} in {origin} must be{_range_text(metadata)}, got {value!r}.")
    return value


def _check_together(recipe: Recipe, origin: str) -> None:
    """Rules between keys."""
    model, train = recipe.model, recipe.train
    if model.dim % model.heads or model.dim // model.heads < 16:
        raise RecipeError(
            f"train: model.heads in {origin} must divide model.dim={model.dim} into heads of 16 or more, "
            f"got {model.heads}."
        )
    if train.warmup > train.steps > 0:
        raise RecipeError(
            f"train: train.warmup in {origin} must be at most train.steps={train.steps}, got {train.warmup} "
            f"(where it is not given, {TrainConfig().warmup})."
        )
    for what, names in (("train.seeds", train.seeds), ("variant.name", [variant.name for variant in recipe.variant])):
        if not names or len(set(names)) != len(names):
            raise RecipeError(f"train: {what} in {origin} must be distinct and at least one, got {list(names)}.")
    for variant in recipe.variant:
        if not variant.name or not all(letter.isalnum() or letter in "_-+" for letter in variant.name):
            raise RecipeError(
                f"train: variant.name in {origin} must be letters, digits, _, - or + (it names a folder), "
                f"got {variant.name!r}."
            )
        if variant.filter and variant.fusion != "gated":
            raise RecipeError(
                f"train: variant.filter in {origin} must be 0 where fusion is not 'gated', got {variant.filter:g} in "
                f"{variant.name!r}."
            )


def _look_up(name: str, known: Mapping[str, Any], what: str, origin: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise RecipeError(f"train: {name!r} is no {what}, in {origin}. Did you mean {near[0]!r}?")


def _range_text(metadata: Mapping[str, Any]) -> str:
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if choices:
        return " one of " + ", ".join(repr(choice) for choice in choices)
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    return f" at least {low:g}" if low is not None else ""


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _as_tables(section: Any) -> Any:
    return (
        [dataclasses.asdict(entry) for entry in section] if isinstance(section, tuple) else dataclasses.asdict(section)
    )


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)
