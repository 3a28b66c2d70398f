"""The recipe of a run without `--recipe`: facts for the rules of auto.py, memory, and the length for a time budget."""

import dataclasses
import io
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from ..data.classes import open_labeled_splits
from ..data.pixel_statistics import sample_images
from ..data.sources import MapSource, StreamSource
from ..options import build
from ..precision import resolve_precision, this_device
from ..reporting import UsageError, is_first_process, warn
from ..run_folder import RECIPE
from .auto import USABLE_MEMORY, Choices, Facts, choose, choose_optimization, describe_choices
from .build import build_config, build_source
from .estimate import estimate
from .plan import make_plan
from .recipe import Recipe, resolve
from .trial import seconds_per_step


SAMPLED_IMAGES = 64
TIMED_STEPS, TRIAL_SHARE = 20, 0.05  # steps that are timed at most, and the share of the budget for them
# Of what is left, for checkpoints, the report, and steps that are slower than those of the trial.
RESERVE = 0.1
FEWEST_STEPS = 10
# An image of the kNN splits passes one encoder once; one of a step passes both, twice, and one of them backward.
PASSES_OF_A_STEP = 8
UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def automatic_recipe(values: Mapping[str, Any]) -> Recipe:
    """
    A recipe for the images and the hardware, printed as a table with the reason of every choice. A run that is resumed
    keeps its own.

    Args:
        values: The options that the user has set.

    Raises:
        UsageError, ValueError: no data set, one that cannot be used, or options that do not fit.
    """
    started, values = time.monotonic(), dict(values)
    if not values.get("dataset_name"):
        raise UsageError("nothing to learn from: pass a folder of images or a Hub id, and --recipe if you have one")
    if not values.get("output_dir") and not values.get("dry_run"):
        values["output_dir"] = str(
            Path("runs") / re.sub(r"[^\w.-]+", "_", Path(values["dataset_name"]).name or "images")
        )
    resumed = saved_recipe(values)
    if resumed is not None:
        return resolve(resumed, {name: value for name, value in values.items() if name not in ("size", "time_budget")})
    size, budget = values.pop("size", None), values.pop("time_budget", None)
    seconds = None if budget is None else seconds_of(budget)
    if seconds is not None and (values.get("num_train_epochs") or values.get("max_steps")):
        raise UsageError("--time_budget sets the length of the run: leave --num_train_epochs and --max_steps out")
    draft = recipe_of(values)
    source = build_source(draft)
    facts = look_at(draft, source)
    choices = choose(facts, values, size)
    fit_memory(choices, facts, values)
    recipe = resolve(choices.values(), values)
    if recipe.run.dry_run:
        if seconds is not None:
            warn("--time_budget is measured when the run starts: this plan has the usual length")
    else:
        if facts.device == "cuda":
            recipe = with_enough_memory(recipe, choices, source)
        if seconds is not None:
            recipe = within_budget(recipe, choices, source, facts, budget, seconds, started)
    if is_first_process():
        print(f"no --recipe: chosen for these images and this machine\n{describe_choices(choices)}", file=sys.stderr)
    return recipe


def with_time_budget(recipe: Recipe) -> Recipe:
    """
    A recipe of a file whose length is set by `--time_budget`.

    Raises:
        UsageError: a budget shorter than start-up.
    """
    budget = recipe.optimization.time_budget
    if budget is None or recipe.run.dry_run:
        return recipe
    started, seconds = time.monotonic(), seconds_of(budget)
    values = {"resume_from_checkpoint": recipe.run.resume_from_checkpoint, "output_dir": recipe.run.output_dir}
    resumed = saved_recipe(values)
    if resumed is not None:
        saved = resolve(resumed, {}).optimization
        length = {name: getattr(saved, name) for name in ("num_train_epochs", "warmup_epochs", "max_steps")}
    else:
        source = build_source(recipe)
        steps = affordable_steps(recipe, source, seconds, started, budget)
        plan = make_plan(recipe, source.num_samples, int(os.environ.get("WORLD_SIZE", "1")))
        length = length_of(steps, plan.steps_per_epoch)
        share = recipe.optimization.warmup_epochs / recipe.optimization.num_train_epochs
        length["warmup_epochs"] = share * length["num_train_epochs"]
    return dataclasses.replace(
        recipe, optimization=dataclasses.replace(recipe.optimization, **length, time_budget=None)
    )


def saved_recipe(values: Mapping[str, Any]) -> Path | None:
    """The recipe of the run that is resumed, if there is one."""
    asked = values.get("resume_from_checkpoint")
    if asked is None:
        return None
    path = Path(values["output_dir"] if asked == "auto" else asked) / RECIPE
    return path if path.is_file() else None


def recipe_of(values: Mapping[str, Any]) -> Recipe:
    return Recipe(**{group.name: build(group.type, values) for group in dataclasses.fields(Recipe)})


def seconds_of(budget: str) -> float:
    """
    Seconds of `8h`, `90m` or `1h30m`.

    Raises:
        UsageError: another form.
    """
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)", budget.lower())
    seconds = sum(float(number) * UNITS.get(unit, 0) for number, unit in parts)
    is_whole = re.sub(r"[0-9.\s]+[a-z]+", "", budget.lower()).strip() == ""
    if not is_whole or not parts or any(unit not in UNITS for _, unit in parts) or not 0 < seconds < 1e9:
        raise UsageError(f"--time_budget takes a duration such as 30m, 8h or 1d12h, got {budget!r}")
    return seconds


def look_at(recipe: Recipe, source: MapSource | StreamSource) -> Facts:
    """
    What the rules depend on.

    Raises:
        UsageError: a stream of unknown length, images that cannot be read, fp16 on a CPU.
    """
    number = recipe.data.num_train_images or source.num_samples
    if number is None:
        raise UsageError("the number of images is unknown when streaming: pass --num_train_images")
    device = this_device()
    precision, reason = resolve_precision(recipe.hardware.mixed_precision, device)
    sides, channels = zip(*sizes_of(source), strict=True) if number else ((0,), (3,))
    splits, why_not = labeled_splits(recipe, source)
    return Facts(
        num_images=number,
        short_side=round(median(sides)),
        num_channels=round(median(channels)),
        labeled_splits=splits,
        no_labels=why_not,
        device=device.type,
        memory=memory_of(device),
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        precision=precision,
        precision_reason=reason,
    )


def sizes_of(source: MapSource | StreamSource) -> list[tuple[int, int]]:
    """
    Shorter side and channels of a sample of images, from their headers.

    Raises:
        UsageError: none can be read.
    """
    found = []
    for data in sample_images(source, SAMPLED_IMAGES):
        if isinstance(data, np.ndarray):
            shape = sorted(data.shape)
            found.append((shape[-2], shape[0] if data.ndim == 3 else 1))
            continue
        try:
            with Image.open(data if isinstance(data, str) else io.BytesIO(data)) as image:
                found.append((min(image.size), 1 if image.mode.startswith(("I", "F")) else 3))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # damaged, or of a kind that another reader knows
    if not found:
        raise UsageError("the sizes of the images cannot be read: pass --recipe and --image_size")
    return found


def labeled_splits(recipe: Recipe, source: MapSource | StreamSource) -> tuple[tuple[str, str] | None, str]:
    """Splits for kNN, or why there are none."""
    options, data = recipe.monitoring, recipe.data
    known = () if source.account is None else tuple(source.account.splits)
    train = (
        data.train_split if "+" not in data.train_split and "[" not in data.train_split else options.knn_train_split
    )
    held_out = next((name for name in ("validation", "test", *known) if name in known and name != train), None)
    if held_out is None:
        return None, "there is no held-out split, such as a folder test/"
    try:
        open_labeled_splits(
            options.knn_dataset_name or data.dataset_name, data.dataset_config_name, train, held_out, data.image_column
        )
    except ValueError as error:
        return None, str(error).partition(":")[0]
    return (train, held_out), ""


def memory_of(device: torch.device) -> int:
    """Bytes for each process of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def fit_memory(choices: Choices, facts: Facts, values: Mapping[str, Any]) -> None:
    """Choose a gradient cache, or a smaller batch, where the estimate says that a step does not fit."""
    if "gradient_cache_chunk_size" in values or values.get("model") is not None:
        return
    recipe = resolve(choices.values(), values)
    plan = make_plan(recipe, facts.num_images, facts.num_processes)
    channels = None if facts.num_channels == 3 else facts.num_channels
    config = build_config(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, num_channels=channels)))
    chunk: int | None = None
    while True:
        costs = estimate(
            config,
            recipe.views.image_size,
            plan.batch_size,
            recipe.optimization.optimizer,
            recipe.hardware.mixed_precision,
            chunk,
        )
        if costs.memory_bytes <= USABLE_MEMORY * facts.memory or chunk == 1:
            break
        if config.backbone_config.model_type == "resnet":  # batch normalization cannot be computed in parts
            break
        chunk = 2 ** ((chunk or plan.batch_size) - 1).bit_length() // 2
    needed, there = costs.memory_bytes / 2**30, facts.memory / 2**30
    if chunk is not None:
        reason = f"{plan.batch_size} images in parts: exact, and fits {there:.0f} GiB ({needed:.1f} estimated)"
        choices.add("gradient_cache_chunk_size", chunk, reason)


def with_enough_memory(recipe: Recipe, choices: Choices, source: MapSource | StreamSource) -> Recipe:
    """The recipe with half of the images in a pass until one real step has room."""
    while True:
        try:
            seconds_per_step(recipe, source, 1, 60)
            return recipe
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        chunk = recipe.hardware.gradient_cache_chunk_size
        if chunk is None:
            plan = make_plan(recipe, source.num_samples, int(os.environ.get("WORLD_SIZE", "1")))
            chunk = plan.batch_size
        if chunk == 1:
            raise UsageError("a step does not fit into the memory of the device: pass --size small or a --recipe")
        chunk = max(1, chunk // 2)
        choices.rows = [row for row in choices.rows if row.option != "gradient_cache_chunk_size"]
        choices.add("gradient_cache_chunk_size", chunk, "a real step with more images in a pass ran out of memory")
        hardware = dataclasses.replace(recipe.hardware, gradient_cache_chunk_size=chunk)
        recipe = dataclasses.replace(recipe, hardware=hardware)


def within_budget(
    recipe: Recipe,
    choices: Choices,
    source: MapSource | StreamSource,
    facts: Facts,
    budget: str,
    seconds: float,
    started: float,
) -> Recipe:
    """The recipe with the length that a time budget affords, and what follows from the length."""
    steps = affordable_steps(recipe, source, seconds, started, budget)
    plan = make_plan(recipe, facts.num_images, facts.num_processes)
    length = length_of(steps, plan.steps_per_epoch)
    given = {name: row.value for name, row in ((row.option, row) for row in choices.rows) if row.reason == "given"}
    backbone = recipe.model.backbone_config.get("model_type")
    dependent = ("num_train_epochs", "max_steps", "warmup_epochs", "ema_decay", "knn_steps", "save_steps")
    kept = [row for row in choices.rows if row.option not in dependent]
    again = Choices(given)
    rate = steps * plan.global_batch_size / seconds
    for name, value in length.items():
        if value is not None:
            again.add(name, value, f"what {budget} affords at about {rate:.0f} images/s")
    choose_optimization(again, str(backbone), length["num_train_epochs"], steps, plan.global_batch_size)
    again.rows = [row for row in again.rows if row.option in dependent]
    if facts.labeled_splits is not None:
        again.add("knn_steps", max(1, steps // 10), "ten times")
    again.add("save_steps", max(1, min(100, steps)), "at most a few minutes are lost")
    choices.rows = kept + again.rows
    values = {name: value for name, value in recipe.to_dict().items() if name not in dependent}
    return resolve(values, choices.values())


def length_of(steps: int, steps_per_epoch: int) -> dict[str, Any]:
    """Options for a number of steps: whole epochs, or steps where there is less than one."""
    epochs = steps // steps_per_epoch
    return {"num_train_epochs": max(1, epochs), "max_steps": None if epochs else steps}


def affordable_steps(
    recipe: Recipe, source: MapSource | StreamSource, seconds: float, started: float, budget: str
) -> int:
    """
    Steps that a budget affords, from the time of trial steps.

    Raises:
        UsageError: hardly any.
    """
    step, startup = seconds_per_step(recipe, source, TIMED_STEPS, TRIAL_SHARE * seconds)
    # The run itself starts once more.
    left = seconds - (time.monotonic() - started) - startup
    plan = make_plan(recipe, source.num_samples, int(os.environ.get("WORLD_SIZE", "1")))
    steps = left * (1 - RESERVE) / step
    if recipe.monitoring.knn_steps is not None:
        account = source.account
        images = sum(account.splits.values()) if account is not None else 2 * (source.num_samples or 0)
        steps -= 10 * images / PASSES_OF_A_STEP / plan.global_batch_size
    if steps < FEWEST_STEPS:
        needed = seconds - left + FEWEST_STEPS * step / (1 - RESERVE)
        raise UsageError(
            f"--time_budget {budget} is too short: starting takes about {max(1, seconds - left):.0f} s and a step"
            f" {step:.2g} s; pass at least {needed / 60 + 1:.0f}m"
        )
    return int(steps)
