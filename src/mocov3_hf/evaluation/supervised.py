"""What linear probe and fine-tuning share: the way from a data set to a saved and recorded classifier."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..data.fingerprint import labeled_fingerprint
from ..data.workers import cores_shared_with
from ..hints import describe_missing
from ..hub.push import check_repo_id, push_folder
from ..loading import resolve_model
from ..option_values import resume_command
from ..problem_types import SINGLE_LABEL, SUPERCLASSES, THRESHOLDS
from ..process_group import Stopped, StopRequest, joined_processes, process_state
from ..processing import ProcessorTransform
from ..reporting import RunError, UsageError, one_line
from ..requirements import check_tracker
from ..results import RESULTS, append_result
from ..run_folder import CONFIG
from ..storage import writing
from ..weights import weights_hash
from .common import describe_splits, evaluation_settings, folder_to_write, plain_options, print_metrics
from .evaluate import float32_if_regression, warn_of_one_answer, warn_of_worse_than_mean
from .problems import TargetScale, superclasses_of
from .splits import Splits, check_problem, greater_is_better, metric_of_best, open_training_splits
from .supervised_options import SupervisedOptions
from .trainer import ClassifierTrainer, StopOnSignal, check_finite, training_arguments
from .trainer_checkpoints import DATA_SETTINGS, check_readable, newest_checkpoint, reload_strictly


# Options without influence on the metrics.
NOT_SETTINGS = (
    "cached",
    "logging_steps",
    "report_to",
    "save_strategy",
    "save_total_limit",
    "seed",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "allow_data_change",
    "superclass_column",
)
# Options that may change when a run is resumed: they have no influence on its weights.
FREE = (
    *NOT_SETTINGS,
    "model",
    "output_dir",
    "batch_size",
    "dataloader_num_workers",
    "save_weights",
    "recipe",  # its options are compared
    "train_batch_size",  # the product of these three is
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


class Training(NamedTuple):
    """
    What a command builds from its options.

    Attributes:
        trainer: Ready to train.
        transform: Preprocessing of the test, saved with the classifier.
        start: Hash of the backbone before training, None for new weights.
    """

    trainer: ClassifierTrainer
    transform: ProcessorTransform
    start: str | None


def check_options(options: SupervisedOptions) -> str:
    """The output folder; UsageError for options that do not fit together, or a folder whose model would be lost."""
    scale = options.crop_scale
    if len(scale) != 2 or scale[0] > scale[1]:
        raise UsageError(f"--crop_scale takes two numbers, the smallest and the largest area, got {scale}")
    if chooses(options) and options.eval_strategy == "no":
        raise UsageError("the best epoch is selected by validation: leave out --eval_strategy no")
    if options.load_best_model_at_end and options.save_strategy == "no":
        raise UsageError("the best epoch is loaded from its checkpoint: leave out --save_strategy no")
    if options.report_to not in ("none", "all"):
        check_tracker(options.report_to, INTEGRATION_TO_CALLBACK, get_available_reporting_integrations())
    if options.output_dir is None:
        raise UsageError("--output_dir is missing: the classifier needs a folder of its own")
    folder, model = folder_to_write(options.output_dir), resolve_model(options.model)
    if os.path.isdir(folder) and os.path.isdir(model) and os.path.samefile(folder, model):
        raise UsageError(f"--output_dir {folder!r} is the folder of the model, which would be lost: pass another")
    may_hold_one = options.overwrite_output_dir or options.resume_from_checkpoint is not None
    if (Path(folder) / CONFIG).is_file() and not may_hold_one:
        raise UsageError(f"--output_dir {folder!r} holds a model: pass another, or --overwrite_output_dir")
    if options.push_to_hub:
        check_repo_id(_repo_id(folder, options))
    return folder


def chooses(options: SupervisedOptions) -> bool:
    """Whether the run depends on which epoch is the best."""
    return options.load_best_model_at_end or options.early_stopping_patience is not None


def common_options(
    options: SupervisedOptions, num_images: int, num_processes: int, num_parts: int = 1
) -> dict[str, Any]:
    """
    The arguments of `training_arguments` for both commands, with batch and learning rate derived.

    Raises:
        ValueError: A batch that cannot be divided among the processes or exceeds the split.
    """
    share = share_of_batch(
        options.train_batch_size, options.per_device_train_batch_size, num_processes, num_images, num_parts
    )
    learning_rate = options.learning_rate
    if learning_rate is None:
        learning_rate = options.base_learning_rate * share * num_processes * num_parts / 256
    names = ("num_train_epochs", "seed", "eval_strategy", "save_strategy")
    names += ("save_total_limit", "load_best_model_at_end", "logging_steps", "report_to")
    return {name: getattr(options, name) for name in names} | {
        "mixed_precision": options.precision,
        "batch_size": share,
        "learning_rate": learning_rate,
        "gradient_accumulation_steps": num_parts,
        "dataloader_num_workers": options.num_workers,
        "max_steps": options.max_steps or -1,
    }


def share_of_batch(
    train_batch_size: int, per_device: int | None, num_processes: int, num_images: int, num_parts: int = 1
) -> int:
    """
    Images per process and forward pass.

    Args:
        train_batch_size: Over all processes.
        per_device: Of one process and forward pass, which overrides it; None for its share.
        num_processes: Of this run.
        num_images: Of the training split.
        num_parts: Forward passes per step, whose gradients are accumulated.

    Raises:
        ValueError: A batch that cannot be divided equally, is empty, or exceeds the split.
    """
    shares = num_processes * num_parts
    if per_device is None and train_batch_size % shares != 0:
        parts = f" x {num_parts} accumulation steps" if num_parts > 1 else ""
        raise ValueError(
            f"a batch of {train_batch_size} images cannot be divided equally among {num_processes} processes{parts}:"
            f" pass a --train_batch_size that is a multiple of {shares}, or --per_device_train_batch_size"
        )
    share = train_batch_size // shares if per_device is None else per_device
    if not 1 <= share * shares <= num_images:
        raise ValueError(
            f"the batch must have between 1 image and the {num_images} of the training split, got {share * shares}:"
            " pass another --train_batch_size"
        )
    return share


def build_trainer(
    classifier: PreTrainedModel,
    splits: Splits,
    transform: ProcessorTransform,
    options: SupervisedOptions,
    output_dir: str,
    train_dataset: Dataset,
    training: dict[str, Any],
    **trainer_options: Any,
) -> ClassifierTrainer:
    """
    The trainer of a classifier.

    Args:
        classifier, splits, transform: What is trained, on what, and the preprocessing of the test.
        options, output_dir: Of the command.
        train_dataset: The training images with their augmentation.
        training: Arguments of `training_arguments`.
        trainer_options: Other arguments of `ClassifierTrainer`.

    Raises:
        UsageError: The metric of the best epoch is not computed.
    """
    metric = metric_of_best(options, splits, trainer_options.get("ema_decay", 0) > 0)
    check_problem(options, splits)
    scale = TargetScale.of(splits.train)
    if chooses(options):
        training |= {"metric_for_best_model": metric, "greater_is_better": greater_is_better(metric)}
    kept = {name: value for name, value in plain_options(options).items() if name not in FREE}
    kept["class_balanced_sampling"] = options.class_balanced_sampling
    if splits.problem_type != SINGLE_LABEL:
        kept["problem_type"] = splits.problem_type
    if scale is not None:  # the head is in units of these
        kept |= {"target_mean": scale.mean.tolist(), "target_std": scale.std.tolist()}
    batch = training["batch_size"] * training["gradient_accumulation_steps"] * process_state().num_processes
    kept |= dict(zip(DATA_SETTINGS, (len(splits.train), labeled_fingerprint(splits.whole_train)), strict=True))
    kept |= {
        "mixed_precision": options.precision,
        "seed": options.seed,
        "learning_rate": training["learning_rate"],
        "train_batch_size": batch,
    }
    trainer = ClassifierTrainer(
        classifier,
        training_arguments(output_dir, **training),
        train_dataset,
        splits.validation,
        transform,
        options.of_pass(),
        settings=kept,
        free_settings=DATA_SETTINGS if options.allow_data_change else (),
        target_scale=scale,
        is_class_balanced=options.class_balanced_sampling,
        superclasses=superclasses_of(splits.whole_train, len(splits.class_names())),
        **trainer_options,
    )
    if options.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(options.early_stopping_patience))
    return trainer


def run_training(
    options: SupervisedOptions,
    task: str,
    build_training: Callable[[Any, Splits, str, int], Training],
    callbacks: Sequence[TrainerCallback] = (),
    how_to_resume: str | None = None,
) -> dict[str, float]:
    """
    Open, train, evaluate, save, record, push, on all processes of this run. SIGTERM, SIGINT and SIGUSR1 end the
    training with a checkpoint; nothing is evaluated then, and no metrics are returned.

    Args:
        options: Of the command.
        task: Name of the evaluation in `results.json`, and prefix of its metrics.
        build_training: What differs between the commands: from options, splits, output folder, number of processes.
        callbacks: Added to the trainer.
        how_to_resume: What messages say; None for the command that was typed.

    Raises:
        ValueError: A user's mistake.
        RunError: Divergence, or a push that failed.
    """
    folder = check_options(options)
    with joined_processes() as state, cores_shared_with(options.num_workers, state.num_processes):
        try:
            with StopRequest() as stop:
                splits = open_training_splits(options)
                training = build_training(options, splits, folder, state.num_processes)
                trainer = training.trainer
                checkpoint = _checkpoint_of(options, folder)
                on_signal = StopOnSignal(trainer, stop)
                for callback in (on_signal, *callbacks):
                    trainer.add_callback(callback)
                stop.start_training()
                started = time.perf_counter()
                trainer.train(resume_from_checkpoint=checkpoint)
                stop.is_command = on_signal.stopped  # and the process is about to end
            step = trainer.state.global_step if on_signal.stopped else None
        except Stopped:
            step = 0
        if step is not None:
            if state.is_main_process:
                when = f"after step {step}" if step else "before training"
                print(f"stopped by {stop.describe()} {when}; to resume:")
                print(f"  {how_to_resume or resume_command(sys.argv[1:])}")
            return {}
        check_finite(trainer.model)
        if trainer.frozen is not None and weights_hash(trainer.frozen) != training.start:
            raise ValueError(
                f"the backbone is not that of {options.model!r}: checkpoint {checkpoint!r} was trained on another"
                " model, pass that one as --model"
            )
        trainer.finish(splits.held_out())
        found = trainer.evaluate(splits.test, metric_key_prefix=task)
        metrics = {name: value for name, value in found.items() if not name.startswith(f"{task}_loss")}
        if trainer.is_world_process_zero():
            seconds = time.perf_counter() - started
            warn_of_one_answer(metrics.get(f"{task}_answered_classes"), splits.test)
            suffix = "_ema" if trainer.average is not None and options.save_weights == "ema" else ""
            warn_of_worse_than_mean(metrics.get(f"{task}_r2{suffix}"))
            chosen = trainer.models[suffix]
            for name, value in ((THRESHOLDS, trainer.thresholds.get(suffix)), (SUPERCLASSES, trainer.superclasses)):
                if value is not None:
                    setattr(chosen.config, name, value)
            print_metrics(options, task, metrics)  # first, as the disk may be full
            append_result(
                folder,
                task=task,
                model={
                    "name": options.model,
                    "weights": training.start,
                    "classifier": _save(chosen, training.transform, folder),
                },
                dataset=describe_splits(options, splits.whole_train, splits.test),
                metrics=metrics,
                plots=trainer.plots[suffix],
                settings={**_settings(options, training), **float32_if_regression(splits.test)},
                seed=options.seed,
                seconds=seconds,
            )
            print(f"classifier saved and recorded in {Path(folder) / RESULTS}")
            if options.push_to_hub:
                _push(folder, options)
        return metrics


def _checkpoint_of(options: SupervisedOptions, folder: str) -> str | None:
    checkpoint = options.resume_from_checkpoint
    if checkpoint == "auto":
        checkpoint = newest_checkpoint(folder)
    if checkpoint is not None and not os.path.isdir(checkpoint):
        raise UsageError(describe_missing(checkpoint, "checkpoint", "pass a folder checkpoint-N, or auto"))
    if checkpoint is not None:
        check_readable(Path(checkpoint))
    return checkpoint


def _save(classifier: PreTrainedModel, transform: ProcessorTransform, folder: str) -> str:
    """Save a classifier, read it again, and return the hash of its weights."""
    with writing(f"the classifier in {folder}"):
        classifier.save_pretrained(folder)
        transform.processor.save_pretrained(folder)
    evaluated = weights_hash(classifier)
    reload_strictly(classifier, folder)
    if weights_hash(classifier) != evaluated:
        raise RunError(
            f"the classifier in {folder!r} differs from the one that was evaluated: the disk may be damaged"
        )
    return evaluated


def _settings(options: SupervisedOptions, training: Training) -> Mapping[str, Any]:
    trainer = training.trainer
    args, state = trainer.args, trainer.state
    settings = {
        **{name: value for name, value in evaluation_settings(options).items() if name not in NOT_SETTINGS},
        "learning_rate": args.learning_rate,
        "train_batch_size": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "steps": state.global_step,
        "transform": repr(training.transform),
        "train_transform": repr(trainer.train_dataset.transform),
    }
    if args.load_best_model_at_end:
        by = "test split" if options.validation_fraction == 0 else "held-out part of the training split"
        settings["best"] = {"step": state.best_global_step, "metric": state.best_metric, "measured_on": by}
    return settings


def _repo_id(folder: str, options: SupervisedOptions) -> str:
    return options.hub_model_id or Path(folder).resolve().name


def _push(folder: str, options: SupervisedOptions) -> None:
    name = _repo_id(folder, options)
    try:
        url = push_folder(folder, name, private=options.hub_private_repo)
    except (UsageError, RunError) as error:
        private = ["--hub_private_repo"] if options.hub_private_repo else []
        command = shlex.join(["mocov3", "push", folder, "--hub_model_id", name, *private])
        raise type(error)(
            f"the classifier is saved in {folder!r}, but the push failed: {one_line(error)}; push it with: {command}"
        ) from error
    print(f"pushed: {url}")
