"""``python -m fusedmm.train.prepare maec|stocknet SOURCE OUT``: convert a public layout to the data format."""

import argparse
import sys
from pathlib import Path

from fusedmm.train.format import DataFormatError
from fusedmm.train.prepare.maec import prepare_maec
from fusedmm.train.prepare.stocknet import prepare_stocknet


def main() -> None:
    """Parse, convert, and print one line; what is wrong with the source is one line too."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedmm.train.prepare",
        description="Convert a public data set to the format of docs/data-format.md.",
    )
    parser.add_argument("name", choices=("maec", "stocknet"))
    parser.add_argument("source", type=Path, help="directory of the public data set")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument(
        "--all-days", action="store_true", help="stocknet: keep the days which the paper's threshold drops"
    )
    arguments = parser.parse_args()
    if arguments.all_days and arguments.name != "stocknet":
        parser.error(f"--all-days is for stocknet, got it with {arguments.name}.")
    try:
        if arguments.name == "maec":
            print(prepare_maec(arguments.source, arguments.out))
        else:
            print(prepare_stocknet(arguments.source, arguments.out, all_days=arguments.all_days))
    except (DataFormatError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
