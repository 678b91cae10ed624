"""`python -m gigamil`: the same as the command `gigamil`."""

import sys

from gigamil.cli import main

if __name__ == "__main__":
    sys.exit(main())
