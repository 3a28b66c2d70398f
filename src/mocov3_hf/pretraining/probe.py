"""A recipe for a run that names none: the automatic plan, confirmed by a step, and a schedule for a time budget."""

import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..data.workers import cores_shared_with
from ..model.configuration_mocov3_vit import MoCoV3ViTConfig, to_pair
from ..precision import this_device
from ..reporting import UsageError, is_first_process
from .auto import GIB, Choice, Facts, MemoryModel, Values, choose
from .build import build_accelerator, build_loader, build_model, build_optimizer, build_source
from .facts import look, memory_model
from .hardware import choose_settings, compile_augmentation, set_up, settle_precision
from .pixels import build_photometric, load_own_config, settle_pixels
from .plan import batches, make_plan
from .recipe import PLAN_OPTIONS, Recipe, resolve, resumed_recipe
from .resume import check_output_is_free
from .step import train_step


UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
# Of the time that is left: steps are slower at times, and checkpoints are written.
USABLE_TIME = 0.9
KNN_TIME = 0.9  # what is left beside kNN, see `choose_knn`
WARM_UP_STEPS, FEWEST_STEPS, MOST_SECONDS = 2, 5, 10.0
FEWEST_IN_BUDGET = 10  # steps; a shorter schedule learns nothing


@dataclass(frozen=True)
class Trial:
    """
    Steps that worked.

    Attributes:
        chunk_size, batch_size: With which; those of the recipe, or halved after running out of memory.
        seconds: Of a step; 0 if only one was made.
        preparation: Seconds before the first step, which the run needs again.
    """

    chunk_size: int | None
    batch_size: int
    seconds: float
    preparation: float


def automatic_recipe(values: Mapping[str, Any], started: float) -> Recipe:
    """
    The recipe of a run that names none, or of one with a time budget. Prints the plan on the first process.

    Args:
        values: Options of the command line or call. With `recipe`, only the length of the schedule is chosen.
        started: `time.time()` at which the budget begins.

    Raises:
        UsageError, ValueError: options, data or a budget with which no plan can be made.
    """
    given = {name: value for name, value in values.items() if name not in PLAN_OPTIONS}
    size, budget, named = values.get("size"), values.get("time_budget"), given.pop("recipe", None)
    check_together(values)
    seconds = None if budget is None else seconds_of(budget)
    below = resolve({} if named is None else named, given)
    resumed = resumed_recipe(below) if below.run.output_dir else None
    if resumed is not None:  # keeps its plan
        length = {"max_steps": resumed.optimization.max_steps}
        return resolve(resumed.to_dict() if named is None else below.to_dict() | length, given)
    if below.run.output_dir and not below.run.dry_run and below.run.resume_from_checkpoint is None:
        check_output_is_free(below)  # before a trial, which takes a while
    if named is not None:
        return with_budget(below, str(budget), started)

    facts, source = look(given)
    decided, why = with_model(given)
    memory: list[MemoryModel] = []  # of the model, which is the same in both rounds

    def memory_of(values: Values) -> MemoryModel:
        if not memory:
            memory.append(memory_model(values))
        return memory[0]

    choices = choose(facts, decided, memory_of, size, why)
    if not below.run.dry_run or seconds is not None:
        first = {choice.option: choice.value for choice in choices}
        recipe = resolve({**decided, **first}, {})
        trial = agreed(recipe, try_steps(recipe, source, set(given), memory[0].can_chunk, seconds))
        if trial.chunk_size != recipe.hardware.gradient_cache_chunk_size:
            decided["gradient_cache_chunk_size"] = trial.chunk_size
            why["gradient_cache_chunk_size"] = "a real step ran out of memory with more"
        if trial.batch_size != recipe.optimization.train_batch_size:
            decided["train_batch_size"] = trial.batch_size
            why["train_batch_size"] = "a real step ran out of memory with more"
        if seconds is not None:
            steps = steps_within(str(budget), started, trial, recipe.monitoring.knn_steps is not None)
            facts = replace(facts, steps_in_budget=steps)
        choices = choose(facts, decided, memory_of, size, why)
    recipe = resolve({**decided, **{choice.option: choice.value for choice in choices}}, {})
    if is_first_process():
        print(table(facts, choices), file=sys.stderr if recipe.run.json else sys.stdout, flush=True)
    return recipe


def check_together(values: Mapping[str, Any]) -> None:
    """
    Raises:
        UsageError: options of the plan that contradict others, or a budget that is not a time.
    """
    if values.get("size") is not None:
        other = next((name for name in ("recipe", "model", "backbone_config") if values.get(name)), None)
        if other is not None:
            raise UsageError(f"--size and --{other} both choose the backbone: pass one of them")
    if values.get("time_budget") is not None:
        seconds_of(values["time_budget"])
        other = next((name for name in ("max_steps", "num_train_epochs") if values.get(name) is not None), None)
        if other is not None:
            raise UsageError(f"--time_budget and --{other} both set the length of the schedule: pass one of them")


def seconds_of(budget: str) -> float:
    """
    The seconds of a budget such as `8h`, `90m` or `1h30m`.

    Raises:
        UsageError: another text, or no time at all.
    """
    text = "".join(budget.lower().split())
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([dhms])", text)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != text or not 0 < seconds < math.inf:
        raise UsageError(f"--time_budget takes a time such as 8h, 90m or 1h30m (d, h, m, s), got {budget!r}")
    return seconds


def with_budget(recipe: Recipe, budget: str, started: float) -> Recipe:
    """A recipe with the number of steps that a time budget allows; its epochs and warmup keep their proportion."""
    recipe, _ = settle_precision(recipe, this_device())
    trial = agreed(recipe, try_steps(recipe, build_source(recipe), None, False, seconds_of(budget)))
    steps = steps_within(budget, started, trial, recipe.monitoring.knn_steps is not None)
    if is_first_process():
        print(f"time budget: {steps:,} steps of {trial.seconds:.3g} s (measured)", file=sys.stderr)
    return replace(recipe, optimization=replace(recipe.optimization, max_steps=steps))


def steps_within(budget: str, started: float, trial: Trial, has_knn: bool) -> int:
    """
    Steps that end within a budget.

    Raises:
        UsageError: it is over before training, or after a few steps.
    """
    usable, spent = USABLE_TIME * (KNN_TIME if has_knn else 1.0), time.time() - started + trial.preparation
    steps = int((seconds_of(budget) - spent) * usable / trial.seconds)
    if steps < FEWEST_IN_BUDGET:
        enough = math.ceil((spent + 10 * FEWEST_IN_BUDGET * trial.seconds / usable) * 1.2)
        raise UsageError(
            f"--time_budget {budget} is too short: starting takes {spent:.0f} s and a step {trial.seconds:.3g} s; pass"
            f" at least {enough}s"
        )
    return steps


# A real step


def try_steps(recipe: Recipe, source: Any, given: set[str] | None, can_chunk: bool, budget: float | None) -> Trial:
    """
    Train for a step, and with a budget for some seconds, and throw the model away. After running out of memory, the
    chunk of a backbone without batch normalization is halved, or the batch.

    Each process does it alone, so that none waits for another one that runs out of memory.

    Args:
        recipe: Options of the run, with its precision settled.
        source: The images.
        given: Names of options that must not change; None for all.
        can_chunk: See `MemoryModel`.
        budget: Seconds.

    Raises:
        UsageError, ValueError: options that are not valid, or a step that needs more memory than there is.
    """
    begin, num_processes = time.time(), int(os.environ.get("WORLD_SIZE", "1"))
    recipe, _ = settle_pixels(recipe, source)
    while True:
        options, chunk = recipe.optimization, recipe.hardware.gradient_cache_chunk_size
        batch = make_plan(recipe, source.num_samples, num_processes).global_batch_size
        try:
            seconds, preparation = timed_steps(recipe, source, begin, budget)
            return Trial(chunk, options.train_batch_size, seconds, preparation)
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        option = "gradient_cache_chunk_size" if can_chunk else "train_batch_size"
        own = (chunk or batch // num_processes) // 2 if can_chunk else batch // 2
        if given is None or option in given or own < (1 if can_chunk else 2 * num_processes):
            raise UsageError(
                f"a step with {batch // num_processes} images per process runs out of memory: pass a smaller"
                f" --{option}, --image_size or --size"
            )
        if can_chunk:
            recipe = replace(recipe, hardware=replace(recipe.hardware, gradient_cache_chunk_size=own))
        else:
            recipe = replace(recipe, optimization=replace(options, train_batch_size=own))


def timed_steps(recipe: Recipe, source: Any, begin: float, budget: float | None) -> tuple[float, float]:
    """Seconds of a step with its data loading, and seconds before the first one; one step without a budget."""
    rank, num_processes = (
        int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    device = own_device()
    plan = make_plan(recipe, source.num_samples, num_processes)
    model = build_model(recipe).to(device).train()
    settings = choose_settings(recipe, model, device)
    set_up(model, settings)
    optimizer = build_optimizer(recipe, model, plan)
    photometric = build_photometric(recipe, device)
    compile_augmentation(photometric, settings, device)
    alone = Alone(device, recipe.hardware.mixed_precision)
    workers = 0 if budget is None else None  # one step is not worth starting them
    hardware = recipe.hardware if workers is None else replace(recipe.hardware, dataloader_num_workers=workers)
    place: Any = SimpleNamespace(process_index=rank, num_processes=num_processes, device=device)
    with tempfile.TemporaryDirectory() as folder:
        trial = replace(recipe, hardware=hardware, run=replace(recipe.run, output_dir=folder))
        times = []
        loader = build_loader(trial, source, plan, place)
        shared = cores_shared_with(hardware.dataloader_num_workers or 0, num_processes)
        with closing(loader), shared:
            preparation = before = time.time()
            for batch in batches(loader, plan, 0):
                pixels, parameters = (batch[name].to(device) for name in ("pixels", "parameters"))
                views = photometric(pixels[0], parameters[0]), photometric(pixels[1], parameters[1])
                with alone.autocast():
                    output = train_step(
                        model,
                        optimizer,
                        views,
                        learning_rate=0.0,
                        ema_decay=recipe.optimization.ema_decay,
                        max_grad_norm=recipe.optimization.max_grad_norm,
                        accelerator=alone,  # type: ignore[arg-type]
                        gradient_cache_chunk_size=recipe.hardware.gradient_cache_chunk_size,
                    )
                output.loss.item()  # waits for the device
                times.append(time.time() - before)
                before = time.time()
                spent = before - preparation
                is_measured = len(times) >= WARM_UP_STEPS + FEWEST_STEPS and spent >= min(
                    MOST_SECONDS, (budget or 0) / 50
                )
                if budget is None or is_measured or spent > budget / 2:
                    break
    return statistics.fmean(times[WARM_UP_STEPS:] or times[-1:]), preparation - begin


class Alone:
    """What a step needs of accelerate, for a process that has not joined the others."""

    scaler = None

    def __init__(self, device: torch.device, mixed_precision: str):
        self.device, self.dtype = device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)

    def autocast(self) -> Any:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing is scaled: the weights of a trial are thrown away."""


def own_device() -> torch.device:
    """The device that accelerate gives to this process."""
    device = this_device()
    if device.type != "cuda":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def agreed(recipe: Recipe, trial: Trial) -> Trial:
    """The smallest batches and the slowest steps of all processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return trial
    build_accelerator(recipe)  # joins the others
    trials = gather_object([trial])
    chunks = [other.chunk_size for other in trials if other.chunk_size is not None]
    return Trial(
        min(chunks, default=None),
        min(other.batch_size for other in trials),
        max(other.seconds for other in trials),
        max(other.preparation for other in trials),
    )


def with_model(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Backbone, heads and image size of `--model`, where weights to start from are given, and the reason."""
    if not given.get("model"):
        return dict(given), {}
    config = load_own_config(given["model"])
    backbone = config.backbone_config
    own: dict[str, Any] = {name: getattr(config, name) for name in ("head_hidden_size", "projection_dim")}
    own["backbone_config"] = {"model_type": backbone.model_type}
    for name in ("hidden_size", "patch_size"):
        if isinstance(getattr(backbone, name, None), int):
            own["backbone_config"][name] = getattr(backbone, name)
    if isinstance(backbone, MoCoV3ViTConfig):
        for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size"):
            own["backbone_config"][name] = getattr(backbone, name)
        if backbone.mlp_norm != "layer_norm":  # which decides whether batches can be cut
            own["backbone_config"]["mlp_norm"] = backbone.mlp_norm
        own["image_size"] = to_pair(backbone.image_size)[0]
    return {**own, **given}, {name: f"that of {given['model']}" for name in own if name not in given}


# The table


def table(facts: Facts, choices: list[Choice]) -> str:
    """The plan for people: what was found, then a line per option with its reason."""
    shape = "grayscale" if facts.is_grayscale else f"{facts.num_channels} channels"
    classes = f", {facts.num_classes} class{'es' if facts.num_classes > 1 else ''}" if facts.num_classes else ""
    found = f"{facts.num_images:,} images of {facts.side} pixels, {shape}{classes}"
    machine = f"{facts.device} with {facts.memory_bytes / GIB:.3g} GiB, {facts.num_processes} process"
    machine += "es" if facts.num_processes > 1 else ""
    rows = [(choice.option, shown_value(choice.value), choice.reason) for choice in choices]
    option, value = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"  {row[0]:<{option}}  {row[1]:<{value}}  {row[2]}".rstrip() for row in rows]
    return "\n".join([f"plan for {found}, on {machine}:", *lines])


def shown_value(value: Any) -> str:
    if isinstance(value, dict):
        kind = value.get("model_type", "mocov3_vit")
        names = {"patch_size": "/", "hidden_size": " width ", "num_hidden_layers": " depth ", "depths": " depths "}
        return str(kind) + "".join(f"{text}{value[name]}" for name, text in names.items() if name in value)
    if isinstance(value, list):
        return " ".join(map(shown_value, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
