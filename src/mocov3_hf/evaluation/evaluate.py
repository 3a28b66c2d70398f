"""Test of a saved classifier: top-1 and top-5 on any labelled split, every image once."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from ..data.labelled import LabelledImages
from ..metrics import accuracy_metrics
from .arguments import SplitArguments, describe_split, evaluation_processes, open_split, record_and_print, run_command
from .classifier import MATCH_CLASSES, class_logits, load_classifier, match_classes
from .encoder import load_transform, weights_hash
from .features import rows_of_split


@dataclass(frozen=True)
class EvaluateArguments(SplitArguments):
    """Arguments of `scripts/evaluate.py`."""

    match_classes: str = field(
        default="name",
        metadata={
            "help": "How classes of the data set become those of the checkpoint: by name, in whatever order either has"
            " them, or by number. Without names on both sides numbers are taken.",
            "choices": list(MATCH_CLASSES),
        },
    )


def evaluate_classifier(
    model: PreTrainedModel,
    images: LabelledImages,
    transform: Callable[[torch.Tensor], torch.Tensor],
    class_names: Sequence[str] | None = None,
    **options,
) -> dict[str, Any]:
    """Accuracies of a classifier on a split. With several processes, all must call it.

    Args:
        model: a classifier of transformers, not wrapped; its modes are restored afterwards.
        images: the labelled split, labels numbered as the outputs of the model (`match_classes`).
        transform: uint8 (3, H, W) to float32 (3, size, size).
        class_names: for the accuracies per class; None for numbers.
        options: `batch_size`, `num_workers`, `mixed_precision`, `progress`, `description` of `rows_of_split`.

    Returns:
        `loss` (mean cross-entropy), the metrics of `accuracy_metrics`, and `answered_classes`, how many classes any
        image was taken for: the same on every process, and whatever the number of processes.

    Raises:
        ValueError: labels beyond the head, scores that are not numbers, and as `rows_of_split`.
    """
    logits = rows_of_split(model, class_logits, images, transform, **options)
    metrics = accuracy_metrics(logits.numpy(), images.labels, class_names)
    metrics["answered_classes"] = len(logits.argmax(dim=1).unique())
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.as_tensor(images.labels, dtype=torch.int64))
    return {**metrics, "loss": loss.item()}


def warn_of_one_answer(answered_classes: int, images: LabelledImages) -> None:
    """A warning where a classifier takes every image of several classes for the same one."""
    if answered_classes == 1 and images.labels.min() != images.labels.max():
        warnings.warn(
            f"all {len(images)} images are taken for the same class: the model has collapsed or was not trained, and"
            " the accuracies are those of a guess",
            stacklevel=2,
        )


def run(arguments: EvaluateArguments, published: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Load, evaluate, print, record, on all processes of this run.

    Args:
        arguments: of the command.
        published: gives the folder of a published model for its name, and other names back: the room that knows them
            is on the same floor.

    Raises:
        ValueError: as what it calls.
    """
    name = arguments.model
    if published is not None:
        arguments = replace(arguments, model=published(name))
    with evaluation_processes(arguments) as state:
        return _run(arguments, name, state)


def _run(arguments: EvaluateArguments, name: str, state: PartialState) -> dict[str, Any]:
    classifier = load_classifier(arguments.model).to(state.device)
    images = open_split(arguments, arguments.test_split)
    dataset = describe_split(arguments, images)
    images, matched, class_names = match_classes(images, classifier.config, arguments.match_classes)
    transform = load_transform(arguments.model, classifier, arguments.image_size)
    started = time.perf_counter()
    metrics = evaluate_classifier(
        classifier,
        images,
        transform,
        class_names if class_names is not None and len(set(class_names)) == len(class_names) else None,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        mixed_precision=arguments.mixed_precision,
    )
    if state.is_main_process:
        warn_of_one_answer(metrics["answered_classes"], images)
        record_and_print(
            arguments,
            "classifier",
            weights=weights_hash(classifier),
            transform=transform,
            settings={"classes": matched},
            name=name,
            notes=[f"  {len(images)} images, classes matched {matched}"],
            task="evaluate",
            dataset=dataset,
            metrics=metrics,
            seconds=time.perf_counter() - started,
        )
    return metrics


def main(argv: Sequence[str] | None = None, published: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Command line of the test of a classifier. Bad input ends the process with one line and status 1.

    Args:
        argv: None for those of the process.
        published: as `run`.
    """
    description = "Top-1 and top-5 of a saved classifier."
    return run_command(EvaluateArguments, argv, description, partial(run, published=published))
