"""The command `mocov3 linear-probe` as a script: `python scripts/linear_probe.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["linear-probe", *sys.argv[1:]])
