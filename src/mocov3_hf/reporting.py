"""How a command speaks: errors in one line with an exit code, warnings, and the command that the user typed."""

import contextlib
import difflib
import importlib.util
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn


PACKAGE = str(Path(__file__).parent)


class UsageError(ValueError):
    """A user's mistake: one line with what was wrong, what was expected and the fix. The exit code is 2."""


class MissingPackageError(UsageError, ImportError):
    """An optional package that is not installed, with the command that installs it."""


class RunError(RuntimeError):
    """
    A failure at run time that is not the user's mistake: one line with what happened. The exit code is 1.

    Args:
        message: The line.
        from_any_process: Whether this process reports it even if it is not the first, as the others may not know.
    """

    def __init__(self, message: str, from_any_process: bool = False):
        super().__init__(message)
        self.from_any_process = from_any_process


def is_first_process() -> bool:
    """Whether this process speaks for all processes of the run, before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def warn(message: str) -> None:
    """A warning on stderr, once for all processes."""
    if is_first_process():
        print(f"warning: {message}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of an error in one line. Of a traceback that a worker process handed on, its last line."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = re.sub(r"^\w+(\.\w+)*Error: ", "", text.splitlines()[-1])
    return " ".join(text.split()) or type(error).__name__


def either(names: Iterable[object]) -> str:
    """Choices in words: `A`, `A or B`, `A, B or C`."""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def nearest(name: str, known: Iterable[str], prefix: str = "", cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def require_packages(what: str, extra: str, modules: Mapping[str, str]) -> None:
    """
    Check that optional packages are installed, without importing them.

    Args:
        what: What needs them, to begin the message with.
        extra: The extra of this package that installs them.
        modules: Name of the package by the name of its module.

    Raises:
        MissingPackageError: Some are not.
    """
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingPackageError(f'{what} needs {", ".join(missing)}: pip install "mocov3_hf[{extra}]"')


def check_tracker(name: str, known: Iterable[str], available: Iterable[str]) -> None:
    """
    Check the value of `--report_to`.

    Args:
        name: Of a tracker.
        known, available: Trackers of the library that reports to them, and those of them that are installed.

    Raises:
        UsageError: An unknown tracker, or (MissingPackageError) one that is not installed.
    """
    if name not in known:
        raise UsageError(f"--report_to takes {either([*sorted(known), 'none'])}, got {name!r}")
    if name == "tensorboard":
        require_packages("--report_to tensorboard", "trackers", {"tensorboard": "tensorboard"})
    if name not in available:
        raise MissingPackageError(f"--report_to {name} needs a package that is not installed: pip install {name}")


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the Hub client's lines about retries: what fails in the end is reported in one line."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print warnings that this package raises as `warning: ...`, from the first process; others as Python does."""
    usual = warnings.formatwarning

    def formatted(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if not filename.startswith(PACKAGE):
            return usual(message, category, filename, lineno, line)
        return f"warning: {' '.join(str(message).split())}\n" if is_first_process() else ""

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """
    End the process with one line on stderr instead of a traceback: exit code 2 for a user's mistake (`ValueError`), 1
    for a failure at run time (`RunError`, `OSError`). Warnings of this package are printed in one line.
    """
    with warnings_in_one_line(), _errors_in_one_line():
        yield


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output, such as `head`, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ValueError as error:
        fail(one_line(error), 2)
    except (RunError, OSError) as error:
        fail(one_line(error), 1, getattr(error, "from_any_process", False))


def fail(message: str, code: int, from_any_process: bool = False) -> NoReturn:
    """End the process with one line on stderr, from the first process only unless told otherwise."""
    if is_first_process() or from_any_process:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def typed_command(arguments: Iterable[str] | None = None) -> str:
    """
    The command that started this process, as a shell takes it. Of several hosts, the part of one.

    Args:
        arguments: Others after the program instead of those of this process.
    """
    program, rest = sys.argv[0], list(sys.argv[1:] if arguments is None else arguments)
    is_module = os.path.basename(program) == "__main__.py"
    words = ["-m", "mocov3_hf"] if is_module else [program if program.endswith(".py") else os.path.basename(program)]
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by accelerate launch
        launcher = ["accelerate", "launch", *(["--num_processes", str(num_processes)] if num_processes > 1 else [])]
    elif num_processes > 1:
        launcher = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "N")]
    else:
        launcher = ["python"] if is_module or program.endswith(".py") else []
    return shlex.join([*launcher, *words, *rest])
