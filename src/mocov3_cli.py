"""
The command `mocov3`: a table of commands, each a function of one subpackage of `mocov3_hf`.

It is a module beside the package, because importing the package imports torch, which `mocov3 --help` does not need.
"""

import contextlib
import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn


# Name: module and function, called with the arguments after the name; what the command does.
COMMANDS = {
    "pretrain": ("mocov3_hf.api:pretrain_command", "pre-train an encoder on unlabeled images"),
    "knn": ("mocov3_hf.evaluation.knn:main", "evaluate an encoder by its nearest neighbors"),
    "linear-probe": ("mocov3_hf.evaluation.linear_probe:main", "train a linear classifier on a frozen encoder"),
    "finetune": ("mocov3_hf.evaluation.finetune:main", "fine-tune an encoder as a classifier"),
    "evaluate": ("mocov3_hf.evaluation.evaluate:main", "test a classifier on a labeled data set"),
    "extract": ("mocov3_hf.inference.files:extract", "write the features of images to a folder"),
    "neighbors": ("mocov3_hf.curation:main", "find nearest images, near-duplicates and outliers"),
    "classify": ("mocov3_hf.inference.files:classify", "print the labels of images"),
    "convert": ("mocov3_hf.interop.convert:main", "convert a checkpoint of another codebase or a published model"),
    "export": ("mocov3_hf.interop.export:main", "export to transformers' own classes, timm, ONNX or torch.export"),
    "push": ("mocov3_hf.hub.push:main", "push a model folder to the Hub"),
    "report": ("mocov3_hf.report.write:main", "write an HTML report about a run or a model"),
    "recipes": ("mocov3_hf.options:recipes_main", "list the recipes, or print one"),
    "zoo": ("mocov3_hf.zoo:main", "list the published models"),
}
# How OpenMP waits: the standard, GNU's and LLVM's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
HELP = """\
usage: mocov3 COMMAND [--option value ...]

MoCo v3 self-supervised pre-training for any vision backbone, native to Hugging Face transformers.

commands:
{commands}

mocov3 COMMAND --help shows the options of a command, mocov3 --version the version.
Several processes: accelerate launch -m mocov3_hf COMMAND ..., or torchrun -m mocov3_hf COMMAND ..."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; without arguments those of the process. Exit code 2 for a mistake, 1 for a failure."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        show(help_text())
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        show(f"mocov3_hf {version('mocov3_hf')}")
        return
    name = arguments[0].replace("_", "-")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(COMMANDS)}"
        print(f"error: there is no command {arguments[0]!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    module, function = COMMANDS[name][0].split(":")
    wait_passively()
    with ended_by_signals("SIGTERM", "SIGUSR1"):
        with ended_by_signals("SIGINT"):
            command = getattr(importlib.import_module(module), function)
        try:
            command(arguments[1:])
        except KeyboardInterrupt:  # of a command that does not handle it itself
            announce(signal.SIGINT)
            sys.exit(128 + signal.SIGINT)


def wait_passively() -> None:
    """
    Let threads of OpenMP sleep while they wait, unless the user has chosen how they wait. Beside other busy processes,
    threads that spin slow a step down many times (benchmarks/contention.py).

    OpenMP reads this when torch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0")


def show(text: str) -> None:
    """Print a text. Its reader, such as `head`, may close the pipe before the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def ended_by_signals(*names: str) -> Iterator[None]:
    """
    Signals end the process in one line, until the command handles them itself. Importing packages takes seconds.

    Signals that are ignored, as in the background, stay ignored.
    """
    handle_signals(*names)
    try:
        yield
    finally:
        for name in names:
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is end:
                default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
                signal.signal(getattr(signal, name), default)


def handle_signals(*names: str) -> None:
    """Replace the default handlers of these signals by `end`."""
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        is_default = signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        if is_default and threading.current_thread() is threading.main_thread():
            signal.signal(number, end)


def end(number: int, _frame: FrameType | None = None) -> NoReturn:
    """End the process at once: `sys.exit` would raise an error in the middle of an import, which may handle it."""
    announce(number)
    os._exit(128 + number)


def announce(number: int) -> None:
    """Once for all processes, in one write: a signal can interrupt a `print`."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"stopped by {signal.Signals(number).name}: start the command again\n".encode())


def help_text() -> str:
    """The commands with a line each."""
    width = max(map(len, COMMANDS))
    return HELP.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()))


if __name__ == "__main__":
    main()
