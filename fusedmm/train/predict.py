"""``python -m fusedmm.train.predict RUN --data DIR --out FILE``: what a finished run forecasts for new samples.

The data needs no targets. One row a sample, in the file's order: ``sample``, ``time``; ``forecast_<target>``, or
``probability_<class>`` where targets are classes; ``mass_<modality>``, the share of the attention. In float32, wherever
it runs.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from fusedmm.train.batches import MultimodalDataset
from fusedmm.train.config import RecipeError
from fusedmm.train.dataset import Dataset
from fusedmm.train.evaluate import predict
from fusedmm.train.format import DataFormatError, read_dataset
from fusedmm.train.model import Forecaster, Sizes
from fusedmm.train.parallel import World, open_world
from fusedmm.train.pool import pool_dataset
from fusedmm.train.stored import StoredModel, check_data
from fusedmm.train.task import token_caps
from fusedmm.train.text import MissingPackage


def forecast_dataset(stored: StoredModel, dataset: Dataset, world: World) -> pd.DataFrame:
    """Forecast every sample; see the module's docstring for the columns.

    Raises:
        RecipeError: where the data has not what the run has learned from.
    """
    check_data(stored, dataset, need_targets=False)
    dataset = pool_dataset(dataset, stored.data.pool_modalities, stored.data.pool_tokens)
    features = stored.featurizer.transform(dataset)
    rows = MultimodalDataset(features, np.arange(len(features.sample)), token_caps(stored.data, dataset))
    names = stored.variant.modalities or features.names
    outputs = len(stored.weights["skip_bias"])
    sizes = Sizes({name: features.widths[name] for name in names}, features.past.shape[1], outputs)
    model = Forecaster(sizes, stored.model, stored.variant.fusion, stored.variant.filter)
    model.load_state_dict(stored.weights)
    found = predict(model.to(world.device), rows, world)
    values = found.prediction.softmax(dim=1) if features.classes else found.prediction
    columns = [f"probability_{number}" for number in range(outputs)]
    if not features.classes:
        columns = [f"forecast_{name}" for name in stored.targets]
    table = {"sample": features.sample, "time": features.time}
    table |= dict(zip(columns, values.numpy().T, strict=True))
    return pd.DataFrame(table | {f"mass_{name}": mass for name, mass in zip(names, found.mass.numpy().T, strict=True)})


def main(arguments: list[str] | None = None) -> int:
    """Write the forecasts and return the exit status: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m fusedmm.train.predict", description="Forecast new samples.")
    parser.add_argument("run", type=Path, help="folder of a finished run, OUT/runs/VARIANT-seedN")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data; needs no targets")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="parquet file to write")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    options = parser.parse_args(arguments)
    try:
        stored = StoredModel.load(options.run)
        with open_world(options.device) as world:
            table = forecast_dataset(stored, read_dataset(options.data, need_targets=False), world)
            if world.is_main:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                table.to_parquet(options.out, index=False)
    except (RecipeError, DataFormatError, FileNotFoundError, MissingPackage) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(table)} forecasts in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
