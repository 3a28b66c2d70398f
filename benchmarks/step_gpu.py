"""Throughput of a pre-training step on a GPU, compared with the plain step (plain_step.py) and the hardware limit.

    python benchmarks/step_gpu.py [--backbones vit_small vit_base resnet50] [--data FOLDER] [--profile] [--output FILE]
    python benchmarks/step_gpu.py --variants plain ours compiled compiled,deterministic=false

All variants of a backbone run in one process, with the same initial weights and views, under bf16 autocast. Their
first losses are printed for comparison. The variants alternate round by round, together with a matrix product or
convolution (limits.py); the device is synchronized around every measurement. A variant is `plain`, `ours` (the
settings of a normal run) or `compiled` (with --torch_compile), followed by changed fields of `HardwareSettings`,
separated by commas.

Two utilizations are reported for each variant. MFU, as usual in the field: the model's operations as published (two
views; forward and backward through the encoder, forward through the momentum encoder), divided by the peak rate of the
data sheet. Fraction of the limit: the operations that are really computed, divided by the rate of the bounding
operation in the same run.

--data also trains on photographs through the loader and the augmentation, alternating with views that are already in
GPU memory. --profile profiles the last variant. The last line is JSON with every measurement.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import repeat
from pathlib import Path

import torch
from limits import cpu_name, step_flop_per_image
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
from torch.profiler import ProfilerActivity, profile

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.pretraining.build import build_loader, build_source
from mocov3_hf.pretraining.estimate import multiply_adds
from mocov3_hf.pretraining.hardware import HardwareSettings, choose_algorithms, compile_augmentation
from mocov3_hf.pretraining.pixels import build_photometric
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.recipe import load_recipe


# The script also runs without a GPU, for testing only.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = "bf16"
BATCHES = {"vit_small": 256, "vit_base": 256, "resnet50": 256}
# Dense bf16 tensor-core peak in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.2}
# Kind of a kernel, by the first of these words that its name contains.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "dot_do_o", "convert_dq"),
    "convolutions": ("conv", "cudnn", "implicit", "wgrad", "dgrad", "fprop", "nhwc"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "fused by the compiler": ("triton",),
    "optimizer and EMA": ("multi_tensor", "foreach", "fusedadam", "adam"),
    "copies": ("memcpy", "memset", "copy"),
    "batch norm": ("batch_norm", "bn_"),
    "layer norm": ("layer_norm", "layernorm"),
    "elementwise": ("elementwise", "reduce", "softmax", "cat"),
}


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


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class PeakMemory:
    """`with PeakMemory() as memory`: afterwards `memory.gib` is the peak allocation beyond that at entry."""

    def __enter__(self):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_):
        self.gib = (torch.cuda.max_memory_allocated() - self.before) / 2**30 if DEVICE == "cuda" else 0.0


def images_per_second(step: Callable, views: Iterator, steps: int, batch: int) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step(next(views))
    wait()
    return steps * batch / (time.perf_counter() - start)


def measure(backbone: str, options: argparse.Namespace) -> dict:
    """Measure all variants of one backbone."""
    batch = options.batch or BATCHES[backbone]
    views = random_views(batch, DEVICE)
    limit = limit_of(backbone, PRECISION, DEVICE)
    model = fresh_model(RECIPES[backbone])
    variants, rates, memory = [], {}, {}
    for name in options.variants:
        with PeakMemory() as used:
            variants.append(Variant(name, backbone, model, views))
        memory[name] = used.gib
        rates[name] = []
        first = variants[-1]
        print(f"{backbone} {name}: first loss {first.first_loss:.4f} after {first.first_seconds:.0f} s", flush=True)
    rates["limit"] = []
    for index in range(options.rounds):
        for variant in variants if index % 2 == 0 else variants[::-1]:
            rates[variant.name].append(variant.rate(options.steps))
            rates["limit"].append(limit_rate(limit))
        show = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items() if name != "limit")
        print(f"{backbone}: round {index + 1}/{options.rounds}, images/s: {show}", flush=True)
    limit_rates = rates.pop("limit")
    flops = model_flops(model.config)
    point = {
        "backbone": backbone,
        "mixed_precision": PRECISION,
        "batch": batch,
        **flops,
        "limit": {"operation": type(limit).__name__, "tflops": limit_rates},
        "variants": {},
    }
    peak = peak_tflops()
    for variant in variants:
        rate = statistics.median(rates[variant.name])
        computed = flops["flop_per_image"]["ours" if is_shortened(variant) else "plain"]
        point["variants"][variant.name] = {
            "images_per_second": rates[variant.name],
            "median": rate,
            "mfu": rate * flops["published_flop_per_image"] / (peak * 1e12) if peak else None,
            "of_limit": rate * computed / 1e12 / statistics.median(limit_rates),
            "peak_memory_gib": memory[variant.name],
            "first_loss": variant.first_loss,
            "first_step_seconds": variant.first_seconds,
            "acceleration": variant.choice.describe() if variant.choice is not None else None,
        }
        if "plain" in rates and variant.name != "plain":
            inverse = {name: [1 / value for value in rates[name]] for name in ("plain", variant.name)}
            point["variants"][variant.name]["speedup"] = ratio(inverse, "plain", variant.name)
    last = variants[-1]
    del variants
    last.choose_algorithms()
    if options.profile:
        point["profile"] = {"variant": last.name, **where_time_goes(last)}
    if options.data is not None and isinstance(last.take, OurStep):
        point["data"] = {"variant": last.name, **with_data(last, backbone, batch, options)}
    return point


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


def where_time_goes(step: Variant, steps: int = 3) -> dict:
    """Profile: share of the time in which the device is busy, shares by kind of kernel, and the longest kernels."""
    for _ in range(2):
        step()
    wait()
    activity = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        wall = time.perf_counter() - start
    kernels = {
        event.key: getattr(event, f"self_{'device' if DEVICE == 'cuda' else 'cpu'}_time_total") / 1e6
        for event in profiler.key_averages()
    }
    busy = sum(kernels.values())
    kinds: dict[str, float] = {}
    for name, seconds in kernels.items():
        kind = kind_of(name)
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:25]
    result = {
        "seconds_per_step": wall / steps,
        "busy": busy / wall,
        "shares_of_busy": {kind: seconds / busy for kind, seconds in sorted(kinds.items(), key=lambda item: -item[1])},
        "longest_ms_per_step": {name[:120]: 1e3 * seconds / steps for name, seconds in longest},
    }
    print(f"profile of {step.name}: busy {result['busy']:.2f}, " + str(result["shares_of_busy"]), flush=True)
    return result


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def with_data(step: Variant, backbone: str, batch: int, options: argparse.Namespace) -> dict:
    """Images per second on photographs from disk and on views in memory, and of loader and augmentation alone."""
    loader = real_batches(step, backbone, batch, options.data)
    augment = augmentation(step, backbone)
    crops = next(loader)
    augment(crops)  # compiles on the first call
    alone = images_per_second(lambda _: augment(crops), repeat(None), options.steps, batch)
    views = map(augment, loader)
    for _ in range(2 * (os.cpu_count() or 1) + 3):  # consume what the loader has prefetched
        step(next(views))
    rates: dict[str, list[float]] = {"data": [], "ready": []}
    for _ in range(options.rounds):
        rates["ready"].append(step.rate(options.steps))
        while_waiting = 2 * (os.cpu_count() or 1)
        for _ in range(while_waiting):
            step(next(views))
        rates["data"].append(images_per_second(step, views, 2 * options.steps, batch))
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


def real_batches(step: Variant, backbone: str, batch: int, data: str) -> Iterator[dict]:
    """Crops of the images in a folder, epoch after epoch, from the loader that a run uses."""
    options = ["--dataset_name", data, "--per_device_train_batch_size", str(batch), "--output_dir", "runs"]
    recipe = load_recipe(RECIPES[backbone], options)
    source = build_source(recipe)
    loader = build_loader(recipe, source, make_plan(recipe, source.num_samples, 1), step.take.accelerator)
    epoch = 0
    while True:
        yield from loader.epoch(epoch, 0)
        epoch += 1


def augmentation(step: Variant, backbone: str) -> Callable[[dict], tuple[torch.Tensor, torch.Tensor]]:
    """The augmentation that turns a batch of the loader into views, as in a run."""
    device = step.take.accelerator.device
    stage = build_photometric(load_recipe(RECIPES[backbone]), device)
    compile_augmentation(stage, step.choice, device)

    def augment(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, parameters = (batch[name].to(device, non_blocking=True) for name in ("pixels", "parameters"))
        return stage(pixels[0], parameters[0]), stage(pixels[1], parameters[1])

    return augment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--variants", nargs="+", default=["plain", "ours", "compiled"])
    parser.add_argument("--batch", type=int, help="images per step; default 256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps per measurement")
    parser.add_argument("--data", help="folder of images to train on")
    parser.add_argument("--profile", action="store_true", help="profile the last variant")
    parser.add_argument("--try_on_cpu", action="store_true", help="run without a GPU, to test the script")
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.try_on_cpu:
        parser.error("no CUDA device found: pass --try_on_cpu to test the script without one")
    torch._dynamo.config.recompile_limit = 64  # many models share the same code
    result = {
        "device": device_name(),
        "cpu": f"{os.cpu_count()} cores of {cpu_name()}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "points": [],
    }
    for backbone in options.backbones:
        result["points"].append(measure(backbone, options))
        torch._dynamo.reset()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        show(result["points"][-1])
        if options.output:
            Path(options.output).parent.mkdir(parents=True, exist_ok=True)
            write(result, options.output)
    print(json.dumps(result))


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
