"""`python -m stego_lib.datasets`: prepares and checks datasets."""

import argparse
import sys

from ..utils import paths
from ..utils.errors import StegoError
from . import DATASETS
from .check import check
from .prepare import prepare


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 if something is missing or wrong."""
    parser = argparse.ArgumentParser(prog="python -m stego_lib.datasets", description=__doc__)
    about = "prepare: download public files, list archives to download manually, unpack them; check: files and labels"
    parser.add_argument("command", choices=("prepare", "check"), help=about)
    parser.add_argument("name", choices=DATASETS, metavar="NAME", help=", ".join(DATASETS))
    root = str(paths.data_root())
    parser.add_argument("--root", default=root, help="parent folder of the datasets (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            return 0 if check(options.name, options.root) else 1
        prepare(options.name, options.root)
        return 0
    except StegoError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
