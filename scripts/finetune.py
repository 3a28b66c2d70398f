"""The command `mocov3 finetune` as a script: `python scripts/finetune.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
