"""The options that linear probe and fine-tuning share."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from ..options import option
from ..precision import resolve_precision, this_device
from ..results import RESULTS
from ..run_folder import list_checkpoints
from .common import EvaluationOptions, TrainSplitOptions
from .trainer_checkpoints import saved_precision


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """Optimization"""

    base_learning_rate: float = option(3.0, "Peak learning rate per 256 images of a batch.", above=0)
    learning_rate: float | None = option(
        None, "Peak learning rate for the whole batch, instead of --base_learning_rate.", above=0
    )
    momentum: float = option(0.9, "Momentum of SGD.", at_least=0, below=1)
    weight_decay: float = option(0.0, "Weight decay.", at_least=0)
    num_train_epochs: int = option(90, "Epochs over the training split.", at_least=1)
    max_steps: int | None = option(None, "Number of steps, to try a recipe. Overrides --num_train_epochs.", at_least=1)
    train_batch_size: int = option(1024, "Images per step, over all processes.", at_least=1)
    per_device_train_batch_size: int | None = option(
        None, "Images per forward pass and process. Overrides --train_batch_size.", at_least=1
    )
    class_balanced_sampling: bool = option(
        False, "Draw training images of all classes equally often, for imbalanced sets."
    )
    seed: int = option(0, "Seed of initial weights, order and augmentation.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """Augmentation"""

    augment: bool = option(True, "Random resized crops and flips. Otherwise the images are as for testing.")
    crop_scale: list[float] = option([0.08, 1.0], "Range of the area of a crop.", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation"""

    superclass_column: str | None = option(
        None, "Column of the superclass of each class, for the accuracy superclass_top1."
    )
    validation_fraction: float = option(
        0.0,
        "Fraction of the training split to hold out for validation. 0 validates on the test split.",
        at_least=0,
        below=1,
    )
    eval_strategy: Literal["no", "epoch"] = option("epoch", "When to validate. The test split is tested at the end.")
    load_best_model_at_end: bool = option(False, "Keep the best epoch instead of the last.")
    metric_for_best_model: str = option(
        "top1",
        "Metric of the best epoch: top1, top5, mean_per_class or loss; of multi-label data map (the default then),"
        " micro_f1 or macro_f1, of regression r2, mae or rmse; with _ema, such as top1_ema, of the EMA.",
    )
    early_stopping_patience: int | None = option(
        None, "End after this many epochs without improvement of --metric_for_best_model.", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Output"""

    output_dir: str | None = option(None, f"Folder for the classifier and {RESULTS}.", metavar="DIR", required=True)
    overwrite_output_dir: bool = option(False, "Replace the model in output_dir.")
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint to resume from. auto is the newest in output_dir, if any.", metavar="auto|DIR"
    )
    allow_data_change: bool = option(
        False,
        "Resume although the training images differ from the checkpoint's: at the same step, with the epochs and the"
        " schedule of the images that there are now.",
        advanced=True,
    )
    save_strategy: Literal["no", "epoch"] = option("epoch", "When to save a checkpoint to resume from.")
    save_total_limit: int = option(1, "Checkpoints to keep, in addition to the best.", at_least=1)
    logging_steps: int = option(50, "Steps between two lines of metrics.jsonl.", at_least=1)
    report_to: str = option("none", "Tracker: tensorboard, trackio, wandb or none.")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Hub"""

    push_to_hub: bool = option(False, "Push the classifier to the Hub at the end.")
    hub_model_id: str | None = option(None, "Repository. Defaults to the name of output_dir.", metavar="[USER/]NAME")
    hub_private_repo: bool = option(False, "Create the repository as private.")


@dataclass(frozen=True, kw_only=True)
class SupervisedOptions(
    HubOptions,
    CheckpointOptions,
    ValidationOptions,
    AugmentationOptions,
    OptimizationOptions,
    TrainSplitOptions,
    EvaluationOptions,
):
    """Recipe"""

    recipe: str | None = option(None, "Name or file of the recipe.")

    @cached_property
    def precision(self) -> str:
        """That of the checkpoints which the run resumes, else that of this machine."""
        if self.mixed_precision == "auto" and self.resume_from_checkpoint is not None and self.output_dir is not None:
            is_auto = self.resume_from_checkpoint == "auto"
            folders = list_checkpoints(self.output_dir) if is_auto else [Path(self.resume_from_checkpoint)]
            saved = next(filter(None, map(saved_precision, folders)), None)
            return resolve_precision("auto", this_device(), saved)[0]
        return super().precision
