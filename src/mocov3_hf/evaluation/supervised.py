"""What linear probe and fine-tuning share: the way from a data set to a saved and recorded classifier."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from transformers import EarlyStoppingCallback, PreTrainedModel

from ..data.labelled import LabelledImages, stratified_split
from .arguments import describe_splits, evaluation_settings, open_splits
from .checkpoints import last_checkpoint, reload_strictly
from .encoder import ProcessorTransform, check_model_path, weights_hash
from .evaluate import warn_of_one_answer
from .features import joined_processes, process_state
from .results import FILE_NAME, append_result, table
from .supervised_arguments import FREE, NOT_SETTINGS, SupervisedArguments, check_arguments
from .trainer import ClassifierTrainer, check_finite, share_of_batch, training_arguments


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
        settings=_settings_to_keep(arguments, options),
        **trainer_options,
    )
    if arguments.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(arguments.early_stopping_patience))
    return trainer


def _settings_to_keep(arguments: SupervisedArguments, options: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in asdict(arguments).items() if name not in FREE and name != "seed"}
    batch = options["batch_size"] * options["gradient_accumulation_steps"] * process_state().num_processes
    return {**told, "seed": arguments.seed, "learning_rate": options["learning_rate"], "train_batch_size": batch}


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
        **{name: value for name, value in evaluation_settings(arguments).items() if name not in NOT_SETTINGS},
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
