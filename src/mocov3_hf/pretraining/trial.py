"""Trial steps before a run: how long one takes, and whether it fits into memory."""

import dataclasses
import tempfile
import time

from accelerate.utils import gather_object

from ..data.sources import MapSource, StreamSource
from ..precision import this_device
from .build import build_accelerator, build_loader, build_model, build_optimizer, check_model
from .gradient_cache import check_chunkable
from .hardware import choose_settings, set_up, settle_precision
from .pixels import build_photometric, settle_pixels
from .plan import batches, learning_rate_at, make_plan
from .recipe import Recipe
from .step import seed_step, train_step


WARMUP_STEPS = 2  # before the clock runs


def seconds_per_step(
    recipe: Recipe, source: MapSource | StreamSource, most_steps: int, most_seconds: float
) -> tuple[float, float]:
    """
    Seconds of a training step, of the slowest process, and of the start, from real steps on real images. Nothing is
    kept.

    Raises:
        UsageError, ValueError: a recipe that cannot be run.
        torch.OutOfMemoryError: a step does not fit.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, output_dir=folder))
        recipe, _ = settle_precision(recipe, this_device())
        accelerator = build_accelerator(recipe)
        check_model(recipe)
        recipe, _ = settle_pixels(recipe, source)
        plan = make_plan(recipe, source.num_samples, accelerator.num_processes)
        model = build_model(recipe)
        set_up(model, choose_settings(recipe, model, accelerator.device))
        if recipe.hardware.gradient_cache_chunk_size is not None:
            check_chunkable(model)
        model, optimizer = accelerator.prepare(model, build_optimizer(recipe, model, plan))
        photometric = build_photometric(recipe, accelerator.device)
        model.train()
        loader = build_loader(recipe, source, plan, accelerator)
        times: list[float] = []
        number = min(WARMUP_STEPS + most_steps, plan.total_steps)
        try:
            last = startup = time.monotonic()
            for step, batch in zip(range(number), batches(loader, plan, 0), strict=False):
                pixels, parameters = (batch[name].to(accelerator.device) for name in ("pixels", "parameters"))
                views = tuple(photometric(pixels[view], parameters[view]) for view in range(2))
                seed_step(recipe.run.seed, step, accelerator.process_index)
                output = train_step(
                    model,
                    optimizer,
                    views,
                    learning_rate=learning_rate_at(step, plan),
                    ema_decay=recipe.optimization.ema_decay,
                    max_grad_norm=recipe.optimization.max_grad_norm,
                    accelerator=accelerator,
                    gradient_cache_chunk_size=recipe.hardware.gradient_cache_chunk_size,
                )
                float(output.loss)  # waits for the device
                now = time.monotonic()
                times.append(now - last)
                last = now
                # Together: a process that stopped alone would leave the others in a collective operation.
                if step >= WARMUP_STEPS and max(gather_object([now - startup])) > most_seconds:
                    break
        finally:
            loader.close()
    timed = times[WARMUP_STEPS:] or times
    return max(gather_object([sum(timed) / len(timed)])), max(gather_object([startup - start]))
