"""Reading over a network that drops: retries with back-off, going on at the byte that was missing."""

import io
import time
from collections.abc import Callable
from typing import TypeVar

import fsspec
from fsspec.utils import get_protocol


T = TypeVar("T")

# Waits of 0.5, 1, 2, ... 32, 32 seconds: about two minutes before a run gives up.
ATTEMPTS = 9
FIRST_WAIT = 0.5
LONGEST_WAIT = 32.0

_GONE = (404, 410)


def is_remote(url: str) -> bool:
    """Whether a path goes through a network file system (http, hf, s3, ...)."""
    return get_protocol(url) not in ("file", "local")


def retrying(
    function: Callable[[], T],
    what: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call until it succeeds, waiting twice as long each time.

    Raises:
        ConnectionError: after the last attempt, with its cause.
        FileNotFoundError, PermissionError: at once, waiting does not help.
    """
    for attempt in range(ATTEMPTS):
        try:
            return function()
        # Every transport has its own errors: aiohttp's and httpx's are no OSErrors.
        except Exception as error:
            if _is_final(error):
                raise
            if attempt + 1 == ATTEMPTS:
                reason = f"{type(error).__name__}: {error}"
                raise ConnectionError(f"{what} could not be read in {ATTEMPTS} attempts: {reason}") from error
            sleep(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use."""
    if isinstance(error, FileNotFoundError):
        # fsspec says so of every HTTP error, an overloaded server included; the status is in the cause.
        return getattr(error.__cause__, "status", 404) in _GONE
    return isinstance(error, (PermissionError, IsADirectoryError, NotImplementedError))


class RemoteFile(io.RawIOBase):
    """A file of any fsspec URL, read by ranges; a range that breaks off is asked for again.

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
            raise OSError("the server does not tell the size of the file")
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
                raise OSError(f"{len(data)} bytes came of {stop - start}")
            return data

        data = retrying(fetch, f"{self.url} (bytes {start} to {stop})")
        self._position = stop
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def read_file(url: str) -> bytes:
    """The whole of a file, with retries where it is remote."""
    if not is_remote(url):
        with open(url, "rb") as file:
            return file.read()
    return RemoteFile(url).read()
