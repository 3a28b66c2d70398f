"""The command `mocov3 knn` as a script: `python scripts/knn.py --help`."""

import sys

from mocov3_cli import main


if __name__ == "__main__":
    main(["knn", *sys.argv[1:]])
