"""``python -m fusedmm.train recipe.toml [section.key=value ...]``: the main job, alone or under torchrun."""

import argparse
import sys
from pathlib import Path

from fusedmm.train.config import RecipeError, describe_keys, load_recipe
from fusedmm.train.format import DataFormatError
from fusedmm.train.parallel import ended
from fusedmm.train.runner import run_recipe
from fusedmm.train.source import prepared
from fusedmm.train.text import MissingPackage
from fusedmm.train.trainer import Interrupted, TrainingError

EPILOG = """
The demo, a simulated market with known truth:  python -m fusedmm.train recipes/demo.toml
MAEC or StockNet, in one go:                    python -m fusedmm.train recipes/maec.toml --data SOURCE
The same in two steps:                          python -m fusedmm.train.prepare maec SOURCE DIR
                                                python -m fusedmm.train recipes/maec.toml data.path=DIR
Fine-tune finished runs on other data:          python -m fusedmm.train RECIPE data.path=DIR run.out=NEW train.init=OLD
Forecast with a finished run:                   python -m fusedmm.train.predict RUN --data DIR --out FILE
On two processes:                               torchrun --nproc-per-node 2 -m fusedmm.train recipes/demo.toml

With --data, a recipe named after the data set and lying beside RECIPE is used instead of RECIPE.

Exit status: 0 done; 1 refused or failed; 2 done, but a check against the truth of simulated data failed, as in few
steps; 143 stopped by a signal, with a checkpoint written. torchrun makes 1 of all but 0, and names the cause last.

Keys of a recipe, with their defaults:

"""


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe and return the exit status, as `EPILOG` says."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedmm.train",
        description="Train and compare multimodal forecasters; writes report.md, report.json and report.png.",
        epilog=EPILOG + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="TOML file; see recipes/")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="prepared data, or MAEC or StockNet, which is prepared"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="replaces a key of the recipe"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        data, recipe = prepared(options.data, options.recipe)
        passed = run_recipe(load_recipe(recipe, [*data, *options.overrides]))
    except Interrupted as stopped:
        return ended(143, str(stopped))
    except (RecipeError, DataFormatError, FileNotFoundError, MissingPackage, TrainingError) as error:
        return ended(1, f"error: {error}")
    if not passed:
        return ended(2, "train: done, but a check against the truth of the simulation failed; see the report.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
