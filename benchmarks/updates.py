"""Speed of the EMA, AdamW and LARS steps, compared with loops over parameters and with memory bandwidth.

    python benchmarks/updates.py [--device cuda] [--rounds 7] [--output FILE.json]

These steps compute little: each reads and writes every weight and its state, so memory bandwidth is the limit (an
in-place sum of large tensors, limits.py). `bytes` is the least that must move. EMA: the average and its source are
read and the average is written (3 numbers per weight). AdamW: weight, gradient and two moments are read and all but
the gradient written (7). LARS: weight, gradient and momentum are read and two of them written (5; the norms need a
further pass). Ours, the plain loop of plain_step.py and the sum alternate; ratios are taken within a round. The last
line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable

import torch
from limits import Sum, clock, cpu_name
from plain_step import PlainLARS
from step import EMA_DECAY, RECIPES, fresh_model, write

from mocov3_hf.pretraining.build import build_optimizer
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.recipe import load_recipe


BYTES_FLOAT32 = 4
NUMBERS_MOVED = {"EMA": 3, "AdamW": 7, "LARS": 5}
BACKBONES = {"EMA": "vit_small", "AdamW": "vit_small", "LARS": "resnet50"}
# Steps per measurement; one takes 20 to 200 ms on a CPU.
REPEATS = 3


@torch.no_grad()
def plain_average(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The loop of plain_step.py and of the official code."""
    for average, parameter in pairs:
        average.data = average.data * EMA_DECAY + parameter.data * (1 - EMA_DECAY)


def candidates(name: str, device: str) -> tuple[dict[str, Callable], int]:
    """Ours and the plain loop, each on its own model, and the number of weights."""
    recipe_name = RECIPES[BACKBONES[name]]
    recipe, models = load_recipe(recipe_name), [fresh_model(recipe_name).to(device) for _ in range(2)]
    if name == "EMA":
        pairs = models[1].momentum_pairs()
        runs = {"ours": lambda: models[0].update_momentum_encoder(EMA_DECAY), "plain": lambda: plain_average(pairs)}
        return runs, sum(average.numel() for average, _ in pairs)
    for model in models:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    ours = build_optimizer(recipe, models[0], make_plan(recipe, recipe.data.num_train_images, 1))
    if name == "LARS":
        plain = PlainLARS(trained, ours.defaults["lr"], 1e-6)
    else:
        plain = torch.optim.AdamW(trained, ours.defaults["lr"], weight_decay=0.1)
    return {"ours": ours.step, "plain": plain.step}, sum(parameter.numel() for parameter in trained)


def measure(name: str, device: str, rounds: int) -> dict:
    """Seconds per step of ours, of the plain loop and of the sum. They alternate; the first round is a warm-up."""
    runs, num_weights = candidates(name, device)
    limit = Sum(device)
    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "limit": []}
    for index in range(rounds + 1):
        for which in seconds if index % 2 else reversed(seconds):
            run = limit if which == "limit" else runs[which]
            taken = clock(lambda run=run: [run() for _ in range(REPEATS)], device) / REPEATS
            if index:
                seconds[which].append(taken)
        print(f"{name}: round {index}/{rounds}", file=sys.stderr, flush=True)
    return {
        "update": name,
        "backbone": BACKBONES[name],
        "weights": num_weights,
        "bytes": NUMBERS_MOVED[name] * BYTES_FLOAT32 * num_weights,
        "limit_bytes": limit.bytes,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"one core of {cpu_name()}",
        "cores": os.cpu_count(),
        "points": [measure(name, options.device, options.rounds) for name in NUMBERS_MOVED],
    }
    for point in result["points"]:
        seconds = point["seconds"]
        times = statistics.median(a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True))
        rate = point["bytes"] / statistics.median(seconds["ours"]) / 1e9
        limit = point["limit_bytes"] / statistics.median(seconds["limit"]) / 1e9
        print(f"{point['update']}: {times:.2f}× the plain loop, {rate:.1f} GB/s; in-place sum {limit:.1f} GB/s")
    if options.output:
        write(result, options.output)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
