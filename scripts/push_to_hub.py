"""The command `mocov3 push` as a script: `python scripts/push_to_hub.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
