"""What the command lines of several benchmarks share. Imports nothing that is large, as origin.py."""

import argparse
import os
from pathlib import Path


def real_data(part: str) -> Path:
    """A folder of real data: in GIGAMIL_TEST_DATA, as for the tests, or in ../shared/data."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("GIGAMIL_TEST_DATA", default)) / part


def need_file(path: Path, option: str) -> None:
    """Leave with a message where a file of real data is not there."""
    if not path.is_file():
        raise SystemExit(
            f"there is no '{path}': set {option}, or GIGAMIL_TEST_DATA to the folder that holds {path.parent.name}/"
        )


def add_sizes(parser: argparse.ArgumentParser, whole: object, quick: object, tiny: object, quick_is: str) -> None:
    """Add `--quick` and `--tiny`, of which one may be given; `sizes` of the arguments is then that one, else `whole`.

    Args:
        quick_is: what the quick measurement leaves out, for the help.
    """
    parser.set_defaults(sizes=whole)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="sizes", const=quick, help=quick_is)
    size.add_argument("--tiny", action="store_const", dest="sizes", const=tiny, help="for tests: figures mean nothing")
