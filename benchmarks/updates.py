"""What moves the weights, against the speed of memory: moving average, AdamW and LARS, beside loops over parameters.

    python benchmarks/updates.py [--device cuda] [--rounds 7] [--output FILE.json]

None of them computes much: each must read and write every weight and its state, so that adding large tensors in place
(limits.py) bounds it. `bytes` is what must move at least: the average and its source are read and the average written
(3 numbers for each weight); AdamW reads weight, gradient and two moments and writes all but the gradient (7); LARS
reads weight, gradient and momentum and writes two of them (5; its norms, which need a pass of their own, are extra).
Ours, the plain loop of plain_step.py and the sum take turns; ratios are of neighbouring rounds. The last line is JSON.
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
from step import MOMENTUM, RECIPES, fresh_model, write

from mocov3_hf.pretraining.build import build_optimizer
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.recipe import load_recipe


BYTES_FLOAT32 = 4
NUMBERS_MOVED = {"moving average": 3, "AdamW": 7, "LARS": 5}
BACKBONES = {"moving average": "vit_small", "AdamW": "vit_small", "LARS": "resnet50"}
# Updates in a measured turn, of 20 to 200 ms each on a CPU.
REPEATS = 3


@torch.no_grad()
def plain_average(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """As plain_step.py and the official code write it."""
    for average, parameter in pairs:
        average.data = average.data * MOMENTUM + parameter.data * (1 - MOMENTUM)


def candidates(name: str, device: str) -> tuple[dict[str, Callable], int]:
    """Ours and the plain loop, each on a model of its own, and the weights that one update moves."""
    recipe_name = RECIPES[BACKBONES[name]]
    recipe, models = load_recipe(recipe_name), [fresh_model(recipe_name).to(device) for _ in range(2)]
    if name == "moving average":
        pairs = models[1].momentum_pairs()
        runs = {"ours": lambda: models[0].update_momentum_encoder(MOMENTUM), "plain": lambda: plain_average(pairs)}
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
    """Seconds of one update for ours and the plain loop, and of one sum, in turns; a first round warms up."""
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
    parser.add_argument("--output", help="write the JSON here as well")
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
        print(f"{point['update']}: {times:.2f} times the plain loop, {rate:.1f} GB/s; a sum in place {limit:.1f} GB/s")
    if options.output:
        write(result, options.output)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
