"""Recipes: frozen dataclasses filled from a YAML file and the command line, and what follows from them.

A recipe is flat where it is written (`key: value`, `--key value`) and grouped where it is read
(`recipe.views.image_size`). The options themselves are in recipe_options.py.
"""

import argparse
import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from .recipe_options import (
    AccelerationRecipe,
    DataRecipe,
    Mapping,
    ModelRecipe,
    OptimizationRecipe,
    RunRecipe,
    ViewRecipe,
)


RECIPES = Path(__file__).parent / "recipes"
# Why the option that users of `Trainer` look for does not exist.
NO_ACCUMULATION = (
    "there is no gradient_accumulation_steps: summing the gradients of small batches is another objective, with fewer"
    " negatives. For a batch larger than memory pass --gradient_cache_chunk_size, which gives the gradients of the"
    " whole batch"
)


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says what was expected and how to repair it."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    model: ModelRecipe
    data: DataRecipe
    views: ViewRecipe
    optimization: OptimizationRecipe
    acceleration: AccelerationRecipe
    run: RunRecipe

    def to_dict(self) -> dict:
        """All options, flat, in the types of YAML."""
        flat = {}
        for group in dataclasses.fields(self):
            for name, value in vars(getattr(self, group.name)).items():
                flat[name] = dict(value) if isinstance(value, dict) else value
        return flat

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe; `load_recipe(path)` gives it back."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


GROUPS = tuple(group.type for group in dataclasses.fields(Recipe))


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """
    The file of a recipe given by name or path.

    Raises:
        RecipeError: no such recipe; the message offers the nearest name.
    """
    if Path(name).is_file():
        return Path(name)
    if (RECIPES / f"{name}.yaml").is_file():
        return RECIPES / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        raise RecipeError(f"there is no recipe file {name}")
    close = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.3)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise RecipeError(f"there is no recipe {name!r}. {hint}Known are: {', '.join(recipe_names())}")


class _Parser(HfArgumentParser):
    """Parses only what is given, leaving defaults to the dataclasses, and raises instead of exiting."""

    def __init__(self, source: str):
        super().__init__(GROUPS, allow_abbrev=False, add_help=False)
        self.source = source
        for action in self._actions:
            action.default = argparse.SUPPRESS

    def error(self, message: str):
        raise RecipeError(f"{self.source}: {message}")

    def given(self, arguments: list[str]) -> dict:
        namespace, unknown = self.parse_known_args(arguments)
        unknown = [argument for argument in unknown if argument.startswith("--")] or unknown
        if unknown:
            refuse_unknown(unknown[0].lstrip("-").split("=")[0], self.source)
        return vars(namespace)


def recipe_help() -> str:
    """All options with their documentation and defaults, group by group."""
    parser = argparse.ArgumentParser(
        usage="pretrain.py --recipe NAME|FILE [--option value ...]",
        description=f"Recipes of the package: {', '.join(recipe_names())}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        add_help=False,
    )
    for group in GROUPS:
        section = parser.add_argument_group(group.__name__, group.__doc__)
        for action in HfArgumentParser(group, add_help=False)._actions:
            section._add_action(action)
    return parser.format_help()


def option_names() -> list[str]:
    return [field.name for group in GROUPS for field in dataclasses.fields(group)]


def refuse_unknown(name: str, source: str) -> None:
    """
    Raises:
        RecipeError: always, with the nearest option.
    """
    if name == "gradient_accumulation_steps":
        raise RecipeError(f"{source}: {NO_ACCUMULATION}")
    close = difflib.get_close_matches(name, option_names(), n=1, cutoff=0.5)
    hint = f". Did you mean {close[0]!r}?" if close else "; --help lists all options"
    raise RecipeError(f"{source}: there is no option {name!r}{hint}")


def as_arguments(values: dict, source: str) -> list[str]:
    """YAML values as command line arguments, so that both are converted and checked by one parser."""
    arguments = []
    for name, value in values.items():
        if name not in option_names():
            refuse_unknown(str(name), source)
        if value is None:
            continue
        if isinstance(value, dict):
            arguments += [f"--{name}", json.dumps(value)]
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments += [f"--{name}={value}"]
    return arguments


def load_recipe(name: str, arguments: list[str] = ()) -> Recipe:
    """
    A recipe by name or path with command line arguments over it.

    Args:
        name: Name of a recipe of the package, or path of a YAML file.
        arguments: For example `["--seed", "1"]`. Precedence: arguments, then the file, then the defaults; mappings are
            merged by key.

    Raises:
        RecipeError: unknown recipe or option (the nearest is offered), or a value of the wrong type.
    """
    path = find_recipe(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of options, got a {type(values).__name__}")
    from_file = _Parser(path.name).given(as_arguments(values, path.name))
    from_command = _Parser("command line").given(list(arguments))
    merged = from_file | from_command
    for key, value in from_command.items():
        if isinstance(value, Mapping) and isinstance(from_file.get(key), Mapping):
            merged[key] = Mapping(merge_backbone_config(from_file[key], value))
    return build_recipe(merged)


def merge_backbone_config(file: dict, command: dict) -> dict:
    """Keys of the command line over those of the file; another model type starts afresh."""
    if command.get("model_type", file.get("model_type")) != file.get("model_type"):
        return command
    return {**file, **command}


def build_recipe(values: dict) -> Recipe:
    """A recipe from flat values, checked."""
    groups = {
        group.name: group.type(
            **{field.name: values[field.name] for field in dataclasses.fields(group.type) if field.name in values}
        )
        for group in dataclasses.fields(Recipe)
    }
    recipe = Recipe(**groups)
    check_ranges(recipe)
    return recipe


def check_ranges(recipe: Recipe) -> None:
    """
    Raises:
        RecipeError: a value outside of its range.
    """
    values = recipe.to_dict()
    for name, value in values.items():
        if ("probability" in name or name == "max_bad_fraction") and not 0.0 <= value <= 1.0:
            raise RecipeError(f"{name} must lie between 0 and 1, got {value}")
        if name in ("crop_scale", "crop_ratio", "blur_sigma") and not (len(value) == 2 and 0 < value[0] <= value[1]):
            raise RecipeError(f"{name} must be two positive numbers, the smaller first, got {value}")
    at_least_one = [
        "image_size",
        "train_batch_size",
        "per_device_train_batch_size",
        "gradient_cache_chunk_size",
        "num_train_epochs",
        "max_steps",
        "steps_per_epoch",
        "knn_steps",
        "knn_k",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "communication_timeout",
        "max_rollbacks",
    ]
    for name in at_least_one:
        if values[name] is not None and values[name] < 1:
            raise RecipeError(f"{name} must be at least 1, got {values[name]}")
    not_negative = ["dataloader_num_workers", "weight_decay", "base_learning_rate", "learning_rate", "warmup_epochs"]
    for name in not_negative:
        if values[name] is not None and not 0 <= values[name] < math.inf:
            raise RecipeError(f"{name} must not be negative, got {values[name]}")
    if not 0.0 <= recipe.optimization.momentum <= 1.0:
        raise RecipeError(f"momentum must lie between 0 and 1, got {recipe.optimization.momentum}")
    if not 0.0 < recipe.run.rollback_learning_rate_factor <= 1.0:
        raise RecipeError(
            f"rollback_learning_rate_factor must lie above 0 and not above 1, got"
            f" {recipe.run.rollback_learning_rate_factor}"
        )
    if not recipe.run.spike_factor > 1.0:
        raise RecipeError(f"spike_factor must be above 1, got {recipe.run.spike_factor}")
    if recipe.run.on_instability == "skip" and recipe.run.mixed_precision == "fp16":
        raise RecipeError(
            "on_instability skip needs bf16 or no mixed_precision: with fp16 the gradient scaler decides which steps"
            " to leave out. Use bf16, or on_instability rollback"
        )
    if recipe.views.crop_scale[1] > 1.0:
        raise RecipeError(f"crop_scale must not exceed 1, got {recipe.views.crop_scale}")
