"""`python -m qkernels`: the same program as the `qkernels` command."""

import sys

from qkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
