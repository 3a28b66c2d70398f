"""Options of all training on labels, and which of them may change while a run is continued."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import EvaluationArguments
from .features import PRECISIONS


# Of no influence on the metrics.
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
)
# What may differ between the parts of a run: of no influence on its weights.
FREE = (
    *NOT_SETTINGS,
    "model",
    "output_dir",
    "batch_size",
    "num_workers",
    "save_weights",
    "recipe",  # its options are compared
    "train_batch_size",  # the product of these three is
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
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
