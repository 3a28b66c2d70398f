"""Pre-training from a recipe to a folder of weights."""

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from ..data.bad_images import TooManyBadImagesError
from ..data.loader import TwoViewLoader
from ..data.photometric import PhotometricStage
from ..optim import cosine_momentum, warmup_cosine
from ..plan import Plan, make_plan
from ..recipe import Recipe, RecipeError, load_recipe, recipe_help, recipe_names
from .acceleration import accelerate, choose_acceleration
from .build import (
    build_accelerator,
    build_loader,
    build_model,
    build_optimizer,
    build_source,
    check_model,
    doubtful_choices,
    num_workers,
)
from .checkpoint import RunState, SaveError, list_checkpoints, load_checkpoint, remove_leftovers, save_checkpoint
from .dry_run import describe
from .gradient_cache import check_chunkable
from .monitors import DivergedError, TrainingLog
from .online_knn import OnlineKNN
from .resume import cut_back, find_checkpoint
from .signals import StopRequest
from .step import seed_step, train_step


class Pusher(Protocol):
    """Sends a folder somewhere without stopping the run: neither method waits for the network or raises."""

    def push(self, folder: Path, message: str) -> None: ...

    def finish(self) -> object: ...


def main(arguments: list[str] | None = None, make_pusher: Callable[..., Pusher] | None = None) -> None:
    """
    The command `pretrain.py --recipe NAME|FILE [--option value ...]`.

    Args:
        arguments: Those of the command line, by default of this process.
        make_pusher: What `--push_to_hub` pushes with, called as `make_pusher(repo_id, private=..., revision=...)`.

    A mistake of the user's ends the process with one line on stderr and exit code 2; a checkpoint that cannot be
    written, too many bad images, or a run that has diverged, with one line and exit code 1; a signal to stop with
    exit code 0.
    """
    try:
        recipe = parse(sys.argv[1:] if arguments is None else arguments)
        if recipe.run.dry_run:
            if is_first_process():
                print(describe(recipe))
            return
        run = Run(recipe, make_pusher)
    except (RecipeError, ValueError) as error:
        if is_first_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    disable_progress_bar()  # transformers' own, for every file of a checkpoint
    try:
        run.train()
    except (DivergedError, SaveError, TooManyBadImagesError) as error:
        if is_first_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


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

    def __init__(self, recipe: Recipe, make_pusher: Callable[..., Pusher] | None = None):
        self.recipe = recipe
        self.output_dir = Path(recipe.run.output_dir)
        self.accelerator = build_accelerator(recipe)
        self.pusher = self.build_pusher(make_pusher)
        check_model(recipe)
        source = build_source(recipe)
        self.plan = make_plan(recipe, source.num_samples, self.accelerator.num_processes)
        found = find_checkpoint(recipe, self.plan)
        model = build_model(recipe)
        self.temperature = model.config.temperature
        for doubt in doubtful_choices(recipe, self.plan, model, self.accelerator.num_processes):
            self.accelerator.print(f"warning: {doubt}", file=sys.stderr)
        acceleration = choose_acceleration(recipe, model, self.accelerator.device)
        accelerate(model, acceleration)
        device = self.accelerator.device.type
        self.accelerator.print(f"acceleration on {device}: {acceleration.describe()}", file=sys.stderr)
        optimizer = build_optimizer(recipe, model, self.plan)
        if recipe.optimization.gradient_cache_chunk_size is not None:
            check_chunkable(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.start_step, self.log_state = self.resume(*found) if found is not None else (0, {})
        self.prepare_output()
        self.loader = build_loader(recipe, source, self.plan, self.accelerator)
        self.knn = None
        if recipe.data.knn_steps is not None:
            self.knn = OnlineKNN(recipe, self.accelerator, num_workers(recipe, self.accelerator))
        self.photometric = PhotometricStage(max_blur_sigma=recipe.views.blur_sigma[1]).to(self.accelerator.device)

    def train(self) -> None:
        """Run to the end, or to a signal, and leave weights, metrics and the resolved recipe in the output folder."""
        options, run = self.recipe.optimization, self.recipe.run
        self.accelerator.init_trackers("mocov3", config=tracker_config(self.recipe))
        log = TrainingLog(
            self.accelerator, self.plan, self.temperature, self.output_dir, run.logging_steps, self.start_step
        )
        if self.start_step > 0:
            log.resume(self.log_state, self.start_step)
            if self.accelerator.is_main_process:
                cut_back(self.output_dir / "knn.jsonl", self.start_step)
        if self.start_step == self.plan.total_steps:
            self.accelerator.print(f"all {self.start_step} steps are done: there is nothing left to do")
        self.model.train()
        stopping = False
        with StopRequest(self.accelerator) as stop, closing(log):
            steps = enumerate(batches(self.loader, self.plan, self.start_step), start=self.start_step)
            for step, batch in timed(steps, log):
                views = self.augment(batch)
                learning_rate = learning_rate_at(step, self.plan)
                momentum = momentum_at(step, self.recipe, self.plan)
                seed_step(run.seed, step, self.accelerator.process_index)
                output = train_step(
                    self.model,
                    self.optimizer,
                    views,
                    learning_rate=learning_rate,
                    momentum=momentum,
                    max_grad_norm=options.max_grad_norm,
                    accelerator=self.accelerator,
                    gradient_cache_chunk_size=options.gradient_cache_chunk_size,
                )
                log.record(step, output, learning_rate, momentum, self.loader.num_bad_images)
                if self.knn is not None and (step + 1) % self.recipe.data.knn_steps == 0:
                    self.measure_knn(step + 1, log)
                stopping = stop.agreed() and step + 1 < self.plan.total_steps
                if stopping or (step + 1) % run.save_steps == 0 or step + 1 == self.plan.total_steps:
                    self.save(step + 1, log)
                if stopping:
                    break
        self.accelerator.end_training()
        if self.pusher is not None:
            self.pusher.finish()
        if stopping:
            self.accelerator.print(f"stopped by {stop.describe()} after step {step + 1}; to continue:")
            self.accelerator.print(f"  {resume_command()}")

    def build_pusher(self, make_pusher: Callable[..., Pusher] | None) -> Pusher | None:
        """What pushes, on the main process and where it is asked for."""
        run = self.recipe.run
        if not run.push_to_hub:
            return None
        if make_pusher is None:
            raise RecipeError("--push_to_hub works in scripts/pretrain.py; from Python pass make_pusher")
        if not self.accelerator.is_main_process:
            return None
        name = run.hub_model_id or self.output_dir.resolve().name
        return make_pusher(name, private=run.hub_private_repo, revision=run.hub_revision)

    def resume(self, folder: Path, state: RunState) -> tuple[int, dict]:
        """Load a checkpoint; gives the steps done and the state of the log."""
        load_checkpoint(folder, self.accelerator.unwrap_model(self.model), self.optimizer.optimizer)
        if self.accelerator.scaler is not None and state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.accelerator.print(f"continuing from {folder} after step {state.step}", file=sys.stderr)
        return state.step, state.log

    def prepare_output(self) -> None:
        """Make the output folder, without what an earlier run left there unless this one continues it."""
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.output_dir)
            if self.start_step == 0:
                clear(self.output_dir)
            self.recipe.save(self.output_dir / "recipe.yaml")
        self.accelerator.wait_for_everyone()

    def save(self, steps_done: int, log: TrainingLog) -> None:
        """
        Write a checkpoint.

        Raises:
            SaveError: it could not be written and `on_save_error` says stop. Earlier checkpoints are untouched.
        """
        state = RunState(
            step=steps_done,
            global_batch_size=self.plan.global_batch_size,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_steps=self.plan.total_steps,
            num_processes=self.accelerator.num_processes,
            log=log.state(),
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        )
        failure = None
        if self.accelerator.is_main_process:
            try:
                save_checkpoint(
                    self.output_dir,
                    self.accelerator.unwrap_model(self.model),
                    self.optimizer.optimizer,
                    self.recipe,
                    state,
                    self.recipe.run.save_total_limit,
                )
            except (OSError, SafetensorError) as error:
                failure = f"the checkpoint of step {steps_done} could not be written: {error}"
        failure = broadcast_object_list([failure])[0]
        if failure is None:
            if self.pusher is not None:
                self.pusher.push(self.output_dir, f"Step {steps_done}")
            return
        if self.recipe.run.on_save_error == "stop" or steps_done == self.plan.total_steps:
            raise SaveError(
                f"{failure}. Earlier checkpoints are whole; make room and continue with {resume_command()}"
            )
        self.accelerator.print(f"warning: {failure}; earlier checkpoints are whole, going on", file=sys.stderr)

    def measure_knn(self, steps_done: int, log: TrainingLog) -> None:
        """Nearest neighbour accuracy at this step, outside of the clock."""
        start = time.perf_counter()
        encoder = self.accelerator.unwrap_model(self.model).mocov3
        accuracy = self.knn.measure(encoder, steps_done, steps_done / self.plan.steps_per_epoch)
        log.note("kNN", f"{accuracy:.3f}")
        log.leave_out(time.perf_counter() - start)

    def augment(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Both views `(B, C, H, W)`, from uint8 crops and drawn numbers to normalised images, on the device."""
        pixels, parameters = (
            batch[name].to(self.accelerator.device, non_blocking=True) for name in ("pixels", "parameters")
        )
        return self.photometric(pixels[0], parameters[0]), self.photometric(pixels[1], parameters[1])


def batches(loader: TwoViewLoader, plan: Plan, start_step: int = 0) -> Iterator[dict]:
    """Batches of the steps from `start_step` to the end of the run, epoch after epoch."""
    step = start_step
    while step < plan.total_steps:
        epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
        for batch in loader.epoch(epoch, step_in_epoch):
            yield batch
            step += 1
            if step == plan.total_steps:
                return


def clear(output_dir: Path) -> None:
    """Delete what an earlier run has left, other than weights, which the first save replaces."""
    for folder in list_checkpoints(output_dir):
        shutil.rmtree(folder)
    for name in ("metrics.jsonl", "bad_images.jsonl", "knn.jsonl"):
        (output_dir / name).unlink(missing_ok=True)


def resume_command() -> str:
    """The command of this run with the option to continue. What started several processes is not known here."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    arguments, asked = ["python" if alone else "(torchrun or accelerate launch as before)"], False
    for argument in sys.argv:
        # Options of the first start that would now be wrong.
        if argument.startswith("--resume_from_checkpoint") or argument == "--overwrite_output_dir":
            asked = argument == "--resume_from_checkpoint"
        elif asked:
            asked = False
        else:
            arguments.append(argument)
    return " ".join([arguments[0], shlex.join([*arguments[1:], "--resume_from_checkpoint", "auto"])])


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
