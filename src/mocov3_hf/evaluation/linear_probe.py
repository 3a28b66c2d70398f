"""The published linear protocol: a classifier trained by SGD on augmented images, on a body that stays frozen."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from ..data.labelled import LabelledImages
from . import cached_linear
from .arguments import (
    EvaluationArguments,
    describe_splits,
    ending_in_one_line,
    evaluation_settings,
    open_splits,
    parse_arguments,
)
from .classifier import head_parameters, load_with_new_head
from .encoder import check_model_path, load_transform, weights_hash
from .features import PRECISIONS, joined_processes
from .results import FILE_NAME, append_result, table
from .sweep import INITIAL_STD, MOMENTUM
from .trainer import (
    ClassifierTrainer,
    TrainingImages,
    check_finite,
    last_checkpoint,
    reload_strictly,
    share_of_batch,
    training_arguments,
    training_transform,
)


# Of no influence on the metrics.
_NOT_SETTINGS = ("cached", "logging_steps", "report_to", "save_strategy", "save_total_limit", "seed")


@dataclass(frozen=True)
class LinearProbeArguments(EvaluationArguments):
    """Arguments of `scripts/linear_probe.py`; those of `--cached` are others: `--cached --help`."""

    recipe: str | None = field(
        default=None, metadata={"help": "Name of an evaluation recipe of the package, or a YAML file of options."}
    )
    cached: bool = field(
        default=False,
        metadata={"help": "Train on features of the unaugmented images instead; has options of its own."},
    )
    base_learning_rate: float = field(
        default=3.0,
        metadata={"help": "Learning rate at a batch of 256, scaled with the batch: 3 for ViT, 0.1 for ResNet."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate as it is, in place of the scaled one."}
    )
    momentum: float = field(default=MOMENTUM, metadata={"help": "Of SGD."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of SGD, on the head."})
    num_train_epochs: int = field(default=90, metadata={"help": "Epochs over the training split."})
    train_batch_size: int = field(default=1024, metadata={"help": "Images per step, of all processes together."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Images per step and process, in place of a share of train_batch_size."}
    )
    augment: bool = field(
        default=True,
        metadata={"help": "Random resized crops and flips; without, the images as they are for the test."},
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Smallest and largest share of the area in a crop."}
    )
    eval_strategy: str = field(
        default="epoch",
        metadata={"help": "When to classify the test split, at the end in any case.", "choices": ["no", "epoch"]},
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint to resume from.", "choices": ["no", "epoch"]}
    )
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints to keep."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from; auto for the newest in output_dir, if any."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the model that is in output_dir."})
    logging_steps: int = field(default=50, metadata={"help": "Steps between two lines of the log."})
    report_to: str = field(default="none", metadata={"help": "Tracker: tensorboard, trackio, wandb, none."})
    seed: int = field(default=0, metadata={"help": "Of the start, the order and the augmentation."})


def check_arguments(arguments: LinearProbeArguments) -> str:
    """The output folder; ValueError for values out of range, or a folder that would lose a model."""
    for name in ("base_learning_rate", "learning_rate", "num_train_epochs", "logging_steps", "save_total_limit"):
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
    if arguments.output_dir is None:
        raise ValueError("the classifier needs a folder of its own: add --output_dir")
    folder = os.path.expanduser(arguments.output_dir)
    if os.path.isdir(folder) and os.path.isdir(arguments.model) and os.path.samefile(folder, arguments.model):
        raise ValueError(f"output_dir {folder!r} is the folder of the model, which would be lost: give another")
    may_hold_one = arguments.overwrite_output_dir or arguments.resume_from_checkpoint is not None
    if (Path(folder) / "config.json").is_file() and not may_hold_one:
        raise ValueError(f"output_dir {folder!r} holds a model: give another, or add --overwrite_output_dir")
    return folder


def build_trainer(
    classifier: PreTrainedModel,
    train: LabelledImages,
    test: LabelledImages,
    transform,
    arguments: LinearProbeArguments,
    output_dir: str,
    num_processes: int = 1,
) -> ClassifierTrainer:
    """The trainer of a linear probe. Freezes the body of `classifier`.

    SGD on the head alone, its learning rate `base_learning_rate · batch / 256` and from there to 0 along a cosine over
    all steps.

    Raises:
        ValueError: a batch that the processes cannot share or that exceeds the split.
    """
    share = share_of_batch(
        arguments.train_batch_size, arguments.per_device_train_batch_size, num_processes, len(train)
    )
    learning_rate = arguments.learning_rate
    if learning_rate is None:
        learning_rate = arguments.base_learning_rate * share * num_processes / 256
    body = classifier.base_model
    body.requires_grad_(False)
    optimizer = torch.optim.SGD(
        list(head_parameters(classifier).values()),
        lr=learning_rate,
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
    )
    seen = training_transform(transform, arguments.crop_scale) if arguments.augment else transform
    return ClassifierTrainer(
        classifier,
        training_arguments(
            output_dir,
            batch_size=share,
            learning_rate=learning_rate,
            num_train_epochs=arguments.num_train_epochs,
            mixed_precision=arguments.mixed_precision,
            num_workers=arguments.num_workers,
            seed=arguments.seed,
            eval_strategy=arguments.eval_strategy,
            save_strategy=arguments.save_strategy,
            save_total_limit=arguments.save_total_limit,
            logging_steps=arguments.logging_steps,
            report_to=arguments.report_to,
        ),
        TrainingImages(train, seen, arguments.seed),
        test,
        transform,
        {
            "batch_size": arguments.batch_size,
            "num_workers": arguments.num_workers,
            "mixed_precision": arguments.mixed_precision,
        },
        frozen=body,
        optimizers=(optimizer, None),
    )


def run(arguments: LinearProbeArguments) -> dict[str, float]:
    """Load, train, evaluate, save, record, on all processes of this run. Raises ValueError as what it calls."""
    folder = check_arguments(arguments)
    check_model_path(arguments.model)
    with joined_processes() as state:
        return _run(arguments, state, folder)


def _run(arguments: LinearProbeArguments, state: PartialState, folder: str) -> dict[str, float]:
    train, test = open_splits(arguments)
    num_classes = max(train.num_classes, test.num_classes)
    names = train.class_names or [f"LABEL_{number}" for number in range(num_classes)]
    classifier = load_with_new_head(arguments.model, names, std=INITIAL_STD, seed=arguments.seed)
    transform = load_transform(arguments.model, classifier, arguments.image_size)
    body_before = weights_hash(classifier.base_model)
    checkpoint = arguments.resume_from_checkpoint
    checkpoint = last_checkpoint(folder) if checkpoint == "auto" else checkpoint
    if checkpoint is not None and not os.path.isdir(checkpoint):
        raise ValueError(f"checkpoint {checkpoint!r} does not exist: give a folder checkpoint-N, or auto")
    started = time.perf_counter()
    trainer = build_trainer(classifier, train, test, transform, arguments, folder, state.num_processes)
    trainer.train(resume_from_checkpoint=checkpoint)
    check_finite(classifier)
    if weights_hash(classifier.base_model) != body_before:
        raise ValueError(
            f"the body is not that of {arguments.model!r} any more: was {checkpoint!r} trained on another model?"
        )
    found = trainer.evaluate(metric_key_prefix="linear")
    metrics = {name: value for name, value in found.items() if name != "linear_loss"}
    if trainer.is_world_process_zero():
        classifier.save_pretrained(folder)
        transform.processor.save_pretrained(folder)
        # What stands in the folder is what was evaluated, weight for weight, or this raises.
        evaluated = weights_hash(classifier)
        reload_strictly(classifier, folder)
        if weights_hash(classifier) != evaluated:
            raise ValueError(f"the classifier in {folder!r} is not the one that was trained: the disk is damaged")
        settings = {name: value for name, value in evaluation_settings(arguments).items() if name not in _NOT_SETTINGS}
        append_result(
            folder,
            task="linear",
            model={"name": arguments.model, "weights": body_before, "classifier": evaluated},
            dataset=describe_splits(arguments, train, test),
            metrics=metrics,
            settings={
                **settings,
                "learning_rate": trainer.args.learning_rate,
                "train_batch_size": trainer.args.per_device_train_batch_size * state.num_processes,
                "steps": trainer.state.global_step,
                "transform": repr(transform),
                "train_transform": repr(trainer.train_dataset.transform),
            },
            seed=arguments.seed,
            seconds=time.perf_counter() - started,
        )
        print(table(metrics, f"linear: {arguments.model} on {arguments.dataset_name}, split {arguments.test_split}"))
        print(f"classifier saved and recorded in {Path(folder) / FILE_NAME}")
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line of linear evaluation. Bad input ends the process with one line and status 1.

    Args:
        argv: None for those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--cached" in argv:
        return cached_linear.main(argv)
    with ending_in_one_line():
        return run(parse_arguments(LinearProbeArguments, argv, "Linear evaluation of any vision model."))
