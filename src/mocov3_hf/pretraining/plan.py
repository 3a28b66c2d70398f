"""What a recipe means for given data and processes: batch, steps, learning rate, and the batches of the steps."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..data.loader import TwoViewLoader
from ..optim import cosine_ema_decay, warmup_cosine
from ..reporting import UsageError
from .recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """Batch, steps and learning rate of a run."""

    global_batch_size: int
    batch_size: int  # per process
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    learning_rate: float  # peak

    @property
    def num_epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch


def make_plan(recipe: Recipe, num_images: int | None, num_processes: int) -> Plan:
    """
    Batch, steps and learning rate.

    Args:
        recipe: Options of the run.
        num_images: Length of the data set, None for a stream of unknown length.
        num_processes: Processes that share a batch.

    Raises:
        UsageError: a batch that the processes cannot share, of one image, or larger than the data set; a stream of
            unknown length; more steps per epoch than the data set has.
    """
    options = recipe.optimization
    if options.per_device_train_batch_size is not None:
        global_batch_size = options.per_device_train_batch_size * num_processes
    else:
        global_batch_size = options.train_batch_size
        if global_batch_size % num_processes != 0:
            raise UsageError(
                f"a global batch of {global_batch_size} images cannot be shared by {num_processes} processes: pass a"
                " --train_batch_size that is a multiple of them, or --per_device_train_batch_size"
            )
    if global_batch_size < 2:
        raise UsageError(
            "MoCo v3 cannot train on a batch of 1: batch normalization and InfoNCE need other images. Pass a"
            " --per_device_train_batch_size of at least 2"
        )
    if num_images is not None and num_images < global_batch_size:
        raise UsageError(
            f"the data set has {num_images} images, fewer than one global batch of {global_batch_size}: pass a smaller"
            " --per_device_train_batch_size or --train_batch_size"
        )
    steps_per_epoch = recipe.data.steps_per_epoch
    if steps_per_epoch is None:
        if num_images is None:
            raise UsageError("dataset length is unknown when streaming: pass --steps_per_epoch")
        steps_per_epoch = num_images // global_batch_size
    elif num_images is not None and steps_per_epoch * global_batch_size > num_images:
        raise UsageError(
            f"--steps_per_epoch {steps_per_epoch} is too large: {num_images} images make"
            f" {num_images // global_batch_size} steps of {global_batch_size}"
        )
    full_length = options.num_train_epochs * steps_per_epoch
    total_steps = full_length if options.max_steps is None else options.max_steps
    learning_rate = options.learning_rate
    if learning_rate is None:
        # Linear scaling rule (Goyal et al. 2017; paper, §3).
        learning_rate = options.base_learning_rate * global_batch_size / 256
    return Plan(
        global_batch_size=global_batch_size,
        batch_size=global_batch_size // num_processes,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=warmup_steps(recipe, total_steps),
        learning_rate=learning_rate,
    )


def warmup_steps(recipe: Recipe, total_steps: int) -> int:
    """Steps of warmup: the same fraction of the run for any number of steps."""
    options = recipe.optimization
    return round(min(options.warmup_epochs / options.num_train_epochs, 1.0) * total_steps)


def learning_rate_at(step: int, plan: Plan) -> float:
    """Linear warmup, then half a cosine to 0, updated at every step (paper, section 4.1)."""
    return warmup_cosine(step, plan.total_steps, plan.warmup_steps, plan.learning_rate)


def ema_decay_at(step: int, recipe: Recipe, plan: Plan) -> float:
    """EMA decay of the momentum encoder at a step."""
    options = recipe.optimization
    if options.ema_schedule == "constant":
        return options.ema_decay
    return cosine_ema_decay(step, plan.total_steps, options.ema_decay)


def batches(loader: TwoViewLoader, plan: Plan, step: int, skipped_batches: int = 0) -> Iterator[dict]:
    """Batches of the steps from `step` to the end of the run, epoch after epoch, after those that were skipped."""
    first, end = step + skipped_batches, plan.total_steps + skipped_batches
    while first < end:
        epoch, step_in_epoch = divmod(first, plan.steps_per_epoch)
        for batch in loader.epoch(epoch, step_in_epoch):
            yield batch
            first += 1
            if first == end:
                return
