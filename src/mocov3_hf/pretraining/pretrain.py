"""The command `mocov3 pretrain`: from a recipe to a folder of weights."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import TrainerCallback

from ..data.bad_images import TooManyBadImagesError
from ..new_folder import check_output_dir
from ..option_values import resume_command
from ..process_group import Stopped, StopRequest, announce_error, has_announced_error, release_unused
from ..reporting import RunError, UsageError, is_first_process, output_to_full_disk, reporting
from ..run_folder import CheckpointError
from .dry_run import describe, describe_as_json
from .folder_lock import FolderLock
from .loop import Run
from .processes import LostProcessError, limit_time_to_exit, raise_if_process_lost
from .recipe import Recipe, parse
from .resume import check_nothing_in_the_way


def main(arguments: Iterable[str]) -> Recipe:
    """The command `mocov3 pretrain`. A run stopped by a signal is not a failure: the exit code is 0."""
    with reporting():
        recipe = parse(arguments)
        try:
            run_recipe(recipe, resume_command(sys.argv[1:]), is_command=True)
        except LostProcessError:
            limit_time_to_exit()
            if has_announced_error():  # which the other process reports
                sys.exit(1)
            raise
    return recipe


def run_recipe(
    recipe: Recipe, resume_command: str, is_command: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> Path:
    """
    Run a recipe, or print its plan with `--dry_run`.

    Args:
        recipe: Options of the run.
        resume_command: What messages say about how to resume.
        is_command: Whether the process exits afterwards.
        callbacks: See `Callbacks`. Their errors are raised as they are.

    Returns:
        The output folder.

    Raises:
        UsageError, ValueError: options that cannot work, found before training.
        RunError, OSError: a failure of the run.
    """
    if recipe.run.json and not recipe.run.dry_run:
        raise UsageError("--json prints the plan of a run: pass it with --dry_run")
    if recipe.run.dry_run:
        if is_first_process():
            print(describe_as_json(recipe) if recipe.run.json else describe(recipe))
        return Path(recipe.run.output_dir or ".")
    check_output_dir(recipe.run.output_dir or "")
    check_nothing_in_the_way(Path(recipe.run.output_dir))
    run = None
    try:
        with output_to_full_disk(is_command), StopRequest(is_command) as stop:
            try:
                with FolderLock(Path(recipe.run.output_dir)) as lock:
                    run = Run(recipe, resume_command, lock, callbacks)
                    run.train(stop)
            except Stopped:
                print(f"stopped by {stop.describe()} before training; to resume:\n  {resume_command}")
    except TooManyBadImagesError as error:  # images can be out of reach of one process alone
        announce_error()
        raise RunError(str(error), from_any_process=True) from error
    except RunError as error:
        if error.from_any_process:
            announce_error()
        raise
    except ValueError as error:
        if run is None or isinstance(error, UsageError) or error is run.callbacks.error:
            raise
        if isinstance(error, CheckpointError):
            raise RunError(str(error)) from error
        # A defect, not a mistake of the user: it keeps its traceback.
        raise RuntimeError(f"training failed: {error}") from error
    except RuntimeError as error:
        raise_if_process_lost(error, recipe, None if run is None else run.step, resume_command)
        raise
    run = None
    release_unused()
    return Path(recipe.run.output_dir)
