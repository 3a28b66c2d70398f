"""Speed of a pre-training step on a CPU, compared with an unoptimized step (plain_step.py).

    python benchmarks/step.py [--backbones vit_small resnet50] [--precisions no bf16] [--switches] [--output FILE.json]

One core, CPU time; step_gpu.py measures a GPU. Each step runs in a separate process, because ours changes the memory
management of its process. Both start from the same weights and views, must agree on the first loss, and alternate with
the operation that bounds them (limits.py). Reported are medians over the rounds, and medians of the ratios within a
round. --switches also toggles each field of `HardwareSettings` on its own.

Quick test: --backbones vit_small --precisions no --batch 4 --rounds 1. The last line is JSON with every measurement.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from limits import REHEARSAL, Convolution, Gemm, cpu_name, step_flop_per_image
from plain_step import PlainStep

from mocov3_hf import MoCoV3ForPreTraining
from mocov3_hf.pretraining.build import build_config, build_model, build_optimizer
from mocov3_hf.pretraining.hardware import HardwareSettings, choose_settings, set_up
from mocov3_hf.pretraining.instability import GradientWatch
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.pretraining.step import train_step


SIZE = 32 if REHEARSAL else 224
EMA_DECAY = 0.99
RECIPES = {
    "vit_small": "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k",
    "vit_base": "mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k",
    "resnet50": "mocov3_resnet50_8xb512-amp-coslr-100e_in1k",
}
if REHEARSAL:
    RECIPES = {name: str(Path(__file__).parent / "rehearsal" / f"{name}.yaml") for name in RECIPES}
BATCHES = {"vit_small": 16, "vit_base": 8, "resnet50": 16}
LEARNING_RATE = {"adamw": 1e-4, "lars": 0.1}


class OurStep:
    """The training step of this package, set up as in a run; `step(views)` returns the loss before the update."""

    def __init__(
        self,
        model: MoCoV3ForPreTraining,
        recipe_name: str,
        mixed_precision: str,
        device: str,
        overrides: dict | None = None,
        gradient_cache_chunk_size: int | None = None,
    ):
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate sets the precision once per process
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
        recipe = load_recipe(recipe_name, ["--mixed_precision", mixed_precision])
        self.choice: HardwareSettings = choose_settings(recipe, model, self.accelerator.device)
        if overrides:
            self.choice = replace(self.choice, **overrides)
        set_up(model, self.choice)
        self.learning_rate = LEARNING_RATE[recipe.optimization.optimizer]
        optimizer = build_optimizer(recipe, model, make_plan(recipe, recipe.data.num_train_images, 1))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model.train()
        self.watch = GradientWatch(model)
        self.chunk_size = gradient_cache_chunk_size

    def __call__(self, views: tuple[torch.Tensor, torch.Tensor], ema_decay: float) -> torch.Tensor:
        output = train_step(
            self.model,
            self.optimizer,
            views,
            learning_rate=self.learning_rate,
            ema_decay=ema_decay,
            max_grad_norm=None,
            accelerator=self.accelerator,
            gradient_cache_chunk_size=self.chunk_size,
            watch=self.watch,
        )
        return output.loss


def fresh_model(recipe_name: str) -> MoCoV3ForPreTraining:
    """The same weights at every call; the two encoders differ, as they do after some steps."""
    model = build_model(load_recipe(recipe_name))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.momentum_encoder.parameters():
            parameter.mul_(1 + 0.1 * torch.rand(()))
    return model


def random_views(batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    views = torch.randn(2, batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    return views[0], views[1]


def serve(
    connection: Connection, kind: str, backbone: str, mixed_precision: str, batch: int, overrides: dict | None
) -> None:
    """Main loop of a `StepProcess`: send the first loss, then run and time one step per request."""
    torch.set_num_threads(1)
    recipe_name, views = RECIPES[backbone], random_views(batch, "cpu")
    model, optimizer = fresh_model(recipe_name), load_recipe(recipe_name).optimization.optimizer
    if kind == "plain":
        step = PlainStep(model, optimizer, LEARNING_RATE[optimizer], mixed_precision, "cpu")
    else:
        step = OurStep(model, recipe_name, mixed_precision, "cpu", overrides)
    del model
    connection.send((step(views, EMA_DECAY).item(), getattr(step, "choice", None)))
    while connection.recv():
        connection.send(cpu_seconds(lambda: step(views, EMA_DECAY)))


class StepProcess:
    """
    A step on random views in a separate process; `seconds()` runs and times one step.

    `kind` is "plain" or "ours"; `overrides` are the changed fields of `HardwareSettings`. `first_loss` is the loss of
    the first step; `choice` holds the settings, or `None` for the plain step.
    """

    def __init__(self, kind: str, backbone: str, mixed_precision: str, batch: int, overrides: dict | None = None):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, kind, backbone, mixed_precision, batch, overrides)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # a failed process then ends the wait for its answer
        self.first_loss, self.choice = self.connection.recv()

    def __enter__(self) -> "StepProcess":
        return self

    def __exit__(self, *_) -> None:
        self.connection.send(False)
        self.process.join()

    def seconds(self) -> float:
        """CPU seconds of one step."""
        self.connection.send(True)
        return self.connection.recv()


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def alternate(steps: dict[str, Callable], views: tuple, rounds: int, label: str) -> dict[str, list[float]]:
    """CPU seconds of each step per round. The order alternates; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        names = list(steps) if index % 2 else list(steps)[::-1]
        for name in names:
            step = steps[name]
            own_process = isinstance(step, StepProcess)
            taken = step.seconds() if own_process else cpu_seconds(lambda step=step: step(views, EMA_DECAY))
            if index:
                seconds[name].append(taken)
        show = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items() if values)
        print(f"{label}: round {index}/{rounds} {show or 'warm-up'}", file=sys.stderr, flush=True)
    return seconds


def ratio(seconds: dict[str, list[float]], of: str, over: str) -> dict:
    """Ratio of the times of `of` and `over`, round by round."""
    ratios = sorted(a / b for a, b in zip(seconds[of], seconds[over], strict=True))
    return {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}


def against_plain(backbone: str, mixed_precision: str, batch: int, rounds: int) -> dict:
    """Compare both steps on one core."""
    recipe_name = RECIPES[backbone]
    with torch.device("meta"):
        config = MoCoV3ForPreTraining(build_config(load_recipe(recipe_name))).config
    limit = limit_of(backbone, mixed_precision, "cpu")
    with ExitStack() as stack:
        kinds = ("plain", "ours")
        steps = {kind: stack.enter_context(StepProcess(kind, backbone, mixed_precision, batch)) for kind in kinds}
        first = {kind: step.first_loss for kind, step in steps.items()}
        difference = abs(first["ours"] - first["plain"]) / abs(first["plain"])
        print(f"{backbone} {mixed_precision}: first loss {first}, difference {difference:.1e}", file=sys.stderr)
        if mixed_precision == "no" and difference > 1e-5:
            raise SystemExit(f"error: the first losses differ: {first}")
        views = random_views(batch, "cpu")
        seconds = alternate({**steps, "limit": limit}, views, rounds, f"{backbone} {mixed_precision}")
    limit_seconds, choice = seconds.pop("limit"), steps["ours"].choice
    return {
        "backbone": backbone,
        "mixed_precision": mixed_precision,
        "batch": batch,
        "acceleration": choice.describe(),
        "processes": "one for each step",
        "first_loss": first,
        "cpu_seconds": seconds,
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "speedup": ratio(seconds, "plain", "ours"),
        "limit": {"operation": type(limit).__name__, "flop": limit.flop, "seconds": limit_seconds},
        "flop_per_image": {
            "plain": step_flop_per_image(config, SIZE, False),
            "ours": step_flop_per_image(config, SIZE, config.backbone_config.model_type == "mocov3_vit"),
        },
    }


def limit_of(backbone: str, mixed_precision: str, device: str) -> Gemm | Convolution:
    """The operation that dominates the step, to measure its rate on its own."""
    return (Convolution if backbone == "resnet50" else Gemm)(mixed_precision, device)


def switch_overrides(choice: HardwareSettings, backbone: str) -> dict[str, dict]:
    """The switches to toggle one at a time, by name."""
    turned = {"gradient_checkpointing": {"gradient_checkpointing": True}} if backbone != "resnet50" else {}
    if choice.attn_implementation is not None:
        other = "eager" if choice.attn_implementation == "sdpa" else "sdpa"
        turned[f"{other} attention"] = {"attn_implementation": other}
    name = "without channels_last" if choice.channels_last else "channels_last"
    turned[name] = {"channels_last": not choice.channels_last}
    if choice.keep_freed_memory:
        turned["without keep_freed_memory"] = {"keep_freed_memory": False}
    return turned


def each_switch(backbone: str, mixed_precision: str, batch: int, rounds: int) -> dict:
    """Time of a step with one switch toggled, relative to the chosen settings."""
    views, results = random_views(batch, "cpu"), {}
    with StepProcess("ours", backbone, mixed_precision, batch) as chosen:
        for name, overrides in switch_overrides(chosen.choice, backbone).items():
            label = f"{backbone} {mixed_precision} {name}"
            with StepProcess("ours", backbone, mixed_precision, batch, overrides) as other:
                seconds = alternate({"turned": other, "chosen": chosen}, views, rounds, label)
            results[name] = {"times_as_long": ratio(seconds, "turned", "chosen"), "cpu_seconds": seconds}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list(RECIPES), default=["vit_small", "resnet50"])
    parser.add_argument("--precisions", nargs="+", choices=["no", "bf16"], default=["no", "bf16"])
    parser.add_argument("--batch", type=int, help="images per step; default 16, 8 for ViT-B")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--switches", action="store_true", help="also toggle each switch on its own")
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    result = {
        "device": f"one core of {cpu_name()}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "points": [],
    }
    for backbone in options.backbones:
        for precision in options.precisions:
            batch = options.batch or BATCHES[backbone]
            torch.set_num_threads(1)
            point = against_plain(backbone, precision, batch, options.rounds)
            if options.switches:
                point["switches"] = each_switch(backbone, precision, batch, options.rounds)
            result["points"].append(point)
            show(point)
            if options.output:
                write(result, options.output)
    if options.output:
        write(result, options.output)
    print(json.dumps(result))


def write(result: dict, path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def show(point: dict) -> None:
    speedup = point["speedup"]
    print(
        f"{point['backbone']} {point['mixed_precision']} (batch {point['batch']}; {point['acceleration']}):"
        f" {speedup['median']:.2f}× the plain step ({speedup['min']:.2f} to {speedup['max']:.2f})"
    )
    for name, switched in point.get("switches", {}).items():
        times = switched["times_as_long"]
        print(f"  {name}: {times['median']:.3f} times as long ({times['min']:.3f} to {times['max']:.3f})")


if __name__ == "__main__":
    main()
