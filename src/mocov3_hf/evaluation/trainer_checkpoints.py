"""Which checkpoint of `Trainer` a linear probe or a fine-tuning resumes: the newest that is not damaged."""

import json
import os
import zipfile
from pathlib import Path

from ..reporting import warn
from ..run_folder import TRAINER_STATE, CheckpointError, list_checkpoints


def newest_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The newest complete checkpoint of `Trainer`, which writes its state last; None without one. A line about each newer
    one that is damaged.

    Raises:
        CheckpointError: all are damaged.
    """
    damaged = None
    for path in list_checkpoints(folder):
        if (path / TRAINER_STATE).is_file():
            try:
                check_readable(path)
                return str(path)
            except CheckpointError as error:
                damaged = error
                warn(f"{error}; using an older one")
    if damaged is not None:
        raise damaged
    return None


def check_readable(checkpoint: Path) -> None:
    """
    Check the checksums of the files of `torch.save` and the state of a checkpoint of `Trainer`.

    Raises:
        CheckpointError: a file that is damaged.
    """
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:
                    if (damaged := archive.testzip()) is not None:
                        raise ValueError(f"the checksum of {damaged} is wrong")
            elif path.name == TRAINER_STATE and not isinstance(json.loads(path.read_bytes()), dict):
                raise ValueError("it is not an object")
        except (OSError, ValueError, RecursionError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{checkpoint} is damaged: {path.name} cannot be read ({error})") from error
