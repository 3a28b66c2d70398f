"""Pre-training from a recipe to a folder of weights."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..data.loader import TwoViewLoader
from ..data.photometric import PhotometricStage
from ..optim import cosine_momentum, warmup_cosine
from ..recipe import Plan, Recipe, RecipeError, load_recipe, make_plan, recipe_help, recipe_names
from .build import (
    build_accelerator,
    build_loader,
    build_model,
    build_optimizer,
    build_source,
    check_model,
    doubtful_choices,
)
from .checkpoint import save_model
from .dry_run import describe
from .monitors import TrainingLog
from .step import seed_step, train_step


def main(arguments: list[str] | None = None) -> None:
    """
    The command `pretrain.py --recipe NAME|FILE [--option value ...]`.

    A mistake of the user's ends the process with one line on stderr and exit code 2.
    """
    try:
        recipe = parse(sys.argv[1:] if arguments is None else arguments)
        if recipe.run.dry_run:
            if is_first_process():
                print(describe(recipe))
            return
        run = Run(recipe)
    except (RecipeError, ValueError) as error:
        if is_first_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run.train()


def is_first_process() -> bool:
    """Before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def parse(arguments: list[str]) -> Recipe:
    """
    The recipe of a command line.

    Raises:
        RecipeError: no recipe named, or an option that does not exist.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("-h", "--help", action="store_true")
    named, rest = parser.parse_known_args(arguments)
    if named.help:
        print(recipe_help())
        sys.exit(0)
    if named.recipe is None:
        raise RecipeError(f"pass --recipe with a YAML file or one of {', '.join(recipe_names())}")
    recipe = load_recipe(named.recipe, rest)
    if recipe.run.output_dir is None and not recipe.run.dry_run:
        raise RecipeError("pass --output_dir with the folder for weights and metrics")
    return recipe


class Run:
    """
    One pre-training run. Building it checks everything that can be checked before work is done.

    Raises:
        RecipeError, ValueError: what cannot work, in a sentence with the repair.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.output_dir = Path(recipe.run.output_dir)
        self.accelerator = build_accelerator(recipe)
        check_model(recipe)
        with self.accelerator.main_process_first():  # the others find the prepared data in the cache
            source = build_source(recipe)
        self.plan = make_plan(recipe, len(source), self.accelerator.num_processes)
        model = build_model(recipe)
        self.temperature = model.config.temperature
        for doubt in doubtful_choices(recipe, self.plan, model, self.accelerator.num_processes):
            self.accelerator.print(f"warning: {doubt}", file=sys.stderr)
        self.loader = build_loader(recipe, source, self.plan, self.accelerator)
        optimizer = build_optimizer(recipe, model, self.plan)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.photometric = PhotometricStage(max_blur_sigma=recipe.views.blur_sigma[1]).to(self.accelerator.device)

    def train(self) -> None:
        """Run to the end and leave weights, metrics and the resolved recipe in the output folder."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            self.recipe.save(self.output_dir / "recipe.yaml")
        self.accelerator.init_trackers("mocov3", config=tracker_config(self.recipe))
        log = TrainingLog(
            self.accelerator, self.plan, self.temperature, self.output_dir, self.recipe.run.logging_steps
        )
        self.model.train()
        options = self.recipe.optimization
        for step, batch in timed(enumerate(batches(self.loader, self.plan)), log):
            views = self.augment(batch)
            learning_rate = learning_rate_at(step, self.plan)
            momentum = momentum_at(step, self.recipe, self.plan)
            seed_step(self.recipe.run.seed, step, self.accelerator.process_index)
            output = train_step(
                self.model,
                self.optimizer,
                views,
                learning_rate=learning_rate,
                momentum=momentum,
                max_grad_norm=options.max_grad_norm,
                accelerator=self.accelerator,
            )
            log.record(step, output, learning_rate, momentum, self.loader.num_bad_images)
        log.close()
        if self.accelerator.is_main_process:
            save_model(self.accelerator.unwrap_model(self.model), self.recipe, self.output_dir)
        self.accelerator.end_training()

    def augment(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Both views `(B, C, H, W)`, from uint8 crops and drawn numbers to normalised images, on the device."""
        pixels, parameters = (
            batch[name].to(self.accelerator.device, non_blocking=True) for name in ("pixels", "parameters")
        )
        return self.photometric(pixels[0], parameters[0]), self.photometric(pixels[1], parameters[1])


def batches(loader: TwoViewLoader, plan: Plan) -> Iterator[dict]:
    """Batches of all steps of the run, epoch after epoch."""
    step = 0
    while step < plan.total_steps:
        for batch in loader.epoch(step // plan.steps_per_epoch):
            yield batch
            step += 1
            if step == plan.total_steps:
                return


def timed(iterator: Iterator, log: TrainingLog) -> Iterator:
    """The same items, with the time spent waiting for each noted in `log`."""
    while True:
        start = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        log.waited_for_data(time.perf_counter() - start)
        yield item


def learning_rate_at(step: int, plan: Plan) -> float:
    return warmup_cosine(step, plan.total_steps, plan.warmup_steps, plan.learning_rate)


def momentum_at(step: int, recipe: Recipe, plan: Plan) -> float:
    options = recipe.optimization
    if options.momentum_schedule == "constant":
        return options.momentum
    return cosine_momentum(step, plan.total_steps, options.momentum)


def tracker_config(recipe: Recipe) -> dict:
    """The recipe in types that every tracker stores."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in recipe.to_dict().items()
    }
