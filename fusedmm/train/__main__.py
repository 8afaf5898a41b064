"""``python -m fusedmm.train recipe.toml [section.key=value ...]``: the main job, alone or under torchrun."""

import argparse
import os
import sys

from fusedmm.train.config import RecipeError, describe_keys, load_recipe
from fusedmm.train.runner import run_recipe
from fusedmm.train.trainer import Interrupted, TrainingError

EPILOG = """
The demo, a simulated market with known truth:   python -m fusedmm.train recipes/demo.toml
Earnings calls, after
`python -m fusedmm.train.prepare maec SOURCE DIR`: python -m fusedmm.train recipes/maec.toml data.path=DIR
On two processes:                                torchrun --nproc-per-node 2 -m fusedmm.train recipes/demo.toml

Keys of a recipe, with their defaults:

"""


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe; returns the exit status: 0 done, 1 refused or failed, 2 done but a check against the
    known truth failed, 143 stopped by a signal with a checkpoint
    written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fusedmm.train",
        description="Train and compare multimodal forecasters; writes report.md, report.json and report.png.",
        epilog=EPILOG + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="TOML file; see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the recipe")
    options = parser.parse_args(arguments)
    try:
        passed = run_recipe(load_recipe(options.recipe, options.overrides))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 143
    except (RecipeError, FileNotFoundError, TrainingError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if passed else 2


if __name__ == "__main__":
    sys.exit(main())
