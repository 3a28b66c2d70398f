"""Pushes during a run, on a thread of their own: they never stall it, and never end it."""

import logging
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from .push import PUSHED, PushError, link_or_copy, push_folder, remove_stale, staging_prefix


logger = logging.getLogger(__name__)


class BackgroundPusher:
    """
    Pushes the latest state of a folder, one push at a time.

    `push` takes a snapshot by hard links and returns at once; while a push is on its way only the latest snapshot
    waits. A failed push is logged, and the next one takes its place. Call `finish` at the end of the run.

    Args:
        repo_id (`str`):
            `USER/NAME`.
        options:
            Of `push_folder`: `private`, `revision`, `license`, `api`, ...
    """

    def __init__(self, repo_id: str, **options: Any):
        self.repo_id = repo_id
        self.options = {"attempts": 2} | options
        self.condition = threading.Condition()
        self.waiting: tuple[Path, str | None] | None = None
        self.busy = self.closed = False
        self.last_url: str | None = None
        self.last_error: str | None = None
        # A daemon: a Hub that hangs must not keep the process alive.
        self.thread = threading.Thread(target=self.work, name="push_to_hub", daemon=True)
        self.thread.start()

    def push(self, folder: str | Path, message: str | None = None) -> None:
        """Take a snapshot of the folder for the next push. Raises nothing; a failure is logged."""
        try:
            remove_stale(Path(folder))
            snapshot = Path(
                tempfile.mkdtemp(prefix=staging_prefix(), dir=folder)
            )  # beside the files, where links work
            for pattern in PUSHED:
                for path in Path(folder).glob(pattern):
                    if path.is_file():
                        link_or_copy(path, snapshot / path.relative_to(folder))
        except OSError as error:
            self.fail(f"no snapshot of {folder}: {error}")
            return
        with self.condition:
            if self.waiting is not None:
                shutil.rmtree(self.waiting[0], ignore_errors=True)
            self.waiting = (snapshot, message)
            self.condition.notify_all()

    def finish(self, timeout: float | None = 600.0) -> bool:
        """Wait for what is on its way or waiting; gives back whether the last push reached the Hub in time."""
        with self.condition:
            self.closed = True
            self.condition.notify_all()
            done = self.condition.wait_for(lambda: self.waiting is None and not self.busy, timeout)
            if not done:
                self.fail(
                    f"a push to {self.repo_id} was still on its way after {timeout:.0f} s: push the folder again"
                )
        return done and self.last_error is None

    def fail(self, reason: str) -> None:
        self.last_error = reason
        logger.warning("push_to_hub: %s", reason)

    def work(self) -> None:
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.waiting is not None or self.closed)
                if self.waiting is None:
                    return
                (snapshot, message), self.waiting, self.busy = self.waiting, None, True
            try:
                self.last_url = push_folder(snapshot, self.repo_id, message=message, **self.options)
                self.last_error = None
            except PushError as error:
                self.fail(str(error))
            except Exception as error:  # whatever it is, it must not reach the run
                self.fail(f"{type(error).__name__}: {error}")
            finally:
                shutil.rmtree(snapshot, ignore_errors=True)
                with self.condition:
                    self.busy = False
                    self.condition.notify_all()
