"""Throughput of a pre-training step on a GPU, compared with the plain step (plain_step.py) and the hardware limit.

    python benchmarks/step_gpu.py [--backbones vit_small vit_base resnet50] [--data FOLDER] [--profile] [--output FILE]
    python benchmarks/step_gpu.py --variants plain ours compiled compiled,deterministic=false

All variants of a backbone run in one process, with the same initial weights and views, under bf16 autocast. Their
first losses are printed for comparison. The variants alternate round by round, together with a matrix product or
convolution (limits.py); the device is synchronized around every measurement. A variant is `plain`, `ours` (the
settings of a normal run) or `compiled` (with --torch_compile), followed by changed fields of `HardwareSettings`,
separated by commas. A variant that fails is noted under `failed`, and the others go on.

Two utilizations are reported for each variant. MFU, as usual in the field: the model's operations as published (two
views; forward and backward through the encoder, forward through the momentum encoder), divided by the peak rate of the
data sheet. Fraction of the limit: the operations that are really computed, divided by the rate of the bounding
operation in the same run.

--data also trains on photographs through the loader and the augmentation, alternating with views that are already in
GPU memory and, with prefetch_views=true, with views that are not made one batch ahead. --profile profiles the last
variant. The last line is JSON with every measurement.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from itertools import repeat

import torch
from gpu_data import DEVICE, images_per_second, wait, with_data
from gpu_profile import where_time_goes
from limits import REHEARSAL, cpu_name, step_flop_per_image
from plain_step import PlainStep
from step import (
    EMA_DECAY,
    LEARNING_RATE,
    RECIPES,
    SIZE,
    OurStep,
    fresh_model,
    limit_of,
    random_views,
    ratio,
    write,
)

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.pretraining.estimate import estimate, multiply_adds
from mocov3_hf.pretraining.hardware import (
    HardwareSettings,
    choose_algorithms,
    choose_settings,
)
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.reporting import one_line


PRECISION = "bf16"
BATCHES = {"vit_small": 256, "vit_base": 256, "resnet50": 256}
# Dense bf16 tensor-core peak in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.2}


class Variant:
    """One variant of the step: `step()` uses views in memory, `step(views)` the given ones."""

    def __init__(
        self, name: str, backbone: str, model: MoCoV3ForPreTraining, views: tuple[torch.Tensor, torch.Tensor]
    ):
        kind, *changes = name.split(",")
        self.name, self.views, self.deterministic = name, views, False
        self.is_vit = model.config.backbone_config.model_type == "mocov3_vit"
        recipe_name = RECIPES[backbone]
        optimizer = load_recipe(recipe_name).optimization.optimizer
        if kind == "plain":
            self.take = PlainStep(model, optimizer, LEARNING_RATE[optimizer], PRECISION, DEVICE)
            self.choice = None
        else:
            overrides = {"torch_compile": kind == "compiled", **dict(parse_change(change) for change in changes)}
            self.take = OurStep(copy.deepcopy(model), recipe_name, PRECISION, DEVICE, overrides)
            self.choice = self.take.choice
            self.deterministic = self.choice.deterministic
        started = time.perf_counter()
        self.choose_algorithms()
        self.first_loss = self.take(views, EMA_DECAY).item()
        self.first_seconds = time.perf_counter() - started  # includes compilation

    def __call__(self, views: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        return self.take(self.views if views is None else views, EMA_DECAY)

    def choose_algorithms(self) -> None:
        """Set the algorithms of this variant again before each turn, since they are a setting of the process."""
        choose_algorithms(self.deterministic, strictly=self.is_vit)

    def rate(self, steps: int) -> float:
        """Images per second over `steps` steps, after three warm-up steps."""
        self.choose_algorithms()
        for _ in range(3):
            self()
        return images_per_second(self, repeat(None), steps, len(self.views[0]))


def parse_change(text: str) -> tuple[str, object]:
    """Parse `deterministic=false` into a field of `HardwareSettings` and its value."""
    name, _, value = text.partition("=")
    if name not in {field.name for field in fields(HardwareSettings)}:
        raise SystemExit(f"error: --variants: {name!r} is not a field of HardwareSettings")
    return name, {"true": True, "false": False}.get(value, value)


class PeakMemory:
    """`with PeakMemory() as memory`: afterwards `memory.gib` is the peak allocation beyond that at entry."""

    def __enter__(self):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_):
        self.gib = (torch.cuda.max_memory_allocated() - self.before) / 2**30 if DEVICE == "cuda" else 0.0


class Measurement:
    """The variants of one backbone, measured in turn. What fails is noted, and the others go on."""

    def __init__(self, backbone: str, batch: int):
        self.backbone, self.batch, self.views = backbone, batch, random_views(batch, DEVICE)
        self.limit, self.limit_rates = limit_of(backbone, PRECISION, DEVICE), []
        self.model = fresh_model(RECIPES[backbone])
        self.flops = model_flops(self.model.config)
        self.variants: dict[str, Variant] = {}
        self.memory: dict[str, float] = {}
        self.rates: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}

    def add(self, name: str) -> None:
        try:
            with PeakMemory() as used:
                variant = Variant(name, self.backbone, self.model, self.views)
                for _ in range(2 if DEVICE == "cuda" else 0):  # CUDA graphs are recorded after the first step
                    variant()
        except Exception as error:
            self.note_failure(name, error)
            return
        self.variants[name], self.memory[name], self.rates[name] = variant, used.gib, []
        seconds = variant.first_seconds
        print(f"{self.backbone} {name}: first loss {variant.first_loss:.4f} after {seconds:.0f} s", flush=True)

    def turn(self, name: str, steps: int) -> None:
        if name in self.failed:
            return
        try:
            self.rates[name].append(self.variants[name].rate(steps))
            self.limit_rates.append(limit_rate(self.limit))
        except Exception as error:
            self.note_failure(name, error)

    def note_failure(self, name: str, error: Exception) -> None:
        self.failed[name] = f"{type(error).__name__}: {one_line(error)}"[:500]
        print(f"{self.backbone} {name} failed: {self.failed[name]}", file=sys.stderr, flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    def point(self) -> dict:
        """What has been measured so far."""
        measured = {name: self.numbers(variant) for name, variant in self.variants.items() if self.rates[name]}
        return {
            "backbone": self.backbone,
            "mixed_precision": PRECISION,
            "batch": self.batch,
            **self.flops,
            "limit": {"operation": type(self.limit).__name__, "tflops": self.limit_rates},
            "variants": measured if self.limit_rates else {},
            "failed": self.failed,
        }

    def numbers(self, variant: Variant) -> dict:
        rates, plain, peak = self.rates[variant.name], self.rates.get("plain"), peak_tflops()
        rate = statistics.median(rates)
        computed = self.flops["flop_per_image"]["ours" if is_shortened(variant) else "plain"]
        numbers = {
            "images_per_second": rates,
            "median": rate,
            "mfu": rate * self.flops["published_flop_per_image"] / (peak * 1e12) if peak else None,
            "of_limit": rate * computed / 1e12 / statistics.median(self.limit_rates or [math.nan]),
            "peak_memory_gib": self.memory[variant.name],
            "first_loss": variant.first_loss,
            "first_step_seconds": variant.first_seconds,
            "acceleration": variant.choice.describe() if variant.choice is not None else None,
        }
        if plain and variant.name != "plain":
            rounds = min(len(rates), len(plain))  # until one of them failed
            seconds = {"plain": [1 / r for r in plain[:rounds]], "ours": [1 / r for r in rates[:rounds]]}
            numbers["speedup"] = ratio(seconds, "plain", "ours")
        return numbers


def measure(backbone: str, options: argparse.Namespace, end: float, record: Callable[[dict], None]) -> dict:
    """Measure the variants of one backbone that can be set up before `end`; `record` gets the results so far."""
    batch = largest_batch(backbone) if options.batch == "largest" else int(options.batch or BATCHES[backbone])
    measurement = Measurement(backbone, batch)
    for name in options.variants:
        if time.perf_counter() > end:
            measurement.failed[name] = f"not tried: {options.seconds:g} s were over"
            continue
        measurement.add(name)
        measurement.turn(name, options.steps)
        record(measurement.point())
    variants, rates = measurement.variants, measurement.rates
    for index in range(1, options.rounds):
        for name in list(variants)[::-1] if index % 2 else list(variants):
            measurement.turn(name, options.steps)
        show = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items() if values)
        print(f"{backbone}: round {index + 1}/{options.rounds}, images/s: {show}", flush=True)
        record(measurement.point())
    point = measurement.point()
    last = variants.get(options.variants[-1])
    variants.clear()
    if last is None or last.name in point["failed"]:
        return point
    last.choose_algorithms()
    if options.profile:
        point["profile"] = {"variant": last.name, **where_time_goes(last.name, last, DEVICE)}
    if options.data is not None and isinstance(last.take, OurStep):
        point["data"] = {"variant": last.name, **with_data(last, backbone, batch, options)}
    return point


def largest_batch(backbone: str) -> int:
    """The multiple of 64 images of which a step, as estimated for what autograd saves, takes 85 % of the memory."""
    if DEVICE == "cpu":
        return 8
    recipe = load_recipe(RECIPES[backbone])
    model = fresh_model(RECIPES[backbone])
    settings = choose_settings(recipe, model, torch.device(DEVICE))
    found = estimate(model.config, SIZE, 64, recipe.optimization.optimizer, PRECISION, settings=settings)
    free = 0.85 * torch.cuda.get_device_properties(0).total_memory - found.weight_bytes
    return max(1, int(free / (found.memory_bytes - found.weight_bytes))) * 64


def is_shortened(variant: Variant) -> bool:
    return variant.choice is not None and variant.is_vit


def limit_rate(limit: Callable) -> float:
    """Rate of the bounding operation in TFLOP/s."""
    limit()
    wait()
    start = time.perf_counter()
    limit()
    wait()
    return limit.flop / (time.perf_counter() - start) / 1e12


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name()


def peak_tflops() -> float | None:
    name = device_name()
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def model_flops(config: MoCoV3Config) -> dict:
    """FLOPs per image of a step: as published, and as computed with and without the shortened last block."""
    with torch.device("meta"):
        encoder = MoCoV3ForPreTraining(config).mocov3
        macs = multiply_adds(encoder, torch.empty(1, 3, SIZE, SIZE))
    return {
        "published_flop_per_image": 2 * macs * 2 * (3 + 1),
        "flop_per_image": {
            "plain": step_flop_per_image(config, SIZE, False),
            "ours": step_flop_per_image(config, SIZE, config.backbone_config.model_type == "mocov3_vit"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--variants", nargs="+", default=["plain", "ours", "compiled"])
    parser.add_argument("--batch", help="images per step, or `largest` for what fits; default 256")
    parser.add_argument("--seconds", type=float, help="after which no further variant is tried")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps per measurement")
    parser.add_argument("--data", help="folder of images to train on")
    parser.add_argument("--profile", action="store_true", help="profile the last variant")
    parser.add_argument("--try_on_cpu", action="store_true", help="run without a GPU, to test the script")
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    for name in options.variants:
        list(map(parse_change, name.split(",")[1:]))  # refuses a wrong one before the first is measured
    end = math.inf if options.seconds is None else time.perf_counter() + options.seconds
    if DEVICE == "cpu" and not options.try_on_cpu:
        parser.error("no CUDA device found: pass --try_on_cpu to test the script without one")
    torch._dynamo.config.recompile_limit = 64  # many models share the same code
    if REHEARSAL:
        torch.compiler.set_stance("force_eager")  # what is to be compiled runs without
    result = {
        "device": device_name(),
        "cpu": f"{os.cpu_count()} cores of {cpu_name()}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "points": [],
    }
    done: list[dict] = []

    def record(point: dict) -> None:
        result["points"] = [*done, point]
        if options.output:
            write(result, options.output)

    for backbone in options.backbones:
        done.append(measure(backbone, options, end, record))
        torch._dynamo.reset()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        show(done[-1])
        result["points"] = done
        if options.output:
            write(result, options.output)
    print(json.dumps(result))
    if not all(point["variants"] for point in result["points"]):
        sys.exit("error: no variant could be measured")


def show(point: dict) -> None:
    for name, variant in point["variants"].items():
        times = f"{variant['speedup']['median']:.2f}× plain, " if "speedup" in variant else ""
        mfu = f"MFU {variant['mfu']:.3f}, " if variant["mfu"] is not None else ""
        print(
            f"{point['backbone']} {name} (batch {point['batch']}): {variant['median']:.0f} images/s, {times}{mfu}"
            f"{variant['of_limit']:.2f} of the limit, {variant['peak_memory_gib']:.1f} GiB, first step"
            f" {variant['first_step_seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
