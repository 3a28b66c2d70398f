"""What linear probe and fine-tuning share: options, and the way from a data set to a saved and recorded classifier."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from transformers import EarlyStoppingCallback, PreTrainedModel

from ..data.digits import stratified_split
from ..data.labelled import LabelledImages
from .arguments import EvaluationArguments, describe_splits, evaluation_settings, open_splits
from .checkpoints import last_checkpoint, reload_strictly
from .encoder import ProcessorTransform, check_model_path, weights_hash
from .evaluate import warn_of_one_answer
from .features import PRECISIONS, joined_processes
from .results import FILE_NAME, append_result, table
from .trainer import ClassifierTrainer, check_finite, share_of_batch, training_arguments


# Of no influence on the metrics.
_NOT_SETTINGS = (
    "cached",
    "logging_steps",
    "report_to",
    "save_strategy",
    "save_total_limit",
    "seed",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
)
_POSITIVE = (
    "base_learning_rate",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "logging_steps",
    "save_total_limit",
    "early_stopping_patience",
)


@dataclass(frozen=True)
class SupervisedArguments(EvaluationArguments):
    """Options of all training on labels."""

    recipe: str | None = field(
        default=None, metadata={"help": "Name of an evaluation recipe of the package, or a YAML file of options."}
    )
    base_learning_rate: float = field(
        default=3.0, metadata={"help": "Learning rate at a batch of 256, scaled with the batch."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate as it is, in place of the scaled one."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Of SGD."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of the optimizer."})
    num_train_epochs: int = field(default=90, metadata={"help": "Epochs over the training split."})
    max_steps: int | None = field(default=None, metadata={"help": "End after so many steps, to try a recipe out."})
    train_batch_size: int = field(default=1024, metadata={"help": "Images per step, of all processes together."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images per forward pass and process, in place of a share of train_batch_size."},
    )
    augment: bool = field(
        default=True,
        metadata={"help": "Random resized crops and flips; without, the images as they are for the test."},
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Smallest and largest share of the area in a crop."}
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Part of the training split to hold out and to classify after every epoch in place of the test"
            " split, which then has no part in choosing the best epoch."
        },
    )
    eval_strategy: str = field(
        default="epoch",
        metadata={"help": "When to classify it, the test split at the end in any case.", "choices": ["no", "epoch"]},
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint to resume from.", "choices": ["no", "epoch"]}
    )
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints to keep, beside the best."})
    load_best_model_at_end: bool = field(default=False, metadata={"help": "Keep the best epoch, not the last."})
    metric_for_best_model: str = field(
        default="top1", metadata={"help": "What the best is judged by: top1, top5, loss, top1_ema, ..."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "End after so many epochs without a better metric_for_best_model."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from; auto for the newest in output_dir, if any."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the model that is in output_dir."})
    logging_steps: int = field(default=50, metadata={"help": "Steps between two lines of the log."})
    report_to: str = field(default="none", metadata={"help": "Tracker: tensorboard, trackio, wandb, none."})
    seed: int = field(default=0, metadata={"help": "Of the start, the order and the augmentation."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push the finished folder to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository USER/NAME; by default named as output_dir."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new repository private."})


class Splits(NamedTuple):
    """The images of a training, classes numbered alike.

    Attributes:
        train: what is trained on.
        validation: classified after every epoch: the held-out part of the training split, or the test split.
        test: classified at the end.
        whole_train: the training split without anything held out.
    """

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    whole_train: LabelledImages

    def class_names(self) -> list[str]:
        """By label; numbered ones where the data set has none."""
        number = max(self.whole_train.num_classes, self.test.num_classes)
        return self.whole_train.class_names or [f"LABEL_{label}" for label in range(number)]


class Training(NamedTuple):
    """What a command makes of its arguments.

    Attributes:
        trainer: ready to train.
        transform: the preprocessing of the test, saved with the classifier.
        start: hash of the body before training, None for fresh weights.
    """

    trainer: ClassifierTrainer
    transform: ProcessorTransform
    start: str | None


def check_arguments(arguments: SupervisedArguments) -> str:
    """The output folder; ValueError for values out of range, or a folder that would lose a model."""
    for name in _POSITIVE:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 <= arguments.momentum < 1 or not 0 <= arguments.weight_decay < float("inf"):
        raise ValueError(
            f"momentum must lie in [0, 1) and weight_decay not be negative, got {arguments.momentum} and"
            f" {arguments.weight_decay}"
        )
    scale = arguments.crop_scale
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"crop_scale must be two numbers, 0 < smallest <= largest <= 1, got {scale}")
    if arguments.mixed_precision not in PRECISIONS:
        raise ValueError(f"mixed_precision must be one of {', '.join(PRECISIONS)}, got {arguments.mixed_precision!r}")
    if not 0 <= arguments.validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie in [0, 1), got {arguments.validation_fraction}")
    chooses = arguments.load_best_model_at_end or arguments.early_stopping_patience is not None
    if chooses and arguments.eval_strategy == "no":
        raise ValueError("the best epoch is chosen by evaluating every one: leave --eval_strategy epoch")
    if arguments.load_best_model_at_end and arguments.save_strategy == "no":
        raise ValueError("the best epoch is loaded from its checkpoint: leave --save_strategy epoch")
    return _checked_folder(arguments)


def _checked_folder(arguments: SupervisedArguments) -> str:
    if arguments.output_dir is None:
        raise ValueError("the classifier needs a folder of its own: add --output_dir")
    folder = os.path.expanduser(arguments.output_dir)
    if os.path.isdir(folder) and os.path.isdir(arguments.model) and os.path.samefile(folder, arguments.model):
        raise ValueError(f"output_dir {folder!r} is the folder of the model, which would be lost: give another")
    may_hold_one = arguments.overwrite_output_dir or arguments.resume_from_checkpoint is not None
    if (Path(folder) / "config.json").is_file() and not may_hold_one:
        raise ValueError(f"output_dir {folder!r} holds a model: give another, or add --overwrite_output_dir")
    return folder


def open_training_splits(arguments: SupervisedArguments) -> Splits:
    """The splits of a training; ValueError as `open_splits`, or where nothing or everything would be held out."""
    whole, test = open_splits(arguments)
    if arguments.validation_fraction == 0:
        return Splits(whole, test, test, whole)
    held_out = stratified_split(whole.labels, arguments.validation_fraction, arguments.seed)
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"validation_fraction {arguments.validation_fraction} holds out {held_out.sum()} of {len(whole)} images:"
            " too few per class"
        )
    return Splits(whole.select(np.flatnonzero(~held_out)), whole.select(np.flatnonzero(held_out)), test, whole)


def common_options(
    arguments: SupervisedArguments, num_images: int, num_processes: int, num_parts: int = 1
) -> dict[str, Any]:
    """What both commands tell `training_arguments`, batch and learning rate derived.

    Raises:
        ValueError: a batch that the processes cannot share or that exceeds the split.
    """
    share = share_of_batch(
        arguments.train_batch_size, arguments.per_device_train_batch_size, num_processes, num_images, num_parts
    )
    learning_rate = arguments.learning_rate
    if learning_rate is None:
        learning_rate = arguments.base_learning_rate * share * num_processes * num_parts / 256
    chooses = arguments.load_best_model_at_end or arguments.early_stopping_patience is not None
    names = ("num_train_epochs", "mixed_precision", "num_workers", "seed", "eval_strategy", "save_strategy")
    names += ("save_total_limit", "load_best_model_at_end", "logging_steps", "report_to")
    return {name: getattr(arguments, name) for name in names} | {
        "batch_size": share,
        "learning_rate": learning_rate,
        "gradient_accumulation_steps": num_parts,
        "max_steps": arguments.max_steps or -1,
        "metric_for_best_model": arguments.metric_for_best_model if chooses else None,
    }


def build_trainer(
    classifier: PreTrainedModel,
    splits: Splits,
    transform: ProcessorTransform,
    arguments: SupervisedArguments,
    output_dir: str,
    train_dataset,
    options: dict[str, Any],
    **trainer_options,
) -> ClassifierTrainer:
    """The trainer of a classifier.

    Args:
        classifier, splits, transform: what is trained, on what, and the preprocessing of the test.
        arguments, output_dir: of the command.
        train_dataset: the training images with their augmentation.
        options: of `training_arguments`.
        trainer_options: others of `ClassifierTrainer`.

    Raises:
        ValueError: the best epoch is to be judged by something that is not measured.
    """
    if arguments.load_best_model_at_end or arguments.early_stopping_patience is not None:
        _check_metric(arguments.metric_for_best_model, splits, trainer_options.get("ema_momentum", 0) > 0)
    trainer = ClassifierTrainer(
        classifier,
        training_arguments(output_dir, **options),
        train_dataset,
        splits.validation,
        transform,
        {name: getattr(arguments, name) for name in ("batch_size", "num_workers", "mixed_precision")},
        **trainer_options,
    )
    if arguments.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(arguments.early_stopping_patience))
    return trainer


def _check_metric(name: str, splits: Splits, has_average: bool) -> None:
    known = ["top1", *(["top5"] if len(splits.class_names()) > 5 else []), "mean_per_class", "loss"]
    known += [f"{metric}_ema" for metric in known] if has_average else []
    if name not in known:
        raise ValueError(f"metric_for_best_model must be one of {', '.join(known)}, got {name!r}")


def run_training(
    arguments: SupervisedArguments,
    task: str,
    build: Callable[[SupervisedArguments, Splits, str, int], Training],
    push: Callable[..., str] | None = None,
) -> dict[str, float]:
    """Open, train, evaluate, save, record, push, on all processes of this run.

    Args:
        arguments: of the command.
        task: name of the evaluation in `results.json`, and first part of its metrics.
        build: what is special to the command, called with arguments, splits, output folder and number of processes.
        push: `push(folder, repository, private=...)` for `--push_to_hub`: the room of the Hub is on the same floor.

    Raises:
        ValueError: as what it calls.
    """
    folder = check_arguments(arguments)
    if arguments.push_to_hub and push is None:
        raise ValueError("--push_to_hub works in the scripts; from Python pass push")
    check_model_path(arguments.model)
    with joined_processes() as state:
        return _run(arguments, task, build, push, state, folder)


def _run(arguments, task, build, push, state: PartialState, folder: str) -> dict[str, float]:
    splits = open_training_splits(arguments)
    training = build(arguments, splits, folder, state.num_processes)
    trainer = training.trainer
    checkpoint = _checkpoint_of(arguments, folder)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    check_finite(trainer.model)
    if trainer.frozen is not None and weights_hash(trainer.frozen) != training.start:
        raise ValueError(
            f"the body is not that of {arguments.model!r} any more: was {checkpoint!r} trained on another model?"
        )
    found = trainer.evaluate(splits.test, metric_key_prefix=task)
    metrics = {name: value for name, value in found.items() if not name.startswith(f"{task}_loss")}
    if trainer.is_world_process_zero():
        seconds = time.perf_counter() - started
        warn_of_one_answer(metrics[f"{task}_answered_classes"], splits.test)
        chosen = trainer.model
        if trainer.average is not None and arguments.save_weights == "ema":
            chosen = trainer.average
        evaluated = _save(chosen, training.transform, folder)
        append_result(
            folder,
            task=task,
            model={"name": arguments.model, "weights": training.start, "classifier": evaluated},
            dataset=describe_splits(arguments, splits.whole_train, splits.test),
            metrics=metrics,
            settings=_settings(arguments, training),
            seed=arguments.seed,
            seconds=seconds,
        )
        print(table(metrics, f"{task}: {arguments.model} on {arguments.dataset_name}, split {arguments.test_split}"))
        print(f"classifier saved and recorded in {Path(folder) / FILE_NAME}")
        if arguments.push_to_hub:
            _push(push, folder, arguments)
    return metrics


def _checkpoint_of(arguments: SupervisedArguments, folder: str) -> str | None:
    checkpoint = arguments.resume_from_checkpoint
    checkpoint = last_checkpoint(folder) if checkpoint == "auto" else checkpoint
    if checkpoint is not None and not os.path.isdir(checkpoint):
        raise ValueError(f"checkpoint {checkpoint!r} does not exist: give a folder checkpoint-N, or auto")
    return checkpoint


def _save(classifier: PreTrainedModel, transform: ProcessorTransform, folder: str) -> str:
    """Hash of the weights; what stands in the folder is what was evaluated, weight for weight, or this raises."""
    classifier.save_pretrained(folder)
    transform.processor.save_pretrained(folder)
    evaluated = weights_hash(classifier)
    reload_strictly(classifier, folder)
    if weights_hash(classifier) != evaluated:
        raise ValueError(f"the classifier in {folder!r} is not the one that was trained: the disk is damaged")
    return evaluated


def _settings(arguments: SupervisedArguments, training: Training) -> dict[str, Any]:
    trainer = training.trainer
    args, state = trainer.args, trainer.state
    settings = {
        **{name: value for name, value in evaluation_settings(arguments).items() if name not in _NOT_SETTINGS},
        "learning_rate": args.learning_rate,
        "train_batch_size": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "steps": state.global_step,
        "transform": repr(training.transform),
        "train_transform": repr(trainer.train_dataset.transform),
    }
    if args.load_best_model_at_end:
        by = "test split" if arguments.validation_fraction == 0 else "held-out part of the training split"
        settings["best"] = {"step": state.best_global_step, "metric": state.best_metric, "measured_on": by}
    return settings


def _push(push: Callable[..., str], folder: str, arguments: SupervisedArguments) -> None:
    name = arguments.hub_model_id or Path(folder).resolve().name
    try:
        url = push(folder, name, private=arguments.hub_private_repo)
    except RuntimeError as error:
        raise ValueError(
            f"the classifier is finished and saved in {folder!r}, but not on the Hub: {error}; push it with"
            f" scripts/push_to_hub.py {folder} --hub_model_id {name}"
        ) from error
    print(f"pushed: {url}")
