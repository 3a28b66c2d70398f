"""What is said and done when another process of the run stops answering."""

import os
import re
import signal
import sys
from pathlib import Path

from torch.distributed import DistError

from ..recipe import RunRecipe
from .checkpoint import list_checkpoints
from .resume import resume_command


# gloo raises a plain RuntimeError; what tells it from others is the place in its sources at the head of the message.
GLOO = re.compile(r"\[\S*\bgloo/\S+:\d+\] ")
TIMEOUT = re.compile(r"timed?[ -]?out", re.IGNORECASE)
# How long the interpreter may take to leave after that: connections that do not answer can hold it for ever.
SECONDS_TO_LEAVE = 20


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that communication with another process has failed."""
    return isinstance(error, DistError) or GLOO.search(str(error)) is not None


def leave_if_peer_lost(error: RuntimeError, run: RunRecipe, step: int | None) -> None:
    """
    If `error` says that another process is lost, say so in one line for each host and end this process with exit code
    1, within `SECONDS_TO_LEAVE` whatever its connections do; otherwise do nothing.

    Args:
        error: What was raised.
        run: Options of the run.
        step: Updates done, `None` where training had not begun.
    """
    if not is_lost_peer(error):
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the first process of all may be the lost one
        print(f"error: {explain(error, run, step)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS_TO_LEAVE)
    sys.exit(1)


def explain(error: RuntimeError, run: RunRecipe, step: int | None) -> str:
    """When it happened, what happened, what is safe and how to go on, in one line."""
    when = "before the first step" if step is None else f"in step {step + 1}"
    if TIMEOUT.search(str(error)):
        seconds = run.communication_timeout
        what = f"another process has not answered for {seconds} s: it hangs, or its host or the network is down"
    else:
        what = "another process is gone: it was killed, its host is down, or its own message tells more"
    checkpoints = list_checkpoints(Path(run.output_dir))
    if not checkpoints:
        return f"{when}, {what} ({detail(error)}). There is no checkpoint yet: start again"
    return f"{when}, {what} ({detail(error)}). {checkpoints[0].name} is whole; to continue: {resume_command()}"


def detail(error: RuntimeError) -> str:
    """The first sentence of the backend's own words."""
    words = " ".join(GLOO.sub("", str(error)).split())
    return re.split(r"\. ", words, maxsplit=1)[0][:200].rstrip(".")
