"""What the command lines of several benchmarks share. Imports nothing that is large, as origin.py."""

import argparse


def add_sizes(parser: argparse.ArgumentParser, whole: object, quick: object, tiny: object, quick_is: str) -> None:
    """Add `--quick` and `--tiny`, of which one may be given; `sizes` of the arguments is then that one, else `whole`.

    Args:
        quick_is: what the quick measurement leaves out, for the help.
    """
    parser.set_defaults(sizes=whole)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="sizes", const=quick, help=quick_is)
    size.add_argument("--tiny", action="store_const", dest="sizes", const=tiny, help="for tests: figures mean nothing")
