"""The command `mocov3 classify` as a script: `python scripts/classify.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["classify", *sys.argv[1:]])
