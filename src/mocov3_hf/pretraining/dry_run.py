"""The plan of a run in words, without running it."""

import os
from pathlib import Path

import torch
import yaml

from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from ..plan import Plan, make_plan
from ..recipe import Recipe, RecipeError
from .acceleration import choose_acceleration, this_device
from .build import build_config, build_source, doubtful_choices
from .communication import describe as describe_exchanges
from .communication import exchanges
from .estimate import Estimate, estimate


GIB = 2**30


def describe(recipe: Recipe) -> str:
    """
    The resolved recipe, exact parameter counts, multiply-adds, batch, steps, learning rate and estimated memory.

    Raises:
        RecipeError: a recipe that cannot be used, or one that tells neither data nor their number.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    plan = make_plan(recipe, count_images(recipe), num_processes)
    config = build_config(recipe)
    options = recipe.optimization
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(config)
    device = this_device()
    acceleration = choose_acceleration(recipe, model, device, num_processes)
    costs = estimate(
        config,
        recipe.views.image_size,
        plan.batch_size,
        options.optimizer,
        recipe.run.mixed_precision,
        options.gradient_cache_chunk_size,
        acceleration,
        num_processes,
    )
    doubts = doubtful_choices(recipe, plan, model, num_processes)
    model.set_views_in_one_pass(acceleration.views_in_one_pass)
    exchanged = exchanges(
        model,
        plan.batch_size,
        num_processes,
        on_gpu=device.type == "cuda",
        fsdp=acceleration.fsdp,
        chunk_size=options.gradient_cache_chunk_size,
    )
    lines = [
        yaml.safe_dump(recipe.to_dict(), sort_keys=False),
        *plan_lines(plan, costs, num_processes, describe_exchanges(exchanged, num_processes)),
        f"acceleration on {device.type}: {acceleration.describe()}",
        *(f"warning: {doubt}" for doubt in doubts),
    ]
    return "\n".join(lines)


def count_images(recipe: Recipe) -> int | None:
    """Length of the data set: counted where it is at hand, else as the recipe says."""
    name, number = recipe.data.dataset_name, recipe.data.num_train_images
    if name is not None and (number is None or Path(name).exists()):
        return build_source(recipe).num_samples
    if number is None and recipe.data.steps_per_epoch is None:
        raise RecipeError("a plan needs the number of images: pass --num_train_images or --dataset_name")
    return number


def plan_lines(plan: Plan, costs: Estimate, num_processes: int, communication: str) -> list[str]:
    """One line for each figure."""
    figures = {
        "parameters (whole model)": f"{costs.num_parameters:,}",
        "parameters (trained)": f"{costs.num_trained_parameters:,}",
        "parameters (backbone)": f"{costs.num_backbone_parameters:,}",
        "backbone GFLOPs (multiply-adds)": f"{costs.backbone_macs / 1e9:.2f}",
        "processes": f"{num_processes}",
        "global batch": f"{plan.global_batch_size:,} ({plan.batch_size:,} per process)",
        "steps": f"{plan.total_steps:,} ({plan.steps_per_epoch:,} per epoch, {plan.num_epochs:g} epochs)",
        "warm-up steps": f"{plan.warmup_steps:,}",
        "peak learning rate": f"{plan.learning_rate:g}",
        "estimated memory per process": (
            f"{costs.memory_bytes / GIB:.1f} GiB ({costs.weight_bytes / GIB:.1f} weights, gradients and optimizer,"
            f" {costs.activation_bytes / GIB:.1f} activations, {costs.view_bytes / GIB:.1f} views)"
        ),
    }
    if num_processes > 1:
        figures["communication per step and process"] = communication
    width = max(map(len, figures))
    return [f"{name:<{width}}  {figure}" for name, figure in figures.items()]
