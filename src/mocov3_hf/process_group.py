"""
The processes of a command: joined at the start, stopped together by a signal, and separated in order at the end.

The destructor of a process group waits for its threads, which may need the interpreter. It must not run in that of
DDP's reducer, which holds the interpreter (torch 2.11 then hangs), so models are released first and the group is
destroyed explicitly.
"""

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState

from .reporting import one_line


# The first process may still save or push when the others are done.
SECONDS_TO_PART = 600.0
SECONDS_FOR_AN_ANSWER = 3.0
ANNOUNCEMENT = "mocov3_hf/error"
# Signals that ask a run to stop. Launchers, schedulers and terminals send them to all processes of a group.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
# A launcher and a terminal can both deliver one Ctrl-C; a later one is another.
SECONDS_OF_ONE_REQUEST = 1.0


def is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def process_state() -> PartialState:
    """
    The processes that `torchrun` or `accelerate launch` started, joined on the first call.

    accelerate joins processes on CPUs only with `cpu=True`; otherwise each would act as the only one.
    """
    leave_at_exit()
    return PartialState(cpu=not torch.accelerator.is_available())


@contextlib.contextmanager
def joined_processes() -> Iterator[PartialState]:
    """`process_state()`, and `wait_for_others` on exit."""
    state = process_state()
    yield state
    wait_for_others()


def wait_for_others() -> None:
    """
    Wait until all processes have come here, up to a limit: one that ends early could abort others that still
    communicate. A warning if one has not come, or is gone.
    """
    if not is_joined():
        return
    limit = timedelta(seconds=SECONDS_TO_PART)
    try:
        if dist.get_backend() == "gloo":  # whose other barrier would hold its thread until the timeout of the group
            dist.monitored_barrier(timeout=limit)
        else:
            dist.barrier(async_op=True, device_ids=[torch.accelerator.current_device_index()]).wait(limit)
    except RuntimeError as error:
        print(f"warning: another process has not reached the end ({one_line(error)[:200]})", file=sys.stderr)


def release_unused() -> None:
    """Collect reference cycles, such as those of wrapped models, which would otherwise outlive the process group."""
    if is_joined():
        gc.collect()


def announce_error() -> None:
    """Let the other processes know that this one reports its error, so that they end without a line of their own."""
    ask_the_store(lambda store: store.set(ANNOUNCEMENT, "1"))


def has_announced_error() -> bool:
    """Whether another process has. False if that cannot be found out."""
    return bool(ask_the_store(lambda store: store.check([ANNOUNCEMENT])))


def ask_the_store(request: Callable[[dist.Store], Any]) -> Any:
    """
    The answer of the store where processes leave messages. None if the process that keeps it is gone or does not
    respond: the network may be down, and then the request has no end of its own.
    """
    if not is_joined():
        return None
    answers = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(request(dist.distributed_c10d._get_default_store()))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS_FOR_AN_ANSWER)
    return answers[0] if answers else None


def leave_at_exit() -> None:
    """
    End the process group that this process is about to join when the process ends, and not before: a second run in the
    same process uses it again, since processes cannot always join twice. A group that exists already is kept.
    """
    if not is_joined():
        Finalize(None, leave, exitpriority=0)  # unlike atexit also in processes that multiprocessing has started


def leave() -> None:
    """Release all models and destroy the process group."""
    traceback.clear_frames(getattr(sys, "last_traceback", None))  # of an error that ends the process
    release_unused()
    if is_joined():
        dist.destroy_process_group()


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

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.is_command and kind is None else handler)

    def receive(self, number: int, _frame: FrameType | None) -> None:
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
