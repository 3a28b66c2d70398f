"""Which checkpoint a run continues from, whether it is still the same run, and what its records keep."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from ..plan import Plan
from ..recipe import Recipe, RecipeError, load_recipe
from .checkpoint import (
    CheckpointError,
    RunState,
    check_manifest,
    list_checkpoints,
    newest_whole_checkpoint,
    read_state,
)


# Options that may differ between the parts of a run: they change nothing in weights, data or metrics, or only what
# happens should the run become unstable.
FREE_OPTIONS = (
    "allow_recipe_change",
    "communication_timeout",
    "dataloader_num_workers",
    "dry_run",
    "fsdp",  # as the number of processes
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
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
    "per_device_train_batch_size",  # the global batch they make is compared instead
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "rollback_learning_rate_factor",
    "save_steps",
    "save_total_limit",
    "spike_factor",
    "train_batch_size",
)


def find_checkpoint(recipe: Recipe, plan: Plan) -> tuple[Path, RunState] | None:
    """
    The checkpoint to continue from, `None` for a fresh start.

    Raises:
        RecipeError: a folder that holds a run nobody asked to continue, or a run of another recipe.
        CheckpointError: a named checkpoint that is damaged, or a folder with damaged ones only.
    """
    asked, output_dir = recipe.run.resume_from_checkpoint, Path(recipe.run.output_dir)
    if asked is None:
        refuse_to_mix(recipe, output_dir)
        return None
    if asked == "auto":
        folder = newest_whole(output_dir)
        if folder is None:
            return None
    else:
        folder = Path(asked)
        if not folder.is_dir():
            raise RecipeError(f"--resume_from_checkpoint {asked}: there is no such folder; 'auto' takes the newest")
        check_manifest(folder)
    state = read_state(folder)
    check_same_run(recipe, plan, folder, state)
    return folder, state


def newest_whole(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones before it are named on stderr."""
    folder, complaints = newest_whole_checkpoint(output_dir)
    for complaint in complaints:
        print(f"warning: {complaint}; taking an older one", file=sys.stderr)
    if folder is None and complaints:
        raise CheckpointError(
            f"no checkpoint in {output_dir} is whole: delete them, or pass --overwrite_output_dir without"
            " --resume_from_checkpoint, to start from the beginning"
        )
    return folder


def refuse_to_mix(recipe: Recipe, output_dir: Path) -> None:
    """
    Raises:
        RecipeError: a fresh start where a run has left something.
    """
    if recipe.run.overwrite_output_dir:
        return
    if list_checkpoints(output_dir) or (output_dir / "metrics.jsonl").exists():
        raise RecipeError(
            f"{output_dir} already holds a run: pass --resume_from_checkpoint auto to continue it,"
            " --overwrite_output_dir to start again, or another --output_dir"
        )


def check_same_run(recipe: Recipe, plan: Plan, folder: Path, state: RunState) -> None:
    """
    Raises:
        RecipeError: options that differ from the checkpoint's, named with both values.
    """
    if recipe.run.allow_recipe_change:
        return
    saved, current = load_recipe(str(folder / "recipe.yaml")).to_dict(), recipe.to_dict()
    differing = [
        f"{name} ({saved[name]!r} there, {current[name]!r} now)"
        for name in current
        if name not in FREE_OPTIONS and saved[name] != current[name]
    ]
    for name in ("global_batch_size", "steps_per_epoch", "total_steps"):
        if getattr(state, name) != getattr(plan, name):
            differing.append(f"{name.replace('_', ' ')} ({getattr(state, name)} there, {getattr(plan, name)} now)")
    if differing:
        raise RecipeError(
            f"{folder} was made by another recipe: {', '.join(differing)}. Restore the options, or pass"
            " --allow_recipe_change to continue with the new ones"
        )


def cut_back(path: Path, steps_done: int) -> None:
    """Leave only the lines of a JSON Lines file up to a step; a killed run can have left half a line at the end."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            is_done = json.loads(line)["step"] <= steps_done
        except ValueError:
            continue
        if is_done:
            kept.append(line)
    rewrite(path, kept)


def keep_lines(path: Path, number: int) -> None:
    """Leave only the first lines of a file."""
    if path.exists():
        rewrite(path, path.read_text(encoding="utf-8").splitlines()[:number])


def rewrite(path: Path, lines: list[str]) -> None:
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(aside, path)


def clear(output_dir: Path) -> None:
    """Delete what an earlier run has left, other than weights, which the first save replaces."""
    for folder in list_checkpoints(output_dir):
        shutil.rmtree(folder)
    for name in ("metrics.jsonl", "events.jsonl", "bad_images.jsonl", "knn.jsonl"):
        (output_dir / name).unlink(missing_ok=True)


def resume_command() -> str:
    """The command of this run with the option to continue. What started several processes is not known here."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    arguments, asked = ["python" if alone else "(torchrun or accelerate launch as before)"], False
    for argument in sys.argv:
        # Options of the first start that would now be wrong.
        if argument.startswith("--resume_from_checkpoint") or argument == "--overwrite_output_dir":
            asked = argument == "--resume_from_checkpoint"
        elif asked:
            asked = False
        else:
            arguments.append(argument)
    return " ".join([arguments[0], shlex.join([*arguments[1:], "--resume_from_checkpoint", "auto"])])
