"""The recipe: what it accepts, and what it says about what it does not."""

from pathlib import Path

import pytest

from fusedmm.train.config import Recipe, RecipeError, load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.toml"))


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_end_with_the_gated_fusion(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.variant[-1].fusion == "gated"
    assert recipe.run.out == f"runs/{path.stem}"


def test_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Recipe()


def test_values_and_overrides(tmp_path: Path) -> None:
    text = (
        '[train]\nlr = 1\nseeds = [1, 2]\n[data]\ntrain_end = 2016-08-31\n[[variant]]\nname = "a"\nmodalities = ["x"]\n'
    )
    patterns = 'train.lr_scale={"encoders.*" = 1, "head.*" = 0.5}', 'train.freeze=["latents"]'
    recipe = load(tmp_path, text, "train.steps=50", "train.warmup=5", "run.out=a/b", "run.resume=false", *patterns)
    assert recipe.train.lr_scale == {"encoders.*": 1.0, "head.*": 0.5}
    assert recipe.train.freeze == ("latents",)
    assert recipe.train.lr == 1.0
    assert isinstance(recipe.train.lr, float)
    assert recipe.train.seeds == (1, 2)
    assert recipe.train.steps == 50
    assert recipe.data.train_end == "2016-08-31"
    assert recipe.run.out == "a/b"
    assert recipe.run.resume is False
    assert recipe.variant[0].modalities == ("x",)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("[train]\nlearning_rat = 1", (), ("'learning_rat'", "recipe.toml", "[train]")),
        ("[train]\nstep = 1", (), ("'step'", "Did you mean 'steps'?")),
        ("[trian]\nsteps = 1", (), ("'trian'", "Did you mean 'train'?", "recipe.toml")),
        ("[train]\nsteps = -1", (), ("train.steps", "recipe.toml", "at least 0", "got -1")),
        ("[train]\nlr = nan", (), ("train.lr", "got nan")),
        ("[model]\ndropout = 2.0", (), ("model.dropout", "from 0 to 0.9", "got 2.0")),
        ('[train]\nsteps = "many"', (), ("train.steps", "must be int", "got 'many'")),
        ("[train]\nsteps = true", (), ("train.steps", "must be int", "got True")),
        ("[train]\nsteps = 10.5", (), ("train.steps", "must be int", "got 10.5")),
        ("[train]\nseeds = 3", (), ("train.seeds", "must be a list")),
        ("[train]\nlr_scale = 0.1", (), ("train.lr_scale", "must be a table of patterns", "got 0.1")),
        ('[train]\nlr_scale = {"a.*" = -1}', (), ("train.lr_scale.'a.*'", "from 0 to 1000", "got -1")),
        ("", ("train.freeze=encoders.*",), ("train.freeze", "must be a list", "got 'encoders.*'")),
        ("[train]\nseeds = []", (), ("train.seeds", "at least one")),
        ("[train]\nseeds = [1, 1]", (), ("train.seeds", "distinct")),
        ("[train]\nsteps = 10\nwarmup = 20", (), ("train.warmup", "at most train.steps=10", "got 20")),
        ("[train]\nsteps = 10", (), ("train.warmup", "at most train.steps=10", "where it is not given, 20")),
        ("[model]\ndim = 40\nheads = 4", (), ("model.heads", "dim=40", "got 4")),
        ('[[variant]]\nfusion = "gatd"', (), ("variant.fusion", "'gated', 'plain', 'concat'", "got 'gatd'")),
        ('[[variant]]\nname = "../a"', (), ("variant.name", "got '../a'")),
        ('[variant]\nname = "a"', (), ("variant", "[[variant]]")),
        ('[[variant]]\nname = "a"\n[[variant]]\nname = "a"', (), ("variant.name", "distinct")),
        ("train = 3", (), ("train", "must be a table", "got 3")),
        ("[train\n", (), ("recipe.toml is not valid TOML",)),
        ("", ("train.stepz=5",), ("'stepz'", "the command line", "Did you mean 'steps'?")),
        ("", ("steps=5",), ("section.key=value", "got 'steps=5'")),
        ("", ("train.steps",), ("section.key=value", "got 'train.steps'")),
        ("", ("train.steps=-1",), ("train.steps in the command line", "got -1")),
    ],
)
def test_refusals_name_the_key_and_the_file(
    tmp_path: Path, text: str, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError) as refusal:
        load(tmp_path, text, *overrides)
    message = str(refusal.value)
    assert message.startswith("train: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.toml does not exist.*recipes/demo\.toml"):
        load_recipe(tmp_path / "nothing.toml")
