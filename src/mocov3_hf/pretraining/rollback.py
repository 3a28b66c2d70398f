"""Where a run that has become unstable goes back to."""

import shutil
from pathlib import Path

from .checkpoint import CheckpointError, check_manifest, list_checkpoints, step_of


def checkpoint_before(output_dir: Path, step: int, suspect: int | None) -> Path:
    """
    The newest whole checkpoint from before an update went wrong.

    Args:
        output_dir: Folder of the run.
        step: The update that went wrong, from 1.
        suspect: Step of the checkpoint from which the run has just become unstable once more. Where there is an older
            one, the suspect is deleted: it may have been on the way down already.

    Raises:
        CheckpointError: there is none.
    """
    folders = [folder for folder in list_checkpoints(output_dir) if step_of(folder) < step]
    whole = [folder for folder in folders if is_whole(folder)]
    if not whole:
        raise CheckpointError(f"{output_dir} holds no whole checkpoint from before step {step}")
    if step_of(whole[0]) == suspect and len(whole) > 1:
        shutil.rmtree(whole[0])
        return whole[1]
    return whole[0]


def is_whole(folder: Path) -> bool:
    try:
        check_manifest(folder)
    except CheckpointError:
        return False
    return True
