"""Checks of an output folder before anything is computed."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .reporting import UsageError
from .storage import is_occupied


def check_output_dir(output_dir: str) -> None:
    """
    Check before anything is built that a folder can be created and written; nothing is left behind.

    Raises:
        UsageError: it cannot, and why.
    """
    if not output_dir.strip():
        raise UsageError("--output_dir is empty: pass a new folder")
    existing = Path(os.path.abspath(output_dir))
    try:
        while not (existing.exists() or existing.is_symlink()):
            existing = existing.parent
        if not existing.is_dir():
            what = "a file" if existing.exists() else "a link to a folder that does not exist"
            raise UsageError(f"--output_dir {output_dir} cannot be created: {existing} is {what}; pass another folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(
            f"--output_dir {output_dir} cannot be written ({error.strerror or error}): pass another folder"
        ) from error


def check_new_folder(
    output_dir: str | Path, overwrite: bool, mark: str, inputs: Iterable[str | os.PathLike] = ()
) -> None:
    """
    Check, before anything is computed, that `atomic_folder` may write a folder without a loss.

    Args:
        output_dir: The folder.
        overwrite: Whether a folder that the same command wrote before is replaced.
        mark: A file by which such a folder is recognized.
        inputs: Files and folders that the command reads; other names are ignored.

    Raises:
        UsageError: The folder exists, cannot be written, or holds what should not be deleted.
    """
    check_output_dir(str(output_dir))
    if is_occupied(output_dir, overwrite):
        raise UsageError(
            f"--output_dir {output_dir} exists and is not an empty folder: pass another --output_dir, or"
            " --overwrite_output_dir to replace a folder"
        )
    folder = Path(output_dir).resolve()
    if not (folder.is_dir() and any(folder.iterdir())):
        return
    for name in inputs:
        path = Path(os.path.expanduser(name)).resolve()
        if path.exists() and folder in (path, *path.parents):
            raise UsageError(
                f"--overwrite_output_dir would delete {os.fspath(name)}, which is read: pass another --output_dir"
            )
    if not (folder / mark).is_file():
        raise UsageError(
            f"--output_dir {output_dir} was not written by this command (no {mark} in it), and --overwrite_output_dir"
            " would delete it: pass another folder, or delete it yourself"
        )
