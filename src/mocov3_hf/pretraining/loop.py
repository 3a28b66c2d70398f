"""The training loop: one run, from its options to the last checkpoint."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from ..data.workers import LostWorkerError, cores_shared_with
from ..hub import BackgroundPusher
from ..precision import this_device
from ..process_group import StopRequest, wait_for_others
from ..reporting import RunError
from ..run_folder import BAD_IMAGES, DATA, RECIPE, CheckpointError, list_checkpoints
from ..storage import write_json
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
from .callbacks import Callbacks
from .candidates import one_batch_ahead
from .checkpoint import RunState, is_published, load_checkpoint, publish, read_state, save_checkpoint
from .data_change import describe_change, identify, plan_to_resume
from .folder_lock import FolderLock
from .gradient_cache import check_chunkable
from .hardware import choose_settings, compile_augmentation, set_up, settle_precision
from .instability import GradientWatch, Instability
from .monitors import DivergedError, TrainingLog, summarize
from .online_knn import OnlineKNN
from .pixels import build_photometric, settle_pixels_together
from .plan import batches, ema_decay_at, learning_rate_at, make_plan
from .recipe import Recipe
from .resume import checkpoint_before, find_common_checkpoint, prepare_folder
from .step import seed_step, train_step
from .trackers import Trackers


class SaveError(RunError):
    """A checkpoint that could not be written."""


class Run:
    """
    One pre-training run. Building it checks everything that can be checked in advance.

    Raises:
        UsageError, ValueError: options that cannot work, in one line with the fix.
    """

    def __init__(
        self, recipe: Recipe, resume_command: str, lock: FolderLock, callbacks: Sequence[TrainerCallback] = ()
    ):
        self.resume_command, self.lock = resume_command, lock
        self.output_dir = Path(recipe.run.output_dir)
        disable_progress_bar()  # transformers' own, for every file of a checkpoint
        recipe, precision = settle_precision(recipe, this_device())
        self.accelerator = build_accelerator(recipe)
        check_model(recipe)
        source = build_source(recipe)
        self.recipe = recipe = settle_pixels_together(recipe, source, self.accelerator)
        self.plan = make_plan(recipe, source.num_samples, self.accelerator.num_processes)
        self.data = identify(source, self.accelerator.is_main_process)
        found = find_common_checkpoint(recipe, self.plan, lock, self.data)
        if source.account is not None:
            self.accelerator.print("\n".join(source.account.lines()), file=sys.stderr)

        model = build_model(recipe)
        self.temperature = model.config.temperature
        for doubt in doubtful_choices(recipe, self.plan, model, self.accelerator.num_processes):
            self.accelerator.print(f"warning: {doubt}", file=sys.stderr)
        settings = choose_settings(recipe, model, self.accelerator.device)
        set_up(model, settings)
        chosen = f"settings for {self.accelerator.device.type}: {precision}, {settings.describe()}"
        self.accelerator.print(chosen, file=sys.stderr)
        if recipe.hardware.gradient_cache_chunk_size is not None:
            check_chunkable(model)
        optimizer = build_optimizer(recipe, model, self.plan)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.watch = GradientWatch(
            self.accelerator.unwrap_model(self.model),
            recipe.monitoring.spike_factor,
            refuse_spikes=recipe.monitoring.on_instability == "skip",
        )
        # Steps done; batches that rollbacks have skipped besides; rollbacks done, and the last one's target.
        self.step = self.skipped_batches = self.num_rollbacks = 0
        self.reported_failure: str | None = None
        self.rolled_back_to: int | None = None
        self.data_changes, self.data_change = 0, None
        if found is not None:
            self.resume(*found)
        if self.accelerator.is_main_process:
            prepare_folder(self.output_dir, is_new=self.step == 0)
            recipe.save(self.output_dir / RECIPE)
            if self.data_change is not None:  # the numbers of the images are others now
                (self.output_dir / BAD_IMAGES).unlink(missing_ok=True)
            if source.account is not None:
                write_json(self.output_dir / DATA, source.account.to_dict())
            if found is not None and not is_published(found[0], self.output_dir):
                publish(found[0], self.output_dir)
        self.accelerator.wait_for_everyone()

        self.loader = build_loader(recipe, source, self.plan, self.accelerator)
        self.knn = None
        if recipe.monitoring.knn_steps is not None:
            self.knn = OnlineKNN(recipe, self.accelerator, num_workers(recipe, self.accelerator))
        self.photometric = build_photometric(recipe, self.accelerator.device)
        compile_augmentation(self.photometric, settings, self.accelerator.device)
        self.views_of = partial(one_batch_ahead, device=self.accelerator.device) if settings.prefetch_views else map
        self.callbacks = Callbacks(callbacks, recipe, self.plan, self.accelerator.is_main_process)
        self.pusher = None
        if recipe.hub.push_to_hub and self.accelerator.is_main_process:
            name = recipe.hub.hub_model_id or self.output_dir.resolve().name
            self.pusher = BackgroundPusher(name, private=recipe.hub.hub_private_repo, revision=recipe.hub.hub_revision)

    def train(self, stop: StopRequest) -> None:
        """Train to the end, or until a signal; weights, metrics and the resolved recipe are in the output folder."""
        accelerator, folder, step = self.accelerator, self.output_dir, self.step
        workers = num_workers(self.recipe, accelerator)
        with (
            cores_shared_with(workers, accelerator.num_processes),
            closing(self.loader),
            Trackers(accelerator, self.recipe, folder, step) as trackers,
            closing(TrainingLog(accelerator, trackers, self.plan, self.temperature, folder, self.watch, step)) as log,
        ):
            self.notify("on_train_begin")
            if self.step > 0:
                log.resume(self.log_state, self.step, self.num_rollbacks)
                if self.data_change is not None:
                    log.record_event(self.step, "data_change", reason=self.data_change)
            elif self.recipe.monitoring.on_instability == "rollback":
                self.save(log)
            if self.step == self.plan.total_steps:
                accelerator.print(f"all {self.step} steps are done: nothing left to do")
            self.model.train()
            stop.start_training()
            stopping = stop.agreed(accelerator)
            while self.step < self.plan.total_steps and not stopping:
                try:
                    stopping = self.train_until_stopped(stop, log)
                except LostWorkerError as error:
                    # Other processes are in the next step: this one saves.
                    log.is_alone = self.accelerator.num_processes > 1
                    self.save_finished_steps(log)
                    raise self.explain(error) from error
        self.notify("on_train_end")
        wait_for_others()
        if self.pusher is not None:
            self.pusher.finish()
        lost = self.lost_worker()
        if lost is not None:
            raise self.explain(lost)
        if stopping:
            reason = "a callback" if self.callbacks.control.should_training_stop else stop.describe()
            self.accelerator.print(f"stopped by {reason} after step {self.step}; to resume:")
            self.accelerator.print(f"  {self.resume_command}")
        elif self.accelerator.is_main_process:
            if self.loader.num_filled_images:
                number = f"{self.loader.num_filled_images:,}"
                print(f"pixels without data were filled with the mean of their channel in {number} decoded images")
            print(summarize(self.recipe, self.plan))

    def train_until_stopped(self, stop: StopRequest, log: TrainingLog) -> bool:
        """Step after step: until the end, a rollback, or a signal. Returns whether it was a signal."""
        recipe, seed = self.recipe, self.recipe.run.seed
        loaded = timed(batches(self.loader, self.plan, self.step, self.skipped_batches), log)
        for views in self.views_of(self.augment, loaded):
            learning_rate = learning_rate_at(self.step, self.plan)
            learning_rate *= recipe.monitoring.rollback_learning_rate_factor**self.num_rollbacks
            ema_decay = ema_decay_at(self.step, recipe, self.plan)
            self.notify("on_step_begin")
            seed_step(seed, self.step, self.accelerator.process_index)
            output = train_step(
                self.model,
                self.optimizer,
                views,
                learning_rate=learning_rate,
                ema_decay=ema_decay,
                max_grad_norm=recipe.optimization.max_grad_norm,
                accelerator=self.accelerator,
                gradient_cache_chunk_size=recipe.hardware.gradient_cache_chunk_size,
                watch=self.watch,
            )
            log.record(output)
            self.step += 1
            self.notify("on_step_end")

            is_last = self.step == self.plan.total_steps
            must_stop = self.lost_worker() is not None or self.callbacks.control.should_training_stop
            stopping = stop.agreed(self.accelerator, must_stop) and not is_last
            logging = is_last or self.step % recipe.monitoring.logging_steps == 0
            saving = is_last or self.step % recipe.run.save_steps == 0 or stopping
            if logging or saving:
                instability = log.examine(self.step)
                if instability is not None and recipe.monitoring.on_instability == "rollback":
                    self.roll_back(instability, log)
                    return False
            if logging:
                logs = log.write(self.step, output.projection, learning_rate, ema_decay, self.loader.num_bad_images)
                self.notify("on_log", logs=logs)
            if stopping:  # first what must not be lost: the time may be short
                self.save(log, is_last=True)
            if self.knn is not None and self.step % recipe.monitoring.knn_steps == 0:
                self.measure_knn(log)
            if stopping:
                return True
            if saving:
                self.save(log, is_last)
        return False

    def notify(self, event: str, **values: Any) -> None:
        self.callbacks(event, self.accelerator.unwrap_model(self.model), self.step, **values)

    def lost_worker(self) -> LostWorkerError | None:
        """Of this process; it has decoded the images itself since then."""
        return self.loader.lost_worker or (self.knn and self.knn.lost_worker)

    def save_finished_steps(self, log: TrainingLog) -> None:
        """Save before the run ends with an error, unless its last steps would be rolled back."""
        if self.step > 0 and not (log.examine(self.step) and self.recipe.monitoring.on_instability == "rollback"):
            self.save(log)

    def explain(self, error: LostWorkerError) -> RunError:
        checkpoints = list_checkpoints(self.output_dir)
        advice = f"{checkpoints[0].name} is complete; to resume" if checkpoints else "To start again"
        return RunError(f"{error}. {advice}: {self.resume_command}", from_any_process=True)

    def augment(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Both views `(B, C, H, W)`: normalized images on the device, from uint8 crops and drawn parameters."""
        pixels, parameters = (
            batch[name].to(self.accelerator.device, non_blocking=True) for name in ("pixels", "parameters")
        )
        return self.photometric(pixels[0], parameters[0]), self.photometric(pixels[1], parameters[1])

    def measure_knn(self, log: TrainingLog) -> None:
        """kNN accuracy at this step; its time does not count."""
        start = time.perf_counter()
        encoder = self.accelerator.unwrap_model(self.model).mocov3
        measured = self.knn.measure(encoder)
        log.write_knn(self.step, measured)
        self.notify("on_evaluate", metrics=measured)
        log.exclude(time.perf_counter() - start)

    def roll_back(self, instability: Instability, log: TrainingLog) -> None:
        """
        Return to the last checkpoint before an instability and skip the batches since then.

        Training after a checkpoint depends on the checkpoint alone, so a run that is killed here rolls back again.

        Raises:
            DivergedError: the limit of rollbacks is reached.
            CheckpointError: there is no checkpoint to return to.
        """
        options = self.recipe.monitoring
        trouble = f"step {instability.step}: {instability.reason}"
        if self.num_rollbacks == options.max_rollbacks:
            raise DivergedError(
                f"{trouble}, after {self.num_rollbacks} rollbacks: they do not help. Lower --base_learning_rate,"
                " freeze the patch projection, or raise --spike_factor if these spikes do no harm"
            )
        folder = failure = None
        if self.accelerator.is_main_process:
            try:
                folder = checkpoint_before(self.output_dir, instability.step, self.rolled_back_to)
            except CheckpointError as error:
                failure = f"{trouble}, and a rollback is not possible: {error}"
        folder, failure = broadcast_object_list([folder, failure])
        if failure is not None:
            raise CheckpointError(failure)
        state = self.load(folder)
        log.record_event(
            self.step,
            "rollback",
            to_step=state.step,
            skipped_batches=self.step - state.step,
            learning_rate_scale=options.rollback_learning_rate_factor ** (self.num_rollbacks + 1),
            reason=trouble,
        )
        log.print(f"{trouble}: back to {folder.name}, skipping the batches of {self.step - state.step} steps")
        self.skipped_batches += self.step - state.step
        self.num_rollbacks += 1
        self.step = self.rolled_back_to = state.step
        log.go_back(state.log, self.step, self.num_rollbacks)

    def resume(self, folder: Path, state: RunState) -> None:
        """Continue from a checkpoint."""
        self.load(folder)
        self.plan = plan_to_resume(self.recipe, self.plan, state, self.data)
        self.data_change = describe_change(state, self.data)
        self.data_changes = state.data_changes + (self.data_change is not None)
        if self.data_change is not None:
            self.accelerator.print(f"warning: {self.data_change}; continuing with these images", file=sys.stderr)
        self.step, self.log_state = state.step, state.log
        self.skipped_batches, self.num_rollbacks = state.skipped_batches, state.num_rollbacks
        self.accelerator.print(f"resuming from {folder} after step {state.step}", file=sys.stderr)

    def load(self, folder: Path) -> RunState:
        """Load weights, optimizer state and gradient scaler of a checkpoint."""
        state = read_state(folder)
        load_checkpoint(folder, self.accelerator.unwrap_model(self.model), self.optimizer.optimizer)
        if self.accelerator.scaler is not None and state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        return state

    def save(self, log: TrainingLog, is_last: bool = False) -> None:
        """
        Write a checkpoint.

        Raises:
            RunError: another run has taken over the folder.
            SaveError: it or the metrics could not be written, and `is_last` is true or `on_save_error` is stop.
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
            num_samples=self.data.num_samples,
            data_fingerprint=self.data.fingerprint,
            data_changes=self.data_changes,
        )
        failure = taken_over = None
        if self.accelerator.is_main_process or log.is_alone:
            try:
                self.lock.check()
                failure = self.write(state) or log.unwritten()
            except RunError as error:
                taken_over = str(error)
        if not log.is_alone:
            failure, taken_over = broadcast_object_list([failure, taken_over])
        if taken_over is not None:
            raise RunError(taken_over)
        if failure is None:
            if self.pusher is not None:
                self.pusher.push(self.output_dir, f"Step {self.step}")
            self.notify("on_save")
            return
        if self.recipe.run.on_save_error == "stop" or is_last:
            checkpoints = list_checkpoints(self.output_dir)
            advice = f"{checkpoints[0].name} is complete; when" if checkpoints else "When"
            raise SaveError(f"{failure}. {advice} this is repaired, run {self.resume_command}")
        if failure != self.reported_failure:
            log.print(f"warning: {failure}; training continues")
            self.reported_failure = failure

    def write(self, state: RunState) -> str | None:
        """Write a checkpoint and replace the weights in the output folder. Returns why that failed, None if not."""
        model, limit = self.accelerator.unwrap_model(self.model), self.recipe.run.save_total_limit
        # transformers would save in the first process only.
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        try:
            folder = save_checkpoint(self.output_dir, model, self.optimizer.optimizer, self.recipe, state, limit)
        except (OSError, SafetensorError) as error:
            return f"the checkpoint of step {self.step} could not be written: {error}"
        try:
            publish(folder, self.output_dir)
        except OSError as error:
            return f"checkpoints are written, but not the weights in {self.output_dir}: {error}"
        return None


def timed(iterator: Iterator, log: TrainingLog) -> Iterator:
    """The same items; the time spent waiting for them is noted in `log`."""
    while True:
        start = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        log.waited_for_data(time.perf_counter() - start)
        yield item
