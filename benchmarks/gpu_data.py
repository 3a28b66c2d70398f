"""A training step on photographs from disk, next to views that are already in memory (step_gpu.py --data)."""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch
from step import RECIPES

from mocov3_hf.pretraining.build import build_loader, build_source
from mocov3_hf.pretraining.candidates import one_batch_ahead
from mocov3_hf.pretraining.hardware import compile_augmentation
from mocov3_hf.pretraining.pixels import build_photometric
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.recipe import load_recipe


# step_gpu.py also runs without a GPU, for testing only.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def images_per_second(step: Callable, views: Iterator, steps: int, batch: int) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step(next(views))
    wait()
    return steps * batch / (time.perf_counter() - start)


def with_data(step: Any, backbone: str, batch: int, options: argparse.Namespace) -> dict:
    """Images per second on photographs from disk and on views in memory, and of loader and augmentation alone."""
    loader = real_batches(step, backbone, batch, options.data)
    augment = augmentation(step, backbone)
    crops = next(loader)
    augment(crops)  # compiles on the first call
    alone = images_per_second(lambda _: augment(crops), repeat(None), options.steps, batch)
    views = {"data": map(augment, loader)}
    if step.choice.prefetch_views:
        views = {"data": one_batch_ahead(augment, loader, step.take.accelerator.device), "one_by_one": views["data"]}
    rates: dict[str, list[float]] = {"ready": [], **{how: [] for how in views}}
    for _ in range(options.rounds):
        rates["ready"].append(step.rate(options.steps))
        for how, augmented in views.items():
            for _ in range(2 * (os.cpu_count() or 1) + 3):  # consume what the loader has prefetched
                step(next(augmented))
            rates[how].append(images_per_second(step, augmented, 2 * options.steps, batch))
    loaded = images_per_second(lambda _: None, loader, 4 * (os.cpu_count() or 1), batch)
    slower = 1 - statistics.median(rates["data"]) / statistics.median(rates["ready"])
    result = {
        "images_per_second": rates,
        "slower_than_ready": slower,
        "augmentation_alone": alone,
        "loader_alone": loaded,
        "workers": os.cpu_count(),
    }
    print(f"{backbone} with photographs: {result}", flush=True)
    return result


def real_batches(step: Any, backbone: str, batch: int, data: str) -> Iterator[dict]:
    """Crops of the images in a folder, epoch after epoch, from the loader that a run uses."""
    options = ["--dataset_name", data, "--per_device_train_batch_size", str(batch), "--output_dir", "runs"]
    recipe = load_recipe(RECIPES[backbone], options)
    source = build_source(recipe)
    loader = build_loader(recipe, source, make_plan(recipe, source.num_samples, 1), step.take.accelerator)
    epoch = 0
    while True:
        yield from loader.epoch(epoch, 0)
        epoch += 1


def augmentation(step: Any, backbone: str) -> Callable[[dict], tuple[torch.Tensor, torch.Tensor]]:
    """The augmentation that turns a batch of the loader into views, as in a run."""
    device = step.take.accelerator.device
    stage = build_photometric(load_recipe(RECIPES[backbone]), device)
    compile_augmentation(stage, step.choice, device)

    def augment(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, parameters = (batch[name].to(device, non_blocking=True) for name in ("pixels", "parameters"))
        return stage(pixels[0], parameters[0]), stage(pixels[1], parameters[1])

    return augment
