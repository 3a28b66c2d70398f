"""The published linear protocol: a classifier trained by SGD on augmented images, on a body that stays frozen."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from . import cached_linear
from .arguments import run_command
from .classifier import head_parameters, load_with_new_head
from .encoder import load_transform, weights_hash
from .supervised import Splits, Training, build_trainer, common_options, run_training
from .supervised_arguments import SupervisedArguments
from .sweep import INITIAL_STD, MOMENTUM
from .trainer import ClassifierTrainer
from .training_images import TrainingImages, training_transform


@dataclass(frozen=True)
class LinearProbeArguments(SupervisedArguments):
    """Arguments of `scripts/linear_probe.py`; those of `--cached` are others: `--cached --help`."""

    cached: bool = field(
        default=False,
        metadata={"help": "Train on features of the unaugmented images instead; has options of its own."},
    )
    base_learning_rate: float = field(
        default=3.0,
        metadata={"help": "Learning rate at a batch of 256, scaled with the batch: 3 for ViT, 0.1 for ResNet."},
    )
    momentum: float = field(default=MOMENTUM, metadata={"help": "Of SGD."})


def build_linear_trainer(
    classifier, splits: Splits, transform, arguments: LinearProbeArguments, output_dir: str, num_processes: int = 1
) -> ClassifierTrainer:
    """The trainer of a linear probe. Freezes the body of `classifier`.

    SGD on the head alone, its learning rate `base_learning_rate · batch / 256` and from there to 0 along a cosine over
    all steps.

    Raises:
        ValueError: a batch that the processes cannot share or that exceeds the split.
    """
    options = common_options(arguments, len(splits.train), num_processes)
    body = classifier.base_model
    body.requires_grad_(False)
    optimizer = torch.optim.SGD(
        list(head_parameters(classifier).values()),
        lr=options["learning_rate"],
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
    )
    seen = training_transform(transform, arguments.crop_scale) if arguments.augment else transform
    images = TrainingImages(splits.train, seen, arguments.seed)
    return build_trainer(
        classifier,
        splits,
        transform,
        arguments,
        output_dir,
        images,
        options,
        frozen=body,
        optimizers=(optimizer, None),
    )


def build(arguments: LinearProbeArguments, splits: Splits, folder: str, num_processes: int) -> Training:
    """Load the model with a new head. Raises ValueError as what it calls."""
    classifier = load_with_new_head(arguments.model, splits.class_names(), std=INITIAL_STD, seed=arguments.seed)
    transform = load_transform(arguments.model, classifier, arguments.image_size)
    start = weights_hash(classifier.base_model)
    return Training(
        build_linear_trainer(classifier, splits, transform, arguments, folder, num_processes), transform, start
    )


def run(arguments: LinearProbeArguments, push: Callable[..., str] | None = None) -> dict[str, float]:
    """Load, train the head, evaluate, save, record, push. Raises ValueError as what it calls."""
    return run_training(arguments, "linear", build, push)


def main(argv: Sequence[str] | None = None, push: Callable[..., str] | None = None) -> dict[str, float]:
    """Command line of linear evaluation. Bad input ends the process with one line and status 1.

    Args:
        argv: None for those of the process.
        push: as `run_training`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--cached" in argv:
        return cached_linear.main(argv)
    description = "Linear evaluation of any vision model."
    return run_command(LinearProbeArguments, argv, description, partial(run, push=push))
