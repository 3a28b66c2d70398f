"""The command `mocov3 convert` as a script: `python scripts/convert_checkpoint.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
