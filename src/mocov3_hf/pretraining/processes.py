"""What the processes of a run agree on while it runs: when to stop, and what to do if one of them is lost."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed import DistError

from ..data.workers import STOP_SIGNALS
from ..reporting import RunError
from ..run_folder import list_checkpoints
from .recipe import Recipe


# gloo raises a plain RuntimeError; it is recognized by the place in its sources at the head of the message.
GLOO = re.compile(r"\[\S*\bgloo/\S+:\d+\] ")
TIMEOUT = re.compile(r"timed?[ -]?out", re.IGNORECASE)
# Time for the interpreter to exit after a lost process: connections that do not respond can hold it forever.
SECONDS_TO_EXIT = 20
# A launcher and a terminal can both deliver one Ctrl-C; a later one is another.
SECONDS_OF_ONE_REQUEST = 1.0


class Stopped(BaseException):
    """A signal before training. No `Exception`, so that no library handles it."""


class StopRequest:
    """
    Catches SIGTERM, SIGINT and SIGUSR1 while it is entered, in the main thread. A signal to any process stops all of
    them after the same step. Before training, a signal to a process without others raises `Stopped` at once.

    The processes communicate after every step. On a GPU the answer of one step is read after the next, so that asking
    never waits for the device.

    Args:
        is_command: Whether the process exits after the block. It then ignores signals: all work is saved, and a second
            one would only change the exit code.
    """

    def __init__(self, is_command: bool = False):
        self.is_command = is_command
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.is_interruptible = os.environ.get("WORLD_SIZE", "1") == "1"
        self.pending: torch.Tensor | None = None
        self.before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other may catch signals
            self.before = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.is_command and kind is None else handler)

    def receive(self, number: int, _frame) -> None:
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
            if self.is_interruptible:
                raise Stopped
        elif number == signal.SIGINT and time.monotonic() - self.received_at > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt  # the second Ctrl-C stops at once

    def start_training(self) -> None:
        """From now on signals wait for the end of a step."""
        self.is_interruptible = False

    def agreed(self, accelerator: Accelerator, has_failed: bool = False) -> bool:
        """
        Whether all processes stop after this step; to be called by all of them, after every step.

        Args:
            accelerator: The processes that must agree.
            has_failed: Whether this process must stop without a signal.
        """
        wanted = has_failed or self.received is not None
        if accelerator.num_processes == 1:
            return wanted
        flag = torch.tensor([wanted], dtype=torch.float32, device=accelerator.device)
        flag = accelerator.reduce(flag, reduction="sum")
        answer, self.pending = (flag, None) if accelerator.device.type == "cpu" else (self.pending, flag)
        return answer is not None and bool(answer.item() > 0)

    def describe(self) -> str:
        return self.received.name if self.received is not None else "another process"


class LostProcessError(RunError):
    """Another process of the run does not respond."""


def raise_if_process_lost(error: RuntimeError, recipe: Recipe, step: int | None, resume_command: str) -> None:
    """
    Translate an error of the communication between processes; return for any other.

    Args:
        error: What was raised.
        recipe: Options of the run.
        step: Steps done, None before training.
        resume_command: How to resume the run.

    Raises:
        LostProcessError: when it happened, what happened and how to go on; one process of each host reports it, as
            the first of all may be the lost one.
    """
    if not isinstance(error, DistError) and GLOO.search(str(error)) is None:
        return
    when = "before the first step" if step is None else f"in step {step + 1}"
    if TIMEOUT.search(str(error)):
        what = (
            f"another process has not responded for {recipe.hardware.communication_timeout} s: it hangs, or its host"
            " or the network is down"
        )
    else:
        what = "another process is gone: it was killed, its host is down, or it has reported an error of its own"
    words = " ".join(GLOO.sub("", str(error)).split())
    detail = re.split(r"\. ", words, maxsplit=1)[0][:200].rstrip(".")
    checkpoints = list_checkpoints(Path(recipe.run.output_dir))
    if checkpoints:
        advice = f"{checkpoints[0].name} is complete; to resume: {resume_command}"
    else:
        advice = "There is no checkpoint yet: start again"
    raise LostProcessError(
        f"{when}, {what} ({detail}). {advice}", from_any_process=os.environ.get("LOCAL_RANK", "0") == "0"
    ) from error


def limit_time_to_exit() -> None:
    """End this process within `SECONDS_TO_EXIT`, whatever its connections do."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS_TO_EXIT)
