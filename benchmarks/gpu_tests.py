"""The tests that need a GPU, with their outcomes as JSON.

    python -m benchmarks.gpu_tests [--slow] --output FILE.json

Exits with 1 if one fails. Without a GPU all are skipped, each with its reason. --slow runs those that compile for
long.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from .bench import words
from .data_path import finish


TESTS = Path(__file__).parent.parent / "tests"
# Where the tests marked `gpu` are: collecting all others takes longer than these.
FILES = (
    "data/test_photometric.py",
    "evaluation/test_evaluation_gpu.py",
    "model/test_gpu.py",
    "pretraining/test_gpu.py",
    "pretraining/test_step_candidates.py",
)
# Packages that are imported already cannot be rewritten, which is a warning.
ARGUMENTS = words("-q -n 0 -p no:cacheprovider -W ignore::pytest.PytestAssertRewriteWarning")


class Outcomes:
    """
    Plugin of pytest: outcome, seconds and, unless it passed, the last line of every test.

    Written to the file, if there is one, after every test: the tests may be ended by a time limit.
    """

    def __init__(self, file: str | None):
        self.file, self.found = file, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        why = str(report.longrepr).strip().splitlines()[-1:] if not report.passed else []
        self.found[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 2), "why": why}
        if self.file is not None:
            Path(self.file).write_text(json.dumps(self.result()) + "\n")

    def result(self) -> dict:
        return {"counts": Counter(test["outcome"] for test in self.found.values()), "tests": self.found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slow", action="store_true", help="the tests marked `slow` instead of the others")
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    outcomes = Outcomes(options.output)
    files = [str(TESTS / name) for name in FILES]
    marks = "gpu and slow" if options.slow else "gpu and not slow"
    code = pytest.main(["-m", marks, *ARGUMENTS, *files], plugins=[outcomes])
    finish(outcomes.result(), options.output)
    sys.exit(int(code))


if __name__ == "__main__":
    main()
