"""The command `mocov3 evaluate`: metrics of a saved classifier on a labeled split, every image once."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.classes import alike, columns_by_name
from ..data.labeled import LabeledImages
from ..loading import base_encoder, load_classifier, size_options
from ..metrics import accuracy_metrics
from ..options import Command, option, parse
from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, SUPERCLASSES, THRESHOLDS
from ..reporting import UsageError, reporting
from ..weights import weights_hash
from .common import EvaluationOptions, describe_split, evaluation_processes, open_test_split, record_and_print
from .features import rows_of_split
from .pixels import open_transform
from .problems import (
    TargetScale,
    confidence_metrics,
    problem_type_of,
    target_metrics,
)


# Legend: B batch, C channels, H W image, K classes.


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EvaluationOptions):
    """Classes"""

    match_classes: Literal["name", "number"] = option(
        "name", "How to match the classes of data set and classifier. By number if one of them has no names."
    )


COMMAND = Command("evaluate", "Test a classifier on a labeled data set.", (EvaluateOptions,), "model")


def evaluate_classifier(
    model: PreTrainedModel,
    images: LabeledImages,
    transform: Callable[[torch.Tensor], torch.Tensor],
    class_names: Sequence[str] | None = None,
    *,
    thresholds: Sequence[float] | None = None,
    superclasses: Sequence[str] | None = None,
    target_scale: TargetScale | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    Metrics of a classifier on a split. With several processes, all must call it.

    Args:
        model: A classifier of transformers, not wrapped; its modes are restored afterwards.
        images: The labeled split, labels numbered as the outputs of the model (`match_classes`).
        transform: From uint8 (C, H, W) to float32 (C, size, size).
        class_names: For the accuracies per class; None for numbers.
        thresholds: Probabilities from which a multi-label classifier predicts each class; None for 0.5.
        superclasses: Superclass of each class, for the accuracy `superclass_top1`.
        target_scale: Of a regression whose outputs are standardized.
        options: `batch_size`, `num_workers`, `mixed_precision`, `progress`, `description` of `rows_of_split`.

    Returns:
        `loss` (mean cross-entropy), the metrics of `accuracy_metrics` and `confidence_metrics`, and
        `answered_classes`, the number of classes that were predicted for any image: the same on every process and for
        any number of processes. Of multi-label classification and regression, those of `target_metrics`; regression is
        evaluated in float32, since bfloat16 has 8 bits for a value.

    Raises:
        ValueError: Labels outside the head's classes, scores with NaN, and as `rows_of_split`.
    """
    if images.problem_type == REGRESSION:
        options["mixed_precision"] = "no"
    logits = rows_of_split(model, class_logits, images, transform, **options)
    if images.problem_type != SINGLE_LABEL:
        outputs = logits if target_scale is None else target_scale.outputs(logits)
        return target_metrics(outputs, images.labels, class_names, thresholds)
    metrics = accuracy_metrics(logits.numpy(), images.labels, class_names)
    metrics["answered_classes"] = len(logits.argmax(dim=1).unique())
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.as_tensor(images.labels, dtype=torch.int64))
    return {**metrics, "loss": loss.item(), **confidence_metrics(logits, images.labels, superclasses)}


def class_logits(classifier: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) float32 of images (B, C, H, W) of any size that the encoder accepts."""
    options = size_options(base_encoder(classifier), pixel_values)
    return classifier(pixel_values=pixel_values, **options).logits.float()


def warn_of_one_answer(answered_classes: int | None, images: LabeledImages) -> None:
    """A warning if a classifier predicts one class for all images of several classes; None of other models."""
    if answered_classes == 1 and images.labels.min() != images.labels.max():
        warnings.warn(
            f"the same class is predicted for all {len(images)} images: the model has collapsed or was not trained,"
            " the accuracies are at chance level",
            stacklevel=2,
        )


def warn_of_worse_than_mean(r2: float | None) -> None:
    """A warning if a regression predicts worse than the mean of the targets; None of other models."""
    if r2 is not None and r2 < 0:
        warnings.warn(
            f"R² is {r2:.3g}: the predictions are worse than the mean of the targets, the training was too short or"
            " diverged",
            stacklevel=2,
        )


# Classes of the data set and classes of the classifier


def saved_class_names(config: PreTrainedConfig) -> list[str] | None:
    """Names of the classes in order, None if a configuration has only the default names of transformers."""
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def match_classes(
    images: LabeledImages, config: PreTrainedConfig, by: str = "name"
) -> tuple[LabeledImages, str, list[str] | None]:
    """
    The split with its labels numbered as the outputs of a classifier.

    By name, a class of the data set is the class of the classifier with the same name, in whatever order; the data set
    may have fewer classes. If one of the two has no names, and with `by="number"`, numbers are used as they are, and
    both must have the same number of classes.

    Args:
        images: The labeled split.
        config: Of the classifier: its `id2label`.
        by: "name" or "number".

    Returns:
        The split; how the classes were matched, in words; the names of the classifier's classes, or None.

    Raises:
        ValueError: A class of the data set that the classifier does not have, duplicate names, another number of
            classes, or labels outside the head's classes.
    """
    names, own = saved_class_names(config), images.class_names
    if images.problem_type != SINGLE_LABEL:
        return _matched_columns(images, names, config.num_labels, by)
    if by == "name" and own is None and names is not None and all(name.isdecimal() for name in names):
        # Integers with gaps were names for the classifier: 7, 13 and 900 are its classes "7", "13" and "900".
        present = np.unique(images.labels)
        own = [str(label) for label in present.tolist()]
        images = images.relabel(np.searchsorted(present, images.labels), own)
    if by == "name" and names is not None and own is not None and names != own:
        return _matched_by_name(images, names)
    if own is not None and len(own) != config.num_labels:
        raise ValueError(
            f"the data set has {len(own)} classes, the classifier {config.num_labels}, and there are no names to match"
            " them by: pass the data set that the classifier was trained for"
        )
    if own is None and images.labels.max() >= config.num_labels:
        beyond = images.labels >= config.num_labels
        first = int(beyond.argmax())
        raise ValueError(
            f"{beyond.sum()} labels are outside the classifier's {config.num_labels} classes (first in row {first}:"
            f" {images.labels[first]}): pass the data set that the classifier was trained for"
        )
    if names is not None and names == own:
        return images, "by name", names
    return images, "by number", names or own


def _matched_columns(
    images: LabeledImages, names: list[str] | None, num_labels: int, by: str
) -> tuple[LabeledImages, str, list[str] | None]:
    own, what = images.class_names, "targets" if images.problem_type == REGRESSION else "classes"
    is_only = what == "targets" and images.num_classes == num_labels == 1  # whatever its column is called
    if by == "name" and names is not None and own is not None and names != own and not is_only:
        if what == "classes":
            labels, unknown = columns_by_name(images, names)
        else:
            labels, unknown = images.labels, {name: len(images) for name in own if name not in names}
            if not unknown and len(own) == len(names):
                labels = images.labels[:, [own.index(name) for name in names]]
        if unknown or labels.shape[1] != num_labels:
            raise ValueError(
                f"{what} of the data set and the model differ ({_some(list(unknown or own))}; the"
                f" model has {_some(names)}): pass the data set that the model was trained"
                " for, or --match_classes number if both number them alike"
            )
        return images.relabel(labels, names), "by name, in another order", names
    if images.num_classes != num_labels:
        raise ValueError(
            f"the data set has {images.num_classes} {what}, the model {num_labels}: pass the data set that the model"
            " was trained for"
        )
    return images, "by name" if names is not None and names == own else "by number", names or own


def _some(names: list[str]) -> str:
    return ", ".join([*map(repr, names[:3]), *(["..."] if len(names) > 3 else [])])


def _matched_by_name(images: LabeledImages, names: list[str]) -> tuple[LabeledImages, str, list[str]]:
    own = images.class_names
    for whose, listed in (("classifier", names), ("data set", own)):
        duplicate = next((name for name, count in Counter(listed).items() if count > 1), None)
        if duplicate is not None:
            raise ValueError(
                f"the {whose} has the class {duplicate!r} twice, so names do not identify classes: if both number"
                " their classes alike, pass --match_classes number"
            )
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [name for name in own if name not in numbers]
    if unknown:
        hint = alike(unknown[0], names)
        raise ValueError(
            f"{len(unknown)} of {len(own)} classes of the data set are not among the {len(names)} of the classifier"
            f" (such as {_some(unknown)}{hint}; the classifier has {_some(names)}): pass the data set that the"
            " classifier was trained for, or --match_classes number if both number their classes alike"
        )
    labels = np.asarray([numbers[name] for name in own], dtype=np.int64)[images.labels]
    how = "by name, in another order" if len(own) == len(names) else f"by name, {len(own)} of {len(names)}"
    return images.relabel(labels, names), how, names


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Load, evaluate, print, record, on all processes of this run. Raises ValueError for a user's mistake."""
    with evaluation_processes(options) as state:
        classifier = load_classifier(options.model).to(state.device)
        problem_type = _problem_type(options, classifier.config)
        images = open_test_split(options, problem_type, classifier.config.num_labels)
        _check_columns(options, images, classifier.config)
        dataset = describe_split(options, images)
        images, matched, class_names = match_classes(images, classifier.config, options.match_classes)
        transform = open_transform(options, classifier.config, images)
        started = time.perf_counter()
        metrics = evaluate_classifier(
            classifier,
            images,
            transform,
            class_names if class_names is not None and len(set(class_names)) == len(class_names) else None,
            thresholds=getattr(classifier.config, THRESHOLDS, None),
            superclasses=getattr(classifier.config, SUPERCLASSES, None),
            **options.of_pass(),
        )
        plots = metrics.pop("plots")
        if state.is_main_process:
            warn_of_one_answer(metrics.get("answered_classes"), images)
            warn_of_worse_than_mean(metrics.get("r2"))
            record_and_print(
                options,
                "classifier",
                weights=weights_hash(classifier),
                transform=transform,
                settings={"classes": matched} | float32_if_regression(images),
                notes=[f"  {len(images)} images, classes matched {matched}"],
                task="evaluate",
                dataset=dataset,
                metrics=metrics,
                plots=plots,
                seconds=time.perf_counter() - started,
            )
        return metrics


def float32_if_regression(images: LabeledImages) -> dict[str, str]:
    """The precision of `evaluate_classifier` as settings, where it is not that of the options."""
    return {"mixed_precision": "no"} if images.problem_type == REGRESSION else {}


def _problem_type(options: EvaluateOptions, config: PreTrainedConfig) -> str:
    """That of the classifier. UsageError for options that contradict it."""
    own = problem_type_of(config)
    if options.problem_type in ("auto", own):
        return own
    if config.problem_type is None:
        return options.problem_type  # of a model that does not tell
    raise UsageError(f"{options.model!r} is a model of {own}: leave out --problem_type {options.problem_type}")


def _check_columns(options: EvaluateOptions, images: LabeledImages, config: PreTrainedConfig) -> None:
    """UsageError if columns of 0 and 1 lack a class, whose images would count as without it."""
    chosen, names = options.label_column or [], saved_class_names(config) or []
    if options.match_classes == "name" and images.problem_type == MULTI_LABEL and len(chosen) > 1:
        missing = [name for name in names if name not in chosen]
        if missing and len(missing) < len(names):
            raise UsageError(
                f"--label_column lacks {len(missing)} of the {len(names)} classes of the model, such as"
                f" {missing[0]!r}: name the columns of all its classes"
            )


def main(arguments: list[str]) -> dict[str, Any]:
    """The command `mocov3 evaluate`."""
    with reporting():
        (options,) = parse(COMMAND, arguments)
        return run(options)
