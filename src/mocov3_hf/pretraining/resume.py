"""Which checkpoint a run resumes or rolls back to, and whether it belongs to the same run on all processes."""

import hashlib
import platform
import shutil
from pathlib import Path

from accelerate.utils import gather_object

from ..data.order import ORDER_VERSION
from ..reporting import UsageError, is_first_process, warn
from ..run_folder import (
    BAD_IMAGES,
    CONFIG,
    DATA,
    EVENTS,
    KNN,
    MANIFEST,
    METRICS,
    PROCESSOR,
    RECIPE,
    TRACKERS,
    WEIGHTS,
    CheckpointError,
    check_manifest,
    is_whole,
    list_checkpoints,
    step_of,
)
from ..storage import RecordFile, read_lines, remove_leftovers, rewrite_lines
from .checkpoint import RunState, read_state
from .data_change import DataIdentity, check_same_data, is_same_data, keeps_total_steps
from .folder_lock import LOCK, FolderLock
from .plan import Plan
from .recipe import Recipe, load_recipe


# Options that may change when a run resumes: weights, data and metrics do not depend on them, or only once the run has
# become unstable.
FREE_OPTIONS = (
    "allow_data_change",
    "allow_recipe_change",
    "communication_timeout",
    "dataloader_num_workers",
    "dry_run",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "json",
    "knn_dataset_name",
    "knn_k",
    "knn_steps",
    "knn_test_split",
    "knn_train_split",
    "logging_steps",
    "max_bad_fraction",
    "max_rollbacks",
    "num_train_images",
    "on_instability",
    "on_save_error",
    "output_dir",
    "overwrite_output_dir",
    "per_device_train_batch_size",  # the global batch is compared instead
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "rollback_learning_rate_factor",
    "run_name",
    "save_steps",
    "save_total_limit",
    "spike_factor",
    "train_batch_size",
)

# Files of a run, for which a folder can be in the way.
FILES = (CONFIG, PROCESSOR, WEIGHTS, RECIPE, METRICS, EVENTS, KNN, BAD_IMAGES, DATA, TRACKERS, LOCK)
MODEL_FILES = (CONFIG, "*.safetensors", "pytorch_model*.bin")  # of any library that saves models as transformers does


def find_common_checkpoint(
    recipe: Recipe, plan: Plan, lock: FolderLock, data: DataIdentity
) -> tuple[Path, RunState] | None:
    """
    `find_checkpoint` on all processes, with one result. The first of them locks the folder before.

    Raises:
        UsageError: on all processes, what one of them refuses, or that they see different checkpoints, as hosts do
            that do not share a file system.
    """
    found = refusal = None
    try:
        if is_first_process():
            lock.acquire()
        found = find_checkpoint(recipe, plan, data)
    except (ValueError, OSError) as error:
        refusal = str(error)
    seen = "no checkpoint" if found is None else found[0].name
    # The manifest holds the hashes of all files.
    digest = None if found is None else hashlib.sha256((found[0] / MANIFEST).read_bytes()).hexdigest()
    answers = gather_object([(refusal, seen, digest, platform.node())])
    for other_refusal, *_ in answers:
        if other_refusal is not None:
            raise UsageError(other_refusal)
    _, first_seen, first_digest, first_host = answers[0]
    for rank, (_, other_seen, other_digest, host) in enumerate(answers):
        if other_digest != first_digest:
            differing = "" if other_seen != first_seen else " with other content"
            raise UsageError(
                f"process 0 on {first_host} sees {first_seen} and process {rank} on {host} sees {other_seen}"
                f"{differing}: --output_dir {recipe.run.output_dir} must be on a file system that all hosts share, or"
                " its newest checkpoint must be copied to each"
            )
    return found


def find_checkpoint(recipe: Recipe, plan: Plan, data: DataIdentity) -> tuple[Path, RunState] | None:
    """
    The checkpoint to resume from, None for a new run.

    Raises:
        UsageError: a folder with a run that is neither resumed nor overwritten, or a run of another recipe or of other
            images.
        CheckpointError: the named checkpoint is damaged, or all of them are.
    """
    asked, output_dir = recipe.run.resume_from_checkpoint, Path(recipe.run.output_dir)
    if asked is None:
        check_output_is_free(recipe)
        return None
    if asked == "auto":
        found = newest_whole_checkpoint(output_dir)
        if found is None and list_checkpoints(output_dir):
            raise CheckpointError(
                f"all checkpoints in {output_dir} are damaged: delete them, or pass --overwrite_output_dir without"
                " --resume_from_checkpoint, to start again"
            )
        if found is None:
            check_is_ours(output_dir)
            return None
        folder, state = found
    else:
        check_resume_folder(recipe)
        folder = Path(asked)
        check_manifest(folder)
        state = read_state(folder)
    check_same_run(recipe, plan, folder, state, data)
    return folder, state


def check_resume_folder(recipe: Recipe) -> None:
    """
    Raises:
        UsageError: `resume_from_checkpoint` is neither auto nor a folder.
    """
    asked = recipe.run.resume_from_checkpoint
    if asked not in (None, "auto") and not Path(asked).is_dir():
        raise UsageError(f"--resume_from_checkpoint {asked} is not a folder: pass a checkpoint folder, or auto")


def check_output_is_free(recipe: Recipe) -> None:
    """
    Raises:
        UsageError: the output folder of a new run holds a run or other things.
    """
    output_dir = Path(recipe.run.output_dir)
    if recipe.run.overwrite_output_dir:
        return
    if list_checkpoints(output_dir) or (output_dir / METRICS).exists():
        raise UsageError(
            f"{output_dir} already holds a run: pass --resume_from_checkpoint auto to resume it,"
            " --overwrite_output_dir to start again, or another --output_dir"
        )
    check_is_ours(output_dir)


def newest_whole_checkpoint(output_dir: Path) -> tuple[Path, RunState] | None:
    """The newest checkpoint that is as it was written, None without one; a line about each newer one."""
    for folder in list_checkpoints(output_dir):
        try:
            check_manifest(folder)
            return folder, read_state(folder)
        except CheckpointError as error:
            warn(f"{error}; using an older one")
    return None


def check_same_run(recipe: Recipe, plan: Plan, folder: Path, state: RunState, data: DataIdentity) -> None:
    """
    Raises:
        UsageError: options or images that differ from the checkpoint's, with both values, or another order of images.
    """
    check_order(recipe, folder, state)
    if recipe.run.allow_recipe_change:
        check_same_data(recipe, folder, state, data)
        return
    saved, current = load_recipe(folder / RECIPE).to_dict(), recipe.to_dict()
    # A data set may have moved.
    free = (
        (*FREE_OPTIONS, "dataset_name") if is_same_data(state, data) or recipe.run.allow_data_change else FREE_OPTIONS
    )
    differing = [
        f"{name} ({saved[name]!r} there, {current[name]!r} now)"
        for name in current
        if name not in free and saved[name] != current[name]
    ]
    if not differing:
        check_same_data(recipe, folder, state, data)
    names = ["global_batch_size", "steps_per_epoch", "total_steps"]
    if keeps_total_steps(recipe, state, data):  # which depend on the number of images
        names = names[:1]
    for name in names:
        if getattr(state, name) != getattr(plan, name):
            differing.append(f"{name.replace('_', ' ')} ({getattr(state, name)} there, {getattr(plan, name)} now)")
    if differing:
        raise UsageError(
            f"{folder} belongs to another recipe: {', '.join(differing)}. Restore the options, or pass"
            " --allow_recipe_change to continue with the new ones"
        )


def check_order(recipe: Recipe, folder: Path, state: RunState) -> None:
    """
    Raises:
        UsageError: another rule for the order of images, unless changes are allowed.
    """
    if state.order_version == ORDER_VERSION:
        return
    what = f"{folder} was written by a mocov3_hf ({state.version}) that orders the images of an epoch differently"
    change = "continues in the order of this version, so that some images of this epoch come twice or not at all"
    if not recipe.run.allow_recipe_change:
        raise UsageError(f"{what}: resume it with that version, or pass --allow_recipe_change, which {change}")
    warn(f"{what}: the run {change}")


def check_is_ours(output_dir: Path) -> None:
    """
    Raises:
        UsageError: the folder holds a model, but no run of ours.
    """
    if any(any(output_dir.glob(pattern)) for pattern in MODEL_FILES) and not any(
        (output_dir / name).exists() for name in (RECIPE, METRICS)
    ):
        raise UsageError(
            f"{output_dir} holds a model that is not of this run: pass another --output_dir, or --overwrite_output_dir"
            " to replace it"
        )


def check_nothing_in_the_way(output_dir: Path) -> None:
    """
    Raises:
        UsageError: one of the run's files has the name of a folder or a pipe, or a checkpoint that of a file.
    """
    for path in sorted(output_dir.glob("*")):
        expected = "file" if path.name in FILES else "folder" if step_of(path) is not None else None
        what = "folder" if path.is_dir() else "file" if path.is_file() else "special file"
        if path.exists() and expected is not None and what != expected:
            raise UsageError(f"{path} is a {what} in the place of a {expected} of the run: move it away")


def checkpoint_before(output_dir: Path, step: int, suspect: int | None) -> Path:
    """
    The newest valid checkpoint before a step that went wrong.

    Args:
        output_dir: Folder of the run.
        step: The step that went wrong, from 1.
        suspect: Step of the checkpoint after which the run became unstable again. It is deleted if there is an older
            one: the run may have been about to diverge already.

    Raises:
        CheckpointError: there is none.
    """
    valid = [folder for folder in list_checkpoints(output_dir) if step_of(folder) < step and is_whole(folder)]
    if not valid:
        raise CheckpointError(f"{output_dir} has no valid checkpoint before step {step}")
    if step_of(valid[0]) == suspect and len(valid) > 1:
        shutil.rmtree(valid[0])
        return valid[1]
    return valid[0]


def prepare_folder(output_dir: Path, is_new: bool) -> None:
    """
    Create the output folder and remove what a killed process left half written; for a new run, also what an earlier
    run left there except weights, which the first checkpoint replaces.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    if is_new:
        for folder in list_checkpoints(output_dir):
            shutil.rmtree(folder)
        for name in (METRICS, EVENTS, BAD_IMAGES, KNN, TRACKERS):
            (output_dir / name).unlink(missing_ok=True)


def truncate_lines(records: RecordFile, *, steps_done: int | None = None, number: int | None = None) -> None:
    """
    Drop damaged lines of a JSON Lines file, and those beyond a number of lines or a step.

    Up to a step, steps increase from line to line; a line that does not is damaged.
    """
    path = records.path
    if steps_done is not None:
        records.waiting = [line for line in records.waiting if line["step"] <= steps_done]
    if not path.exists():
        return
    lines, damaged = read_lines(path)
    if number is not None:
        lines = lines[: max(0, number - sum(line <= number for line in damaged))]
    kept, num_dropped = [], len(damaged)
    for line in lines:
        if steps_done is None:
            kept.append(line)
        elif line["step"] <= (kept[-1]["step"] if kept else 0):
            num_dropped += 1
        elif line["step"] <= steps_done:
            kept.append(line)
    if num_dropped:
        warn(f"{path} was damaged: {num_dropped} of {len(lines) + len(damaged)} lines were dropped")
    rewrite_lines(path, kept)
