"""The command `mocov3 report` as a script: `python scripts/report.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
