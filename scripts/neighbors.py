"""The command `mocov3 neighbors` as a script: `python scripts/neighbors.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["neighbors", *sys.argv[1:]])
