"""Peak memory and CPU time of the gradient cache, compared with the plain step.

    python benchmarks/memory.py [--batches 64 128 256 512] [--chunk_size 32] [--cost_batch 64] [--output FILE.json]

Peak memory: each point runs in a separate process. It is the peak resident size during one step, minus the resident
size before it, which already includes weights, gradients and optimizer state. `counted_gib` is a lower bound: the
views and the tensors that autograd must keep, counted on tensors without data. The curve of the plain step ends at the
first batch that would exceed --limit_gib. Cost: CPU time per image of both steps at one batch, alternating on one
core.

Quick test: --batches 4 8 --chunk_size 2 --cost_batch 4 --rounds 1. The last line is JSON with every measurement.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
from step import RECIPES, SIZE, OurStep, alternate, cpu_name, fresh_model, random_views, ratio, write

from mocov3_hf.pretraining.estimate import estimate
from mocov3_hf.pretraining.recipe import load_recipe


def build(kind: str, backbone: str, mixed_precision: str, chunk_size: int) -> OurStep:
    recipe_name = RECIPES[backbone]
    return OurStep(
        fresh_model(recipe_name),
        recipe_name,
        mixed_precision,
        "cpu",
        gradient_cache_chunk_size=chunk_size if kind == "cached" else None,
    )


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Peak:
    """The peak resident size within the block, sampled every few milliseconds."""

    def __enter__(self) -> "Peak":
        self.bytes, self.done = resident_bytes(), threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self) -> None:
        while not self.done.wait(0.005):
            self.bytes = max(self.bytes, resident_bytes())

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()


def measure_point(kind: str, backbone: str, mixed_precision: str, batch: int, chunk_size: int) -> dict:
    """Measure in this process: a step with two images creates the optimizer state, the next one is measured."""
    step = build(kind, backbone, mixed_precision, chunk_size)
    counted = estimate(
        step.model.config,
        SIZE,
        batch,
        load_recipe(RECIPES[backbone]).optimization.optimizer,
        mixed_precision,
        chunk_size if kind == "cached" else None,
        step.choice,
    )
    step(random_views(2, "cpu"), 0.99)
    before = resident_bytes()
    views = random_views(batch, "cpu")
    start = time.process_time()
    with Peak() as peak:
        step(views, 0.99)
    return {
        "batch": batch,
        "peak_gib": (peak.bytes - before) / 2**30,
        "counted_gib": (counted.activation_bytes + counted.view_bytes) / 2**30,
        "resident_before_gib": before / 2**30,
        "cpu_seconds_per_image": (time.process_time() - start) / batch,
    }


def in_own_process(kind: str, options: argparse.Namespace, batch: int) -> dict:
    command = [sys.executable, __file__, "--point", kind, "--batches", str(batch), "--backbone", options.backbone]
    command += ["--mixed_precision", options.mixed_precision, "--chunk_size", str(options.chunk_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    point = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind}, batch {batch}: {point['peak_gib']:.2f} GiB", file=sys.stderr, flush=True)
    return point


def curve(kind: str, options: argparse.Namespace) -> list[dict]:
    """Points in increasing order of batch size, up to the first that would exceed the memory limit."""
    points = []
    for batch in sorted(options.batches):
        if points:
            last = points[-1]
            growth = batch / last["batch"] if kind == "plain" else 1.2
            expected = last["resident_before_gib"] + last["peak_gib"] * growth
            if expected > options.limit_gib:
                print(f"{kind}: skipping batch {batch}, which needs about {expected:.0f} GiB", file=sys.stderr)
                break
        points.append(in_own_process(kind, options, batch))
    return points


def cost(options: argparse.Namespace) -> dict:
    """CPU time of the cached step, relative to the plain step."""
    views = random_views(options.cost_batch, "cpu")
    steps = {
        kind: build(kind, options.backbone, options.mixed_precision, options.chunk_size)
        for kind in ("plain", "cached")
    }
    seconds = alternate(steps, views, options.rounds, "cost")
    return {
        "batch": options.cost_batch,
        "cpu_seconds": seconds,
        "cpu_seconds_per_image": {
            kind: statistics.median(values) / options.cost_batch for kind, values in seconds.items()
        },
        "cached_over_plain": ratio(seconds, "cached", "plain"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=["vit_small", "vit_base"], default="vit_small")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--chunk_size", type=int, default=32)
    parser.add_argument("--cost_batch", type=int, default=64, help="batch size at which both steps are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit_gib", type=float, default=16.0, help="maximum memory of a point")
    parser.add_argument("--output", help="file to which the JSON is written as well")
    parser.add_argument("--point", choices=["plain", "cached"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.point is not None:
        batch = options.batches[0]
        point = measure_point(options.point, options.backbone, options.mixed_precision, batch, options.chunk_size)
        print(json.dumps(point))
        return

    result = {
        "device": f"one core of {cpu_name()}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "backbone": options.backbone,
        "mixed_precision": options.mixed_precision,
        "chunk_size": options.chunk_size,
    }
    parts = {"cached": partial(curve, "cached"), "cost": cost, "plain": partial(curve, "plain")}
    for name, measure in parts.items():
        result[name] = measure(options)
        if options.output:
            write(result, options.output)
    cached = result["cached"]
    print(
        f"gradient cache: {cached[0]['peak_gib']:.2f} GiB at batch {cached[0]['batch']},"
        f" {cached[-1]['peak_gib']:.2f} GiB at {cached[-1]['batch']};"
        f" {result['cost']['cached_over_plain']['median']:.2f} times the CPU time of the plain step"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
