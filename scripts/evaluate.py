"""The command `mocov3 evaluate` as a script: `python scripts/evaluate.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
