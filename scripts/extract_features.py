"""The command `mocov3 extract` as a script: `python scripts/extract_features.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["extract", *sys.argv[1:]])
