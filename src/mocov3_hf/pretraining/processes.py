"""What the processes of a run do if one of them is lost."""

import os
import re
import signal
import sys
from pathlib import Path

from torch.distributed import DistError

from ..reporting import RunError
from ..run_folder import list_checkpoints
from .recipe import Recipe


# gloo raises a plain RuntimeError; it is recognized by the place in its sources at the head of the message.
GLOO = re.compile(r"\[\S*\bgloo/\S+:\d+\] ")
TIMEOUT = re.compile(r"timed?[ -]?out", re.IGNORECASE)
# Time for the interpreter to exit after a lost process: connections that do not respond can hold it forever.
SECONDS_TO_EXIT = 20


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
