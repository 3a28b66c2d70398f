"""Linear evaluation from the command line."""

import sys
from collections.abc import Sequence

from . import cached_linear


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line of linear evaluation. Bad input ends the process with one line and status 1.

    Args:
        argv: None for those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--cached" not in argv:
        sys.exit("error: this version trains linear classifiers on cached features only: add --cached")
    return cached_linear.main(argv)
