"""Recipes of pre-training: options from a YAML file, with those of a command line or of a Python call over them.

A recipe is flat where it is written (`key: value`, `--key value`) and grouped where it is read
(`recipe.views.image_size`). The options themselves are in recipe_options.py.
"""

import dataclasses
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from ..options import (
    Command,
    build,
    merged,
    recipe_values,
    show_help,
    values_of_arguments,
    values_of_keywords,
)
from ..recipe_files import COMMAND_KEY, RECIPES
from ..reporting import UsageError
from ..run_folder import RECIPE, is_file_whole, list_checkpoints
from ..storage import write_text
from .recipe_options import (
    DataOptions,
    HardwareOptions,
    HubOptions,
    ModelOptions,
    MonitoringOptions,
    OptimizationOptions,
    PlanOptions,
    RunOptions,
    ViewOptions,
)


# Why there is no option of this name of `Trainer`.
NO_ACCUMULATION = (
    "gradient_accumulation_steps is not supported: small batches have fewer negatives, which is a different objective."
    " For a batch larger than memory pass --gradient_cache_chunk_size, which computes the exact gradient"
)
# Options of a command line or call that are not part of a recipe: what they choose is.
PLAN_OPTIONS = tuple(item.name for item in dataclasses.fields(PlanOptions))
AUTOMATIC = "it is chosen for the hardware and the backbone"


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    data: DataOptions
    views: ViewOptions
    model: ModelOptions
    optimization: OptimizationOptions
    hardware: HardwareOptions
    run: RunOptions
    monitoring: MonitoringOptions
    hub: HubOptions

    def __post_init__(self):
        if self.monitoring.on_instability == "skip" and self.hardware.mixed_precision == "fp16":
            raise UsageError(
                "--on_instability skip does not work with --mixed_precision fp16, whose gradient scaler decides which"
                " steps to skip: pass --mixed_precision bf16 or no, or --on_instability rollback"
            )

    def to_dict(self) -> dict[str, Any]:
        """All options, flat, in the types of YAML."""
        return {
            name: value
            for group in dataclasses.fields(self)
            for name, value in vars(getattr(self, group.name)).items()
        }

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe; `load_recipe(path)` reads it."""
        write_text(path, yaml.safe_dump({COMMAND_KEY: COMMAND.name, **self.to_dict()}, sort_keys=False))


COMMAND = Command(
    "pretrain",
    "Pre-train an encoder with MoCo v3 on unlabeled images, such as:\n"
    "mocov3 pretrain path/to/images\n"
    "Without a recipe, all options are chosen for the images and the machine, and printed with the reasons.",
    groups=(PlanOptions, *(group.type for group in dataclasses.fields(Recipe))),
    positional="dataset_name",
    recipes=RECIPES,
    hints={"gradient_accumulation_steps": NO_ACCUMULATION},
    removed={
        "fsdp": "every process holds the whole model (DDP), and ViT-H fits into 80 GB; for less memory pass"
        " --gradient_checkpointing true or --gradient_cache_chunk_size",
        "tf32": AUTOMATIC,
        "channels_last": AUTOMATIC,
        "keep_freed_memory": AUTOMATIC,
        "pooled_query_only": "it is always on",
        "in_place_relu": "it made no measurable difference",
        "views_in_one_pass": "it made a difference of less than 5 %",
    },
)


def parse(arguments: Iterable[str]) -> Recipe:
    """
    The recipe of a command line, chosen for data and hardware where it names none. `--help` prints and exits.

    Raises:
        UsageError, ValueError: no `--output_dir`, options that are not valid, or data without a plan.
    """
    arguments = list(arguments)
    show_help(COMMAND, arguments)
    values = with_output_dir(values_of_arguments(COMMAND, arguments))
    without_plan = resolve(
        values.get("recipe", {}), {k: v for k, v in values.items() if k not in ("recipe", *PLAN_OPTIONS)}
    )
    if values.get("recipe") is None and without_plan.data.dataset_name is None and not without_plan.run.dry_run:
        raise UsageError("--dataset_name is missing: pass a folder of images or a Hub id")
    if not (without_plan.run.output_dir or "").strip() and not without_plan.run.dry_run:
        raise UsageError("--output_dir is missing: pass a folder for weights and metrics")
    return planned(values, without_plan, psutil.Process().create_time())


def with_output_dir(values: dict[str, Any]) -> dict[str, Any]:
    """With `runs/NAME OF THE DATA` as the output folder of a run that names neither a folder nor a recipe."""
    if values.get("recipe") is not None or values.get("output_dir") is not None or not values.get("dataset_name"):
        return values
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(values["dataset_name"])))
    return {**values, "output_dir": os.path.join("runs", name.strip(".-") or "images")}


def planned(values: Mapping[str, Any], without_plan: Recipe, started: float) -> Recipe:
    """The recipe itself if it is named and has no time budget, else the automatic plan; see `automatic_recipe`."""
    if values.get("recipe") is not None and all(values.get(name) is None for name in PLAN_OPTIONS):
        return without_plan
    from .probe import automatic_recipe  # which needs recipes itself

    return automatic_recipe(values, started)


def load_recipe(name: str | Path, arguments: Iterable[str] = ()) -> Recipe:
    """
    A recipe by name or path, with command-line arguments such as `["--seed", "1"]` over it.

    Raises:
        UsageError: no such recipe, or options that are not valid.
    """
    return resolve(name, values_of_arguments(COMMAND, arguments))


def recipe_of_call(recipe: str | os.PathLike | Mapping[str, Any] | None, options: Mapping[str, Any]) -> Recipe:
    """
    The recipe of a Python call: name, path or mapping, with typed values over it; UsageError as `load_recipe`.

    With None, it is the automatic plan.
    """
    values = with_output_dir({**values_of_keywords(COMMAND, options), "recipe": recipe})
    without_plan = resolve(
        {} if recipe is None else recipe, {k: v for k, v in values.items() if k not in ("recipe", *PLAN_OPTIONS)}
    )
    return planned(values, without_plan, time.time())


def resolve(recipe: str | os.PathLike | Mapping[str, Any], values: Mapping[str, Any]) -> Recipe:
    """The recipe that a name, a file or a mapping gives, with other values over it; mappings are merged by key."""
    # A run writes recipe.yaml itself: one of an earlier version is taken without a word.
    quiet = isinstance(recipe, str | os.PathLike) and os.path.basename(recipe) == RECIPE
    below = recipe_values(COMMAND, recipe, quiet)
    for name in PLAN_OPTIONS:
        if name in below:
            raise UsageError(f"recipe: {name} is an option of the command line: leave it out of the recipe")
    together = merged(below, values)
    if "backbone_config" in below and "backbone_config" in values:
        together["backbone_config"] = merge_backbone_config(below["backbone_config"], values["backbone_config"])
    return Recipe(**{group.name: build(group.type, together) for group in dataclasses.fields(Recipe)})


def resumed_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe of the newest checkpoint that a run resumes, of those whose recipe is whole; None for a new run."""
    asked = recipe.run.resume_from_checkpoint
    if asked is None:
        return None
    folders = list_checkpoints(recipe.run.output_dir or "") if asked == "auto" else [Path(asked)]
    whole = next((folder for folder in folders if is_file_whole(folder, RECIPE)), None)
    return None if whole is None else load_recipe(whole / RECIPE)


def merge_backbone_config(file: dict, command: dict) -> dict:
    """Keys of the command line over those of the file; those of another model type are dropped."""
    if command.get("model_type", file.get("model_type")) != file.get("model_type"):
        return command
    return {**file, **command}
