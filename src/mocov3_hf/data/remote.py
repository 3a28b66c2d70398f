"""Read files over an unreliable network: retry with exponential backoff and resume at the first missing byte."""

import io
import os
import time
from collections.abc import Callable
from typing import TypeVar

import fsspec.asyn
from fsspec.utils import get_protocol


T = TypeVar("T")

# Waits of 0.5, 1, 2, ... 32, 32 seconds: about two minutes before a run gives up.
ATTEMPTS = 9
FIRST_WAIT = 0.5
LONGEST_WAIT = 32.0

_GONE = (404, 410)

# The thread of fsspec's event loop does not survive a fork, so a data-loading worker would wait for it forever.
# fsspec 2025.3 leaves the reset to its callers; later releases do it themselves, and doing it twice is harmless.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


def is_remote(url: str) -> bool:
    """Return whether a path goes through a network file system (http, hf, s3, ...)."""
    return get_protocol(url) not in ("file", "local")


def retrying(
    function: Callable[[], T],
    what: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call `function` until it succeeds; double the wait after each attempt.

    Args:
        function: what to call.
        what: name of the file, for the error.
        sleep: takes seconds.

    Raises:
        ConnectionError: after the last attempt, with its cause.
        FileNotFoundError, PermissionError: at once, because waiting does not help.
    """
    for attempt in range(ATTEMPTS):
        try:
            return function()
        # Every transport has its own errors; those of aiohttp and httpx are not OSErrors.
        except Exception as error:
            if _is_final(error):
                raise
            if attempt + 1 == ATTEMPTS:
                reason = f"{type(error).__name__}: {error}"
                raise ConnectionError(f"{what} could not be read in {ATTEMPTS} attempts: {reason}") from error
            sleep(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    """Return whether another attempt cannot succeed."""
    if isinstance(error, FileNotFoundError):
        # fsspec raises this for every HTTP error, even from an overloaded server; the cause has the status.
        return getattr(error.__cause__, "status", 404) in _GONE
    return isinstance(error, (PermissionError, IsADirectoryError, NotImplementedError))


class RemoteFile(io.RawIOBase):
    """A file at any fsspec URL, read in ranges; an interrupted range is requested again.

    Args:
        url: path or URL.
    """

    def __init__(self, url: str):
        super().__init__()
        self.url = url
        self._fs, self._path = fsspec.core.url_to_fs(url)
        self._size = retrying(self._ask_size, url)
        self._position = 0

    def _ask_size(self) -> int:
        size = self._fs.size(self._path)
        if size is None:
            raise OSError("the server does not report the size of the file")
        return size

    def size(self) -> int:
        """Length in bytes."""
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._position + size, self._size)
        start = self._position
        if start >= stop:
            return b""

        def fetch() -> bytes:
            data = self._fs.cat_file(self._path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"received {len(data)} of {stop - start} bytes")
            return data

        data = retrying(fetch, f"{self.url} (bytes {start} to {stop})")
        self._position = stop
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def read_file(url: str) -> bytes:
    """Read a whole file, with retries if it is remote."""
    if not is_remote(url):
        with open(url, "rb") as file:
            return file.read()
    return RemoteFile(url).read()
