"""`--dry_run`: the plan of a run as text or JSON, without running it."""

import json
import os
from dataclasses import dataclass

import yaml

from ..data.account import Account
from ..data.sources import MapSource, StreamSource
from ..precision import this_device
from ..reporting import UsageError
from .build import build_config, build_source, check_buildable, check_images, check_keys, doubtful_choices
from .estimate import Estimate, describe_exchanges, estimate, exchanges
from .gradient_cache import check_chunkable
from .hardware import choose_settings, settle_precision
from .launch import check_trackers
from .pixels import settle_pixels
from .plan import Plan, make_plan
from .recipe import Recipe
from .resume import check_resume_folder


GIB = 2**30


@dataclass(frozen=True)
class PlannedRun:
    """
    What a run would do.

    Attributes:
        data: What was found, None where the images are not on this machine.
        notes: What the images are like, one clause each; empty for 8-bit RGB.
        doubts: Choices that are known to fail or that differ from the method.
    """

    recipe: Recipe
    num_images: int | None
    data: Account | None
    notes: tuple[str, ...]
    num_processes: int
    num_channels: int
    plan: Plan
    costs: Estimate
    communication: str
    settings: str
    doubts: list[str]


def plan_run(recipe: Recipe) -> PlannedRun:
    """
    Plan a run without running it.

    Raises:
        UsageError: a recipe that is not valid, or one without data and their number.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    device = this_device()
    recipe, precision = settle_precision(recipe, device)
    check_trackers(recipe.monitoring.report_to)
    check_resume_folder(recipe)
    source = open_images(recipe)
    num_images = recipe.data.num_train_images if source is None else source.num_samples
    plan = make_plan(recipe, num_images, num_processes)
    notes: tuple[str, ...] = ()
    if source is not None:
        recipe, notes = settle_pixels(recipe, source)
    config = build_config(recipe)
    check_keys(recipe.model.backbone_config, config.backbone_config)
    model = check_buildable(config)
    if recipe.hardware.gradient_cache_chunk_size is not None:
        check_chunkable(model)
    check_images(model, recipe.views.image_size)
    if model.mocov3.pooling.reads_values:
        kind = config.backbone_config.model_type
        raise UsageError(f"--dry_run cannot estimate a {kind!r} backbone, which needs data to run: leave it out")
    settings = choose_settings(recipe, model, device)
    costs = estimate(
        config,
        recipe.views.image_size,
        plan.batch_size,
        recipe.optimization.optimizer,
        recipe.hardware.mixed_precision,
        recipe.hardware.gradient_cache_chunk_size,
        settings,
    )
    exchanged = exchanges(model, plan.batch_size, num_processes, on_gpu=device.type == "cuda")
    return PlannedRun(
        recipe=recipe,
        num_images=num_images,
        data=None if source is None else source.account,
        notes=notes,
        num_processes=num_processes,
        num_channels=getattr(config, "num_channels", None) or 3,
        plan=plan,
        costs=costs,
        communication=describe_exchanges(exchanged, num_processes),
        settings=f"settings for {device.type}: {precision}, {settings.describe()}",
        doubts=doubtful_choices(recipe, plan, model, num_processes),
    )


def describe(recipe: Recipe) -> str:
    """
    The resolved recipe, images, parameters, multiply-adds, batch, steps, learning rate and estimated memory.

    Raises:
        UsageError: as `plan_run`.
    """
    run = plan_run(recipe)
    lines = [
        yaml.safe_dump(run.recipe.to_dict(), sort_keys=False),
        *(run.data.lines() if run.data is not None else ()),
        *(f"images: {note}" for note in run.notes),
        *plan_lines(run.plan, run.costs, run.num_processes, run.communication),
        run.settings,
        *(f"warning: {doubt}" for doubt in run.doubts),
    ]
    return "\n".join(lines)


def describe_as_json(recipe: Recipe) -> str:
    """
    The plan as one JSON object.

    Raises:
        UsageError: as `plan_run`.
    """
    run = plan_run(recipe)
    plan, costs = run.plan, run.costs
    return json.dumps(
        {
            "num_images": run.num_images,
            "num_files": None if run.data is None else run.data.num_files,
            "skipped": {} if run.data is None else run.data.skipped,
            "num_channels": run.num_channels,
            "image_size": recipe.views.image_size,
            "train_batch_size": plan.global_batch_size,
            "per_device_train_batch_size": plan.batch_size,
            "num_processes": run.num_processes,
            "steps_per_epoch": plan.steps_per_epoch,
            "total_steps": plan.total_steps,
            "warmup_steps": plan.warmup_steps,
            "num_train_epochs": plan.num_epochs,
            "learning_rate": plan.learning_rate,
            "mixed_precision": recipe.hardware.mixed_precision,
            "num_parameters": costs.num_parameters,
            "num_trained_parameters": costs.num_trained_parameters,
            "backbone_macs": costs.backbone_macs,
            "memory_bytes": costs.memory_bytes,
            "warnings": run.doubts,
            "data": None if run.data is None else run.data.to_dict(),
            "images": list(run.notes),
            "recipe": run.recipe.to_dict(),
        },
        indent=2,
    )


def open_images(recipe: Recipe) -> MapSource | StreamSource | None:
    """The data set if it is on this machine or its length is not in the recipe, else None."""
    name, number = recipe.data.dataset_name, recipe.data.num_train_images
    if name is not None and (number is None or os.path.exists(os.path.expanduser(name))):
        return build_source(recipe)
    if number is None and recipe.data.steps_per_epoch is None:
        raise UsageError("the number of images is unknown: pass --dataset_name or --num_train_images")
    return None


def plan_lines(plan: Plan, costs: Estimate, num_processes: int, communication: str) -> list[str]:
    """A line per number."""
    numbers = {
        "parameters (whole model)": f"{costs.num_parameters:,}",
        "parameters (trained)": f"{costs.num_trained_parameters:,}",
        "parameters (backbone)": f"{costs.num_backbone_parameters:,}",
        "backbone GFLOPs (multiply-adds)": f"{costs.backbone_macs / 1e9:.2f}",
        "processes": f"{num_processes}",
        "global batch": f"{plan.global_batch_size:,} ({plan.batch_size:,} per process)",
        "steps": f"{plan.total_steps:,} ({plan.steps_per_epoch:,} per epoch, {plan.num_epochs:g} epochs)",
        "warmup steps": f"{plan.warmup_steps:,}",
        "peak learning rate": f"{plan.learning_rate:g}",
        "estimated memory per process": (
            f"{costs.memory_bytes / GIB:.1f} GiB ({costs.weight_bytes / GIB:.1f} weights, gradients and optimizer,"
            f" {costs.activation_bytes / GIB:.1f} activations, {costs.view_bytes / GIB:.1f} views)"
        ),
    }
    if num_processes > 1:
        numbers["communication per step and process"] = communication
    width = max(map(len, numbers))
    return [f"{name:<{width}}  {number}" for name, number in numbers.items()]
