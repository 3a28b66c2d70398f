"""The command `mocov3 pretrain` as a script: `python scripts/pretrain.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
