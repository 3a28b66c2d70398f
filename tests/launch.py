"""Starts a Python file in an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent


def python(file: Path, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run `file` in one process of one thread; a failure shows its output."""
    return run([sys.executable, str(file), *arguments], check, **environment)


def search_path() -> str:
    """The tests' own folder before what is there already."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def run(command: list[str], check: bool, **environment: str) -> subprocess.CompletedProcess:
    # Two-core machines: more threads than cores only wait for each other.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), **environment}
    variables.pop("PYTHONWARNINGS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done
