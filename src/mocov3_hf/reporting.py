"""How a command speaks: errors in one line with an exit code, warnings, and the command that the user typed."""

import contextlib
import errno
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, TextIO

from safetensors import SafetensorError
from tqdm import tqdm


# Errors of writing that end when somebody makes room.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
LONGEST_LINE = 2000  # characters of an error or a warning


class UsageError(ValueError):
    """A user's mistake: one line with what was wrong, what was expected and the fix. The exit code is 2."""


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


def shorten(text: str) -> str:
    """Without the middle of a text that no screen shows, such as a damaged file in the place of a name."""
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 2 :]}"


def warn(message: str) -> None:
    """A warning on stderr, once for all processes; above a progress bar, if there is one."""
    if is_first_process():
        tqdm.write(f"warning: {shorten(message)}", file=sys.stderr)


class ToFullDisk:
    """A text stream that goes on when the disk of its file is full. What cannot be written is left out."""

    def __init__(self, stream: TextIO):
        self.stream, self.is_complete = stream, True

    def write(self, text: str) -> int:
        try:
            if not self.is_complete:
                self.stream.flush()  # of what was printed before
                self.is_complete = True
                self.stream.write("\n[output is missing here: the disk was full]\n")
            return self.stream.write(text)
        except OSError as error:
            self.accept(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.accept(error)

    def accept(self, error: OSError) -> None:
        if error.errno not in FULL_DISK:
            raise error
        self.is_complete = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def output_to_full_disk(is_command: bool) -> Iterator[None]:
    """
    Keep what is printed from ending the block if it goes to a file on a full disk.

    Args:
        is_command: Whether the process exits afterwards. Its exit code then does not depend on the output either.
    """
    streams = [ToFullDisk(stream) for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
                if is_command and not stream.is_complete:
                    with contextlib.suppress(OSError):  # not a file of the system
                        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(error: BaseException) -> str:
    """The message of an error in one line. Of a traceback that a worker process handed on, its last line."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = re.sub(r"^\w+(\.\w+)*Error: ", "", text.splitlines()[-1])
    return " ".join(text.split()) or type(error).__name__


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
    usual, package = warnings.formatwarning, os.path.dirname(__file__)

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if not filename.startswith(package):
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
    for a failure at run time (`RunError`, `OSError`, and what safetensors raises for a full disk).
    """
    try:
        with warnings_in_one_line():
            yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output, such as `head`, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ValueError as error:
        fail(one_line(error), 2)
    except (RunError, OSError, SafetensorError) as error:
        fail(one_line(error), 1, getattr(error, "from_any_process", False))


def fail(message: str, code: int, from_any_process: bool = False) -> NoReturn:
    """End the process with one line on stderr, from the first process only unless told otherwise."""
    if is_first_process() or from_any_process:
        print(f"error: {shorten(message)}", file=sys.stderr)
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
