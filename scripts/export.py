"""The command `mocov3 export` as a script: `python scripts/export.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
