"""One run per output folder: a lock file that names host, process and start, and is refreshed while the run lives."""

import contextlib
import json
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from ..reporting import RunError, UsageError
from ..storage import flush, is_number, locked


LOCK = ".run.lock"
# A run on another host is taken for dead when its lock has not been refreshed for this long.
LEASE_SECONDS = 60.0
REFRESH_SECONDS = 15.0
POLL_SECONDS = 1.0


class FolderLock:
    """
    Owned by one run at a time; to be entered. A dead owner on this host is replaced at once, one on another host when
    its lease is over. Leaving releases the lock; a killed run leaves it behind.

    Args:
        folder: The output folder.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        self.owner = describe_this_process()
        self.is_acquired = self.has_created_folder = False
        self.released = threading.Event()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        if self.is_acquired and self.is_mine():
            self.path.unlink(missing_ok=True)
            self.remove_created_folder()
        self.is_acquired = False

    def remove_created_folder(self) -> None:
        if self.has_created_folder:
            with contextlib.suppress(OSError):  # it has content
                self.folder.rmdir()

    def acquire(self) -> None:
        """
        Create the folder and lock it.

        Raises:
            UsageError: another run is alive there, with its host and process.
        """
        self.has_created_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        first_seen = None
        while not self.try_to_acquire():
            seen = self.last_refresh()
            if first_seen is None:
                first_seen = seen
                if is_on_this_host(owner := read_owner(self.path)):
                    raise self.refusal(owner)
                print(
                    f"{self.path} belongs to {describe(owner)}: waiting up to {LEASE_SECONDS:.0f} s to see whether it"
                    " is alive",
                    file=sys.stderr,
                )
            elif seen is not None and seen != first_seen:
                raise self.refusal(read_owner(self.path))
            time.sleep(POLL_SECONDS)
        self.is_acquired = True
        threading.Thread(target=self.keep_refreshing, daemon=True).start()

    def try_to_acquire(self) -> bool:
        """Create the lock file, in the place of one whose owner is dead. Processes of this host take turns."""
        with locked(self.folder):
            if self.path.exists() and self.is_stale():
                self.path.unlink(missing_ok=True)
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(self.owner, file)
                flush(self.path)
            except OSError:  # a full disk: nobody owns what is left
                self.path.unlink(missing_ok=True)
                self.remove_created_folder()
                raise
        return True

    def is_stale(self) -> bool:
        owner = read_owner(self.path)
        if is_on_this_host(owner):
            return not is_alive(owner)
        # The clock of the file system, as those of two hosts can differ.
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=LOCK) as now:
            refreshed = self.last_refresh()
            return refreshed is None or os.fstat(now.fileno()).st_mtime - refreshed > LEASE_SECONDS

    def last_refresh(self) -> float | None:
        """When the lock was last refreshed; None without one. Opening a file on a network makes it current."""
        try:
            with open(self.path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def keep_refreshing(self) -> None:
        while not self.released.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):  # a network file system that is away for a moment
                if self.is_mine():
                    os.utime(self.path)

    def is_mine(self) -> bool:
        return read_owner(self.path) == self.owner

    def check(self) -> None:
        """
        Raises:
            RunError: another run has taken over, because this one did not run for a while.
        """
        owner = read_owner(self.path)
        if self.is_acquired and owner and owner != self.owner:
            raise RunError(
                f"{describe(owner)} has taken over {self.folder}, as this run did not respond for"
                f" {LEASE_SECONDS:.0f} s: nothing more is written"
            )

    def refusal(self, owner: dict) -> UsageError:
        return UsageError(
            f"{self.folder} is in use by {describe(owner)}: wait until it ends, stop it, or pass another --output_dir"
        )


def describe_this_process() -> dict:
    """What tells this process from all others, also from one with the same number in another container."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "namespace": pid_namespace(),
    }


def pid_namespace() -> str:
    """Where process ids mean the same: this boot of the machine and, on Linux, the container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def read_owner(path: Path) -> dict:
    """The owner named in a lock file; empty without one, or if it is damaged or still being written."""
    try:
        owner = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def is_on_this_host(owner: dict) -> bool:
    return (owner.get("host"), owner.get("namespace")) == (platform.node(), pid_namespace())


def is_alive(owner: dict) -> bool:
    """Whether the process still runs, and is not another one that has received its number."""
    process_id, started = owner.get("pid"), owner.get("started")
    if not isinstance(process_id, int) or not is_number(started):
        return False
    try:
        process = psutil.Process(process_id)
        # In a container whose first process does not wait for others, a killed run stays a zombie.
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # also a number that no process can have
        return False
    except psutil.AccessDenied:
        return True


def describe(owner: dict) -> str:
    started = owner.get("started")
    is_date = is_number(started) and 0 < started < 2**40
    since = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(started)) if is_date else ""
    return f"a run on {owner.get('host', 'an unknown host')} (process {owner.get('pid', '?')}{since})"
