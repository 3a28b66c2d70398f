"""`--dry_run`: the plan of a run as text, without running it."""

import os
from pathlib import Path

import yaml

from ..reporting import UsageError
from .build import build_config, build_source, check_buildable, doubtful_choices
from .estimate import Estimate, describe_exchanges, estimate, exchanges
from .hardware import choose_settings, this_device
from .plan import Plan, make_plan
from .recipe import Recipe


GIB = 2**30


def describe(recipe: Recipe) -> str:
    """
    The resolved recipe, parameters, multiply-adds, batch, steps, learning rate and estimated memory.

    Raises:
        UsageError: a recipe that is not valid, or one without data and their number.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    plan = make_plan(recipe, count_images(recipe), num_processes)
    config = build_config(recipe)
    model = check_buildable(config)
    device = this_device()
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
    lines = [
        yaml.safe_dump(recipe.to_dict(), sort_keys=False),
        *plan_lines(plan, costs, num_processes, describe_exchanges(exchanged, num_processes)),
        f"settings for {device.type}: mixed_precision {recipe.hardware.mixed_precision}, {settings.describe()}",
        *(f"warning: {doubt}" for doubt in doubtful_choices(recipe, plan, model, num_processes)),
    ]
    return "\n".join(lines)


def count_images(recipe: Recipe) -> int | None:
    """Length of the data set: counted if it is on this machine, else as the recipe says."""
    name, number = recipe.data.dataset_name, recipe.data.num_train_images
    if name is not None and (number is None or Path(name).exists()):
        return build_source(recipe).num_samples
    if number is None and recipe.data.steps_per_epoch is None:
        raise UsageError("the number of images is unknown: pass --dataset_name or --num_train_images")
    return number


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
