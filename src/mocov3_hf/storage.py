"""Files and folders that are written whole or not at all, JSON Lines files, hashes and locks."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from .reporting import RunError, one_line, warn


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


BLOCK = 1 << 20
INCOMPLETE, DELETED = ".incomplete", ".deleted"
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream")  # in the errors of torch.save


def is_local(name: str | os.PathLike) -> bool:
    """
    Whether a name means a path on this machine. Its form decides: it exists, begins with `.`, `/` or `~`, has more
    than one slash, lies in a folder that exists, or cannot be the id of a repository on the Hub. A URL is not one.
    """
    name = os.fspath(name)
    if os.path.exists(name):
        return True
    first, _, rest = name.partition("/")
    if "://" in name:
        return False
    return name.startswith((".", "/", "~")) or "/" in rest or (rest != "" and os.path.isdir(first)) or not _is_id(name)


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def flush(path: str | Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and Path(path).is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """
    Around the writing of `what` by a library, each of which has its own error for a full disk.

    Raises:
        RunError: it could not be written, and why.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
            raise
        reason = "torch.save failed, probably on a full disk" if isinstance(error, RuntimeError) else one_line(error)
        raise RunError(f"{what} could not be written: {reason}") from error


def aside_of(path: Path) -> Path:
    """Where a file or folder is prepared before it takes its name; left behind only by a killed process."""
    return path.with_name(f".{path.name}{INCOMPLETE}")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """
    A path beside `path` to write to. When the block ends, the content is flushed and renamed to `path` in one step;
    when it fails, `path` stays as it was. Two processes that write the same file do not meet.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}{INCOMPLETE}")
    try:
        yield aside
        grant_usual_permissions(aside)
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # writing to an open file does not name it
        raise
    finally:
        aside.unlink(missing_ok=True)


def is_occupied(path: str | Path, replace: bool = False) -> bool:
    """Whether a new folder cannot take a name: it is a file, or, unless `replace`, a folder with content."""
    path = Path(path)
    return path.exists() and (not path.is_dir() or (any(path.iterdir()) and not replace))


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False, durable: bool = True) -> Iterator[Path]:
    """
    A folder beside `path` to fill. When the block ends, everything in it is flushed and it takes the name `path`; when
    it fails, it is deleted and `path` stays as it was.

    Args:
        path: The new folder; may be an empty folder already.
        replace: Whether a folder with content is replaced. The old one is moved out of the way first and deleted last.
        durable: Whether to wait until everything is on the disk, so that it survives a power failure.

    Raises:
        FileExistsError: `path` is a file, or a folder with content and `replace` is False.
    """
    path = Path(os.path.abspath(path))
    if is_occupied(path, replace):
        what = "a folder with content" if path.is_dir() else "a file"
        raise FileExistsError(f"{path} is {what}: move it away")
    aside = aside_of(path)
    handle = claim(aside)
    try:
        yield aside
        for inner in sorted(aside.rglob("*")):
            grant_usual_permissions(inner)
            if durable:
                flush(inner)
        if durable:
            flush(aside)
        displaced = path.with_name(f".{path.name}{DELETED}")
        if path.exists():
            shutil.rmtree(displaced, ignore_errors=True)
            os.rename(path, displaced)
        os.rename(aside, path)
        flush(path.parent)
        shutil.rmtree(displaced, ignore_errors=True)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if handle is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
            os.close(handle)


def claim(aside: Path) -> int | None:
    """
    Create an empty folder, in place of what a killed process has left.

    Returns:
        A handle that keeps other processes from the folder until it is closed; None on systems without locks.

    Raises:
        RunError: Another process is filling it.
    """

    def lock() -> int | None:
        if fcntl is None:
            return None
        handle = os.open(aside, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            name = aside.name.removeprefix(".").removesuffix(INCOMPLETE)
            raise RunError(
                f"{aside.with_name(name)} is being written by another process: wait for it, or pass another folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        return handle

    if aside.is_dir():
        left = lock()
        shutil.rmtree(aside, ignore_errors=True)
        if left is not None:
            os.close(left)
    aside.mkdir(parents=True)
    return lock()


def delete_folder(path: Path) -> None:
    """Delete a folder so that a kill in between never leaves half of it under its name."""
    doomed = path.with_name(f".{path.name}{DELETED}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had begun to write or to delete in a folder."""
    for pattern in (f".*{INCOMPLETE}", f".*{DELETED}"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def grant_usual_permissions(path: Path) -> None:
    """The permissions of a file made by `open`: safetensors and temporary files are private to the user otherwise."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new one, never half of it."""
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def append_lines(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """
    Append objects to a JSON Lines file: all of them or, on a full disk, none. Processes of this machine take turns.

    Raises:
        OSError: it cannot be written; it is as it was before.
    """
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file, locked(path):
        size = file.seek(0, os.SEEK_END)
        if size > 0:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # what a killed process has left of a line
                content = b"\n" + content
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


class RecordFile:
    """
    A JSON Lines file to append to while a run goes on. Lines that cannot be written, as on a full disk, wait in
    memory; they are written, in order, with the first line that can.

    Args:
        path: The file; created with the first line.

    Attributes:
        waiting: Lines that could not be written yet.
        error: Why, None if all are written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.waiting: list[Mapping[str, Any]] = []
        self.error: OSError | None = None

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Write lines, or keep them. Does not raise."""
        self.waiting += lines
        self.flush()

    def flush(self) -> None:
        """Try to write what waits. The first failure is reported, and so is its end."""
        if not self.waiting:
            return
        try:
            append_lines(self.path, self.waiting)
        except OSError as error:
            if self.error is None:
                warn(f"{self.path} cannot be written ({error.strerror or error}): its lines are kept in memory")
            self.error = error
            return
        if self.error is not None:
            warn(f"{self.path} can be written again: {len(self.waiting)} lines kept in memory were added")
        self.waiting, self.error = [], None

    def close(self) -> None:
        """Try once more to write what waits, and report how much of it is lost."""
        self.flush()
        if self.waiting:
            warn(f"{len(self.waiting)} lines of {self.path} are lost ({self.error})")
            self.waiting = []


def read_lines(path: str | Path) -> tuple[list[dict[str, Any]], list[int]]:
    """
    The objects of a JSON Lines file that have a finite number as `step`, and the numbers (from 1) of the lines that
    are not such objects: a killed run can leave half a line. A file that does not exist has no lines.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return [], []
    lines, damaged = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and is_number(content.get("step")):
            lines.append(content)
        else:
            damaged.append(number)
    return lines, damaged


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def rewrite_lines(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace the content of a JSON Lines file in one step. To cut off its end, no space is needed on the disk."""
    path, text = Path(path), "".join(json.dumps(line) + "\n" for line in lines)
    before, after = path.read_bytes() if path.exists() else b"", text.encode()
    if not path.exists() or not before.startswith(after):
        write_text(path, text)
    elif before != after:
        os.truncate(path, len(after))
        flush(path)


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file where the file system allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def process_is_alive(process_id: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Exclusive among the processes of this machine that lock the same folder or file. No file is left behind."""
    if fcntl is None:  # the rename alone must do
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
