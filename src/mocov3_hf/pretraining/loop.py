"""Pre-training from a recipe to a folder of weights."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from ..data.bad_images import TooManyBadImagesError
from ..optim import cosine_ema_decay, warmup_cosine
from ..plan import Plan, make_plan
from ..recipe import Recipe, RecipeError, load_recipe, recipe_help, recipe_names
from .acceleration import accelerate, accelerate_augmentation, choose_acceleration
from .agreement import find_common_checkpoint
from .batches import batches, timed
from .build import (
    build_accelerator,
    build_loader,
    build_model,
    build_photometric,
    build_source,
    check_model,
    distribute,
    doubtful_choices,
    num_workers,
)
from .checkpoint import (
    CheckpointError,
    RunState,
    SaveError,
    gather_tensors,
    load_checkpoint,
    read_state,
    remove_leftovers,
    save_checkpoint,
)
from .dry_run import describe
from .gradient_cache import check_chunkable
from .instability import GradientWatch, Instability
from .lost_peer import leave_if_peer_lost
from .monitors import DivergedError, TrainingLog
from .online_knn import OnlineKNN
from .resume import clear, cut_back, resume_command
from .rollback import checkpoint_before
from .signals import StopRequest
from .step import seed_step, train_step
from .summary import summarize


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
    written, too many bad images, a run that has diverged, or another process that is lost, with one line and exit code
    1; a signal to stop with exit code 0.
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
    except RuntimeError as error:
        leave_if_peer_lost(error, recipe.run, step=None)
        raise
    disable_progress_bar()  # transformers' own, for every file of a checkpoint
    try:
        run.train()
    except (CheckpointError, DivergedError, SaveError, TooManyBadImagesError) as error:
        # Images may be out of reach of one process alone.
        if is_first_process() or isinstance(error, TooManyBadImagesError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        leave_if_peer_lost(error, recipe.run, run.step)
        raise


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
        found = find_common_checkpoint(recipe, self.plan)
        model = build_model(recipe)
        self.temperature = model.config.temperature
        for doubt in doubtful_choices(recipe, self.plan, model, self.accelerator.num_processes):
            self.accelerator.print(f"warning: {doubt}", file=sys.stderr)
        acceleration = choose_acceleration(recipe, model, self.accelerator.device, self.accelerator.num_processes)
        accelerate(model, acceleration)
        device = self.accelerator.device.type
        self.accelerator.print(f"acceleration on {device}: {acceleration.describe()}", file=sys.stderr)
        if recipe.optimization.gradient_cache_chunk_size is not None:
            check_chunkable(model)
        self.model, self.optimizer = distribute(recipe, model, self.plan, self.accelerator, acceleration.fsdp)
        self.watch = GradientWatch(
            self.accelerator.unwrap_model(self.model),
            recipe.run.spike_factor,
            refuse_spikes=recipe.run.on_instability == "skip",
        )
        # Updates done; batches that rollbacks have passed over besides; rollbacks done, and the last one's target.
        self.step = self.skipped_batches = self.num_rollbacks = 0
        self.rolled_back_to: int | None = None
        if found is not None:
            self.resume(*found)
        self.prepare_output()
        self.loader = build_loader(recipe, source, self.plan, self.accelerator)
        self.knn = None
        if recipe.data.knn_steps is not None:
            self.knn = OnlineKNN(recipe, self.accelerator, num_workers(recipe, self.accelerator))
        self.photometric = build_photometric(recipe, self.accelerator.device)
        accelerate_augmentation(self.photometric, acceleration, self.accelerator.device)

    def train(self) -> None:
        """Run to the end, or to a signal, and leave weights, metrics and the resolved recipe in the output folder."""
        self.accelerator.init_trackers("mocov3", config=tracker_config(self.recipe))
        log = TrainingLog(
            self.accelerator, self.plan, self.temperature, self.output_dir, self.watch, start_step=self.step
        )
        if self.step > 0:
            log.resume(self.log_state, self.step, self.num_rollbacks)
            if self.accelerator.is_main_process:
                cut_back(self.output_dir / "knn.jsonl", self.step)
        elif self.recipe.run.on_instability == "rollback":
            self.save(log)
        if self.step == self.plan.total_steps:
            self.accelerator.print(f"all {self.step} steps are done: there is nothing left to do")
        self.model.train()
        stopping = False
        with StopRequest(self.accelerator) as stop, closing(log):
            while self.step < self.plan.total_steps and not stopping:
                stopping = self.update_until_stopped(stop, log)
        self.accelerator.end_training()
        if self.pusher is not None:
            self.pusher.finish()
        if stopping:
            self.accelerator.print(f"stopped by {stop.describe()} after step {self.step}; to continue:")
            self.accelerator.print(f"  {resume_command()}")
        elif self.accelerator.is_main_process:
            print(summarize(self.recipe, self.plan))

    def update_until_stopped(self, stop: StopRequest, log: TrainingLog) -> bool:
        """Update after update: to the end, to a signal (then the answer is yes), or to a rollback."""
        options, run = self.recipe.optimization, self.recipe.run
        for batch in timed(batches(self.loader, self.plan, self.step, self.skipped_batches), log):
            views = self.augment(batch)
            learning_rate = learning_rate_at(self.step, self.plan)
            learning_rate *= run.rollback_learning_rate_factor**self.num_rollbacks
            momentum = momentum_at(self.step, self.recipe, self.plan)
            seed_step(run.seed, self.step, self.accelerator.process_index)
            output = train_step(
                self.model,
                self.optimizer,
                views,
                learning_rate=learning_rate,
                momentum=momentum,
                max_grad_norm=options.max_grad_norm,
                accelerator=self.accelerator,
                gradient_cache_chunk_size=options.gradient_cache_chunk_size,
                watch=self.watch,
            )
            log.record(output)
            self.step += 1

            is_last = self.step == self.plan.total_steps
            stopping = stop.agreed() and not is_last
            logging = is_last or self.step % run.logging_steps == 0
            saving = is_last or self.step % run.save_steps == 0 or stopping
            if logging or saving:
                instability = log.examine(self.step)
                if instability is not None and run.on_instability == "rollback":
                    self.roll_back(instability, log)
                    return False
            if logging:
                log.write(self.step, output.projection, learning_rate, momentum, self.loader.num_bad_images)
            if self.knn is not None and self.step % self.recipe.data.knn_steps == 0:
                self.measure_knn(log)
            if saving:
                self.save(log)
            if stopping:
                return True
        return False

    def roll_back(self, instability: Instability, log: TrainingLog) -> None:
        """
        Return to the last good checkpoint; the images seen since then are passed over.

        What happens after a checkpoint follows from it alone, so a run that is killed meanwhile comes here again.

        Raises:
            DivergedError: it has been tried often enough.
        """
        run = self.recipe.run
        trouble = f"step {instability.step}: {instability.reason}"
        if self.num_rollbacks == run.max_rollbacks:
            raise DivergedError(
                f"{trouble}, after {self.num_rollbacks} rollbacks: they do not help. Lower --base_learning_rate,"
                " freeze the patch projection, or raise --spike_factor if these spikes do no harm"
            )
        folder = failure = None
        if self.accelerator.is_main_process:
            try:
                folder = checkpoint_before(self.output_dir, instability.step, self.rolled_back_to)
            except CheckpointError as error:
                failure = f"{trouble}, and no way back: {error}"
        folder, failure = broadcast_object_list([folder, failure])
        if failure is not None:
            raise CheckpointError(failure)
        state = self.load(folder)
        log.record_event(
            self.step,
            "rollback",
            to_step=state.step,
            skipped_batches=self.step - state.step,
            learning_rate_scale=run.rollback_learning_rate_factor ** (self.num_rollbacks + 1),
            reason=trouble,
        )
        log.tell(f"{trouble}: back to {folder.name}, passing over the images of {self.step - state.step} steps")
        self.skipped_batches += self.step - state.step
        self.num_rollbacks += 1
        self.step = self.rolled_back_to = state.step
        log.go_back(state.log, self.step, self.num_rollbacks)
        if self.accelerator.is_main_process:
            cut_back(self.output_dir / "knn.jsonl", self.step)

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

    def resume(self, folder: Path, state: RunState) -> None:
        """Stand where a checkpoint stands."""
        self.load(folder)
        self.step, self.log_state = state.step, state.log
        self.skipped_batches, self.num_rollbacks = state.skipped_batches, state.num_rollbacks
        self.accelerator.print(f"continuing from {folder} after step {state.step}", file=sys.stderr)

    def load(self, folder: Path) -> RunState:
        """Weights, moments and gradient scaler of a checkpoint."""
        state = read_state(folder)
        load_checkpoint(folder, self.accelerator.unwrap_model(self.model), self.optimizer.optimizer)
        if self.accelerator.scaler is not None and state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        return state

    def prepare_output(self) -> None:
        """Make the output folder, without what an earlier run left there unless this one continues it."""
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.output_dir)
            if self.step == 0:
                clear(self.output_dir)
            self.recipe.save(self.output_dir / "recipe.yaml")
        self.accelerator.wait_for_everyone()

    def save(self, log: TrainingLog) -> None:
        """
        Write a checkpoint.

        Raises:
            SaveError: it could not be written and `on_save_error` says stop. Earlier checkpoints are untouched.
        """
        state = RunState(
            step=self.step,
            global_batch_size=self.plan.global_batch_size,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_steps=self.plan.total_steps,
            num_processes=self.accelerator.num_processes,
            log=log.state(),
            skipped_batches=self.skipped_batches,
            num_rollbacks=self.num_rollbacks,
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        )
        failure = None
        model = self.accelerator.unwrap_model(self.model)
        tensors = gather_tensors(model, self.optimizer.optimizer, keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            try:
                save_checkpoint(
                    self.output_dir,
                    model,
                    tensors,
                    self.recipe,
                    state,
                    self.recipe.run.save_total_limit,
                )
            except (OSError, SafetensorError) as error:
                failure = f"the checkpoint of step {self.step} could not be written: {error}"
        failure = broadcast_object_list([failure])[0]
        if failure is None:
            if self.pusher is not None:
                self.pusher.push(self.output_dir, f"Step {self.step}")
            return
        if self.recipe.run.on_save_error == "stop" or self.step == self.plan.total_steps:
            raise SaveError(
                f"{failure}. Earlier checkpoints are whole; make room and continue with {resume_command()}"
            )
        self.accelerator.print(f"warning: {failure}; earlier checkpoints are whole, going on", file=sys.stderr)

    def measure_knn(self, log: TrainingLog) -> None:
        """Nearest neighbour accuracy at this step, outside of the clock."""
        start = time.perf_counter()
        encoder = self.accelerator.unwrap_model(self.model).mocov3
        accuracy = self.knn.measure(encoder, self.step, self.step / self.plan.steps_per_epoch)
        log.note("kNN", f"{accuracy:.3f}")
        log.leave_out(time.perf_counter() - start)

    def augment(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Both views `(B, C, H, W)`, from uint8 crops and drawn numbers to normalised images, on the device."""
        pixels, parameters = (
            batch[name].to(self.accelerator.device, non_blocking=True) for name in ("pixels", "parameters")
        )
        return self.photometric(pixels[0], parameters[0]), self.photometric(pixels[1], parameters[1])


def learning_rate_at(step: int, plan: Plan) -> float:
    return warmup_cosine(step, plan.total_steps, plan.warmup_steps, plan.learning_rate)


def momentum_at(step: int, recipe: Recipe, plan: Plan) -> float:
    options = recipe.optimization
    if options.momentum_schedule == "constant":
        return options.momentum
    return cosine_ema_decay(step, plan.total_steps, options.momentum)


def tracker_config(recipe: Recipe) -> dict:
    """The recipe in types that every tracker stores."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in recipe.to_dict().items()
    }
