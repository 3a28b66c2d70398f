"""
The command `mocov3 linear-probe`: the published linear protocol, a classifier trained by SGD on augmented images with
a frozen encoder; with `--cached`, classifiers on features of the images without augmentation.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..data.labeled import LabeledImages
from ..loading import pooled_features
from ..options import Command, build, given_values, option
from ..problem_types import REGRESSION
from ..recipe_files import RECIPES
from ..reporting import UsageError, is_first_process, reporting
from ..results import RESULTS
from ..weights import weights_hash
from . import cached_linear
from .cached_linear import CachedLinearOptions, CachedOptions
from .classifier import head_parameters, load_with_new_head
from .features import rows_of_split
from .pixels import open_transform
from .splits import Splits
from .supervised import Training, build_trainer, common_options, run_training
from .supervised_options import SupervisedOptions
from .sweep import INITIAL_STD
from .trainer import ClassifierTrainer
from .training_images import TrainingImages, training_transform


# Images for the largest learning rate of a regression.
_CURVATURE_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class LinearProbeOptions(SupervisedOptions):
    """Protocol"""

    cached: bool = option(
        False, "Train on features of the images without augmentation, computed once, with options of their own below."
    )
    output_dir: str | None = option(
        None,
        f"Folder for the classifier and {RESULTS}, required; with --cached, defaults to the folder of the model.",
        metavar="DIR",
    )
    base_learning_rate: float = option(
        3.0, "Peak learning rate per 256 images of a batch: 3 for ViT, 0.1 for ResNet.", above=0
    )
    validation_fraction: float = option(
        0.0,
        "Fraction of the training split to hold out for validation. 0 validates on the test split. Defaults to 0.1"
        " with --cached.",
        at_least=0,
        below=1,
    )


COMMAND = Command(
    "linear-probe",
    "Train a linear classifier on a frozen encoder.",
    (LinearProbeOptions, CachedOptions),
    "model",
    RECIPES,
)


def parse_options(arguments: list[str]) -> LinearProbeOptions | CachedLinearOptions:
    """
    The options of a command line, of the published protocol or with `--cached`.

    Raises:
        UsageError: As `parse`, and for options that only the other of the two has.
    """
    return choose_protocol(given_values(COMMAND, arguments))


def choose_protocol(given: Mapping[str, Any]) -> LinearProbeOptions | CachedLinearOptions:
    """The options of the protocol that `cached` chooses; UsageError as `parse_options`."""
    cached = given.get("cached", False)
    group = CachedLinearOptions if cached else LinearProbeOptions
    misplaced = next((name for name in given if name not in {field.name for field in fields(group)}), None)
    if misplaced is not None:
        works, fix = ("without", "leave out one of them") if cached else ("with", "add --cached, or leave it out")
        raise UsageError(f"--{misplaced} works only {works} --cached: {fix}")
    return build(group, given)


def build_linear_trainer(
    classifier, splits: Splits, transform, options: LinearProbeOptions, output_dir: str, num_processes: int = 1
) -> ClassifierTrainer:
    """
    The trainer of a linear probe; freezes the backbone of `classifier`.

    SGD on the head alone, with a cosine learning rate from `base_learning_rate · batch / 256` to 0 over all steps; of
    a regression at most from `largest_learning_rate`.

    Raises:
        ValueError: A batch that cannot be divided among the processes or exceeds the split.
    """
    training = common_options(options, len(splits.train), num_processes)
    backbone = classifier.base_model
    if splits.problem_type == REGRESSION:
        batch_size = training["batch_size"] * num_processes
        largest = largest_learning_rate(backbone, splits.train, transform, options, batch_size)
        if training["learning_rate"] > largest:
            if is_first_process():
                print(
                    f"learning rate {training['learning_rate']:g} lowered to {largest:g}: with a squared error, a"
                    " larger one diverges on these features",
                    file=sys.stderr,
                )
            training["learning_rate"] = largest
    backbone.requires_grad_(False)
    optimizer = torch.optim.SGD(
        list(head_parameters(classifier).values()),
        lr=training["learning_rate"],
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    augmented = training_transform(transform, options.crop_scale) if options.augment else transform
    return build_trainer(
        classifier,
        splits,
        transform,
        options,
        output_dir,
        TrainingImages(splits.train, augmented, options.seed, getattr(transform, "pixel_format", None)),
        training,
        frozen=backbone,
        optimizers=(optimizer, None),
    )


def largest_learning_rate(
    backbone, images: LabeledImages, transform, options: LinearProbeOptions, batch_size: int
) -> float:
    """
    1 / (L + S / (b (1 - m))), one digit, for SGD with momentum m and batches of b images. L is the largest curvature
    of the mean squared error on some of the training images, S the sum of all curvatures: descent with the whole set
    diverges above 2 (1 + m) / L, with single images above about 2 (1 - m) / S. The published learning rates are for
    cross-entropy, whose gradient is bounded.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, _CURVATURE_IMAGES).round().astype(int))
    settings = {**options.of_pass(), "mixed_precision": "no", "progress": False}
    features = rows_of_split(backbone, pooled_features, images.select(rows), transform, **settings).double()
    inputs = torch.cat([features, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)  # with the bias
    curvatures = 2 * torch.linalg.svdvals(inputs) ** 2 / (len(rows) * images.num_classes)
    of_batches = curvatures.sum() / (batch_size * (1 - options.momentum))
    return float(f"{1 / (curvatures.max() + of_batches):.0e}")


def build_training(options: LinearProbeOptions, splits: Splits, folder: str, num_processes: int) -> Training:
    """Load the model with a new head. Raises ValueError for a user's mistake."""
    classifier = load_with_new_head(
        options.model, splits.class_names(), std=INITIAL_STD, seed=options.seed, problem_type=splits.problem_type
    )
    transform = open_transform(options, classifier.config, splits.whole_train)
    start = weights_hash(classifier.base_model)
    trainer = build_linear_trainer(classifier, splits, transform, options, folder, num_processes)
    return Training(trainer, transform, start)


def run(
    options: LinearProbeOptions | CachedLinearOptions,
    callbacks: Sequence[TrainerCallback] = (),
    how_to_resume: str | None = None,
) -> dict[str, float]:
    """Load, train, evaluate, save, record, push. Raises ValueError for a user's mistake, RunError for divergence."""
    if isinstance(options, CachedLinearOptions):
        return cached_linear.run(options)
    return run_training(options, "linear", build_training, callbacks, how_to_resume)


def main(arguments: list[str]) -> dict[str, float]:
    """The command `mocov3 linear-probe`."""
    with reporting():
        return run(parse_options(arguments))
