"""``--data DIR``: a prepared data set, or a public one in its own layout, which is prepared first."""

import json
import os
import zlib
from pathlib import Path

from fusedmm.train.config import RecipeError
from fusedmm.train.prepare.maec import prepare_maec
from fusedmm.train.prepare.stocknet import prepare_stocknet

LAYOUTS = {
    "maec": ("calls.parquet", "MAEC_Dataset"),
    "stocknet": ("tweets.parquet", "tweet"),
}
"""What gives a public data set away: one of these entries, in the folder itself."""


def prepared(directory: Path | None, recipe: Path) -> tuple[list[str], Path]:
    """Find or make the data set that ``directory`` stands for, and the recipe that fits it.

    Args:
        directory: None: what the recipe says. Else it holds ``dataset.json``, or MAEC or StockNet as parquet or as
            published; those are prepared into ``runs/data/``, once.
        recipe: used unless a recipe of the data set's name lies beside it.

    Returns:
        Overrides that point the recipe to the data, and the recipe.

    Raises:
        RecipeError: for a directory that is missing or holds none of these.
        DataFormatError: from a converter, naming the file.
    """
    if directory is None:
        return [], recipe
    if not directory.is_dir():
        raise RecipeError(f"train: --data must be a directory, got {directory}, which is not there.")
    if not (directory / "dataset.json").is_file():
        directory = _convert(directory)
    name = json.loads((directory / "dataset.json").read_text())["name"]
    fitting = recipe.with_name(f"{name}.toml")
    return [f"data.path={directory}"], fitting if fitting.is_file() else recipe


def _convert(source: Path) -> Path:
    for name, entries in LAYOUTS.items():
        if any((source / entry).exists() for entry in entries):
            out = Path("runs/data") / f"{name}-{zlib.crc32(str(source.resolve()).encode()):08x}"
            if not (out / "dataset.json").is_file():
                if "RANK" in os.environ:
                    raise RecipeError(
                        "train: --data must be prepared before torchrun, got a public layout. Prepare it."
                    )
                print(f"preparing {name} from {source} into {out}", flush=True)
                print(prepare_maec(source, out) if name == "maec" else prepare_stocknet(source, out), flush=True)
            return out
    found = ", ".join(sorted(entry.name for entry in source.iterdir())[:8]) or "nothing"
    raise RecipeError(
        f"train: --data must hold dataset.json, MAEC or StockNet, got {source} with {found}. Convert your own data as "
        "docs/data-format.md says."
    )
