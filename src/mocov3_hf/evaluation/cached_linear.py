"""
`mocov3 linear-probe --cached`: a grid of linear classifiers for the cost of one pass over the images, and few-shot
accuracy from the same features.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list

from ..loading import load_encoder
from ..options import option
from ..problem_types import MULTI_LABEL, REGRESSION
from ..weights import weights_hash
from .common import (
    EvaluationOptions,
    TrainSplitOptions,
    describe_splits,
    evaluation_processes,
    held_out_rows,
    open_splits,
    record_and_print,
)
from .features import Features, labeled_features, select_features
from .knn import collapse_metrics
from .linear import fit_linear_classifier
from .pixels import open_transform
from .problems import METRICS, TargetScale, target_metrics
from .sweep import (
    LEARNING_RATES,
    WEIGHT_DECAYS,
    ChosenLinear,
    checked_grid,
    choose_linear_classifier,
    choose_linear_regression,
)


@dataclass(frozen=True, kw_only=True)
class CachedOptions:
    """Linear classifiers on cached features (with --cached only)"""

    features: list[Literal["pooled", "pooled_mean", "last4"]] = option(
        ["pooled"],
        "Inputs to compare on held-out images: pooled features, these and the mean of the patch tokens, or CLS tokens"
        " of the last four layers.",
    )
    learning_rates: list[float] = option(
        list(LEARNING_RATES), "Grid of peak learning rates at this batch size.", above=0
    )
    weight_decays: list[float] = option(list(WEIGHT_DECAYS), "Grid of weight decays.", at_least=0)
    few_shot: list[int] = option([], "Also train on this many images per class, for example 1 5 10.", at_least=1)
    few_shot_fractions: list[float] = option(
        [], "Also train on this fraction of the labels, for example 0.01 0.1.", above=0, at_most=1
    )
    num_draws: int = option(5, "Random draws of the few-shot images.", at_least=1)
    cache_dir: str | None = option(None, "Folder to keep features in and to read them from.", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class CachedLinearOptions(CachedOptions, TrainSplitOptions, EvaluationOptions):
    """All options of the command with `--cached`; those that it shares with the published protocol are declared there
    for `--help`."""

    cached: bool = option(True)
    num_train_epochs: int = option(90)
    train_batch_size: int = option(1024)
    validation_fraction: float = option(0.1)
    seed: int = option(0)


def linear_metrics(
    train: Features, test: Features, options: CachedLinearOptions, progress: bool = True, device=None
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Accuracies of the classifier that was selected on a held-out part of the training features.

    Args:
        train, test: `layer_features` if the options name another input than "pooled", else pooled features.
        options: Grid, inputs, seed and few-shot tasks.
        progress: Whether to show progress bars.
        device: Where to compute.

    Returns:
        `linear_top1`, `linear_top5` (for more than 5 classes) and `linear_mean_per_class` on the test features,
        `linear_validation_top1`, those of `few_shot_metrics` on the first input and of `collapse_metrics` on the
        selected one; and the selection: input, learning rate, weight decay, validation accuracy of every setting. With
        several classes per image or numbers, the metrics of `target_metrics` instead of accuracies; the selection then
        has the `plots` of a report, and the thresholds of the classes or the penalty of ridge regression.
    """
    sides = {choice: _chosen(train, test, choice, options) for choice in options.features}
    is_single, is_regression = train.labels.dim() == 1, train.labels.dtype == torch.float64
    num_classes = max(train.num_classes, int(test.labels.max()) + 1) if is_single else train.num_classes
    shared: dict[str, Any] = {
        "validation_fraction": options.validation_fraction,
        "seed": options.seed,
        "device": device,
    }
    candidates: dict[str, ChosenLinear] = {
        choice: choose_linear_regression(train_features.features, train.labels, **shared)
        if is_regression
        else choose_linear_classifier(
            train_features.features,
            train.labels,
            num_classes,
            learning_rates=options.learning_rates,
            weight_decays=options.weight_decays,
            num_epochs=options.num_train_epochs,
            batch_size=options.train_batch_size,
            progress=progress,
            **shared,
        )
        for choice, (train_features, _) in sides.items()
    }
    best = max(candidates, key=lambda choice: candidates[choice].validation_accuracy)
    chosen, rows = candidates[best], sides[best][1].features
    choice = {
        "feature": best,
        "learning_rate": chosen.learning_rate,
        "weight_decay": chosen.weight_decay,
        "validation_accuracies": {name: found.validation_accuracies for name, found in candidates.items()},
    }
    if not is_single:
        names = METRICS[REGRESSION if is_regression else MULTI_LABEL]
        logits = chosen.classifier.logits(rows).cpu()
        found = target_metrics(logits, test.labels.numpy(), train.class_names, chosen.thresholds)
        metrics = {f"linear_{name}": found[name] for name in names}
        metrics |= {f"linear_validation_{names[0]}": chosen.validation_accuracy, **collapse_metrics(rows)}
        return metrics, choice | {"plots": found["plots"], "thresholds": chosen.thresholds}
    predicted = chosen.classifier.predict(rows)[:, 0]
    metrics = {"linear_top1": (predicted == test.labels).double().mean().item()}
    if num_classes > 5:
        metrics["linear_top5"] = chosen.classifier.accuracy(rows, test.labels, top=5)
    of_class = test.labels.bincount(minlength=num_classes)
    right = test.labels[predicted == test.labels].bincount(minlength=num_classes)
    metrics["linear_mean_per_class"] = (right / of_class)[of_class > 0].double().mean().item()
    metrics["linear_validation_top1"] = chosen.validation_accuracy
    metrics |= few_shot_metrics(
        *sides[options.features[0]],
        per_class=options.few_shot,
        fractions=options.few_shot_fractions,
        num_draws=options.num_draws,
        seed=options.seed,
        device=device,
    )
    return metrics | collapse_metrics(rows), choice


def few_shot_rows(
    labels: torch.Tensor, *, per_class: int | None = None, fraction: float | None = None, seed: int = 0
) -> torch.Tensor:
    """
    Rows of a random draw from every class.

    Args:
        labels: (n,) integers.
        per_class: Images of each class; or
        fraction: Fraction of each class, rounded, at least one image; between 0 and 1.
        seed: Of the draw. The rows of a class do not depend on the other classes, and a larger draw with the same seed
            contains a smaller one.

    Returns:
        Sorted int64 rows.

    Raises:
        ValueError: Neither or both of `per_class` and `fraction`, out of range, or a class with fewer images.
    """
    if (per_class is None) == (fraction is None):
        raise ValueError("pass either per_class or fraction")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    rows = []
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero()[:, 0].cpu()
        count = per_class if per_class is not None else max(1, round(fraction * len(of_class)))
        if count > len(of_class):
            raise ValueError(
                f"class {label} has {len(of_class)} images, expected at least {count}: pass a smaller --few_shot"
            )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + label)
        rows.append(of_class[torch.randperm(len(of_class), generator=generator)[:count]])
    return torch.cat(rows).sort().values


def few_shot_metrics(
    train: Features,
    test: Features,
    *,
    per_class: Sequence[int] = (),
    fractions: Sequence[float] = (),
    num_draws: int = 5,
    seed: int = 0,
    l2: float | None = None,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """
    Few-shot accuracy between 0 and 1 on the test features: logistic regression on random draws of the training
    features.

    Args:
        train, test: Features of both splits.
        per_class: Numbers of images per class.
        fractions: Fractions of the training split, 0.01 for 1 %.
        num_draws: Draws with the seeds `seed`, `seed + 1`, ...
        seed: Of the first draw.
        l2: As `fit_linear_classifier`; None for one over the number of images, scikit-learn's `C = 1`: there are too
            few labels to select it, and the test set must not be used.
        device: Where to fit.

    Returns:
        `{n}shot_top1` and `{p}percent_top1`, mean over the draws, and the same with `_std`: the sample standard
        deviation (n - 1), 0 for a single draw.

    Raises:
        ValueError: As `few_shot_rows`; no draws.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    tasks = {f"{count}shot": {"per_class": count} for count in per_class}
    tasks |= {f"{100 * part:g}percent": {"fraction": part} for part in fractions}
    num_classes = max(train.num_classes, int(test.labels.max()) + 1)
    metrics = {}
    for name, amount in tasks.items():
        accuracies = []
        for draw in range(num_draws):
            rows = few_shot_rows(train.labels, seed=seed + draw, **amount)
            classifier = fit_linear_classifier(
                train.features[rows],
                train.labels[rows],
                num_classes,
                l2=1 / len(rows) if l2 is None else l2,
                device=device,
            )
            accuracies.append(classifier.accuracy(test.features, test.labels))
        metrics[f"{name}_top1"] = statistics.fmean(accuracies)
        metrics[f"{name}_top1_std"] = statistics.stdev(accuracies) if num_draws > 1 else 0.0
    return metrics


def _check_tasks(options: CachedLinearOptions, labels: torch.Tensor) -> None:
    """ValueError for mistakes that would be found only after the pass over the images."""
    checked_grid(options.learning_rates, options.weight_decays)
    if not 0 < options.validation_fraction < 1:
        raise ValueError(f"--validation_fraction must be above 0 and below 1, got {options.validation_fraction}")
    held_out_rows(labels.numpy(), options.validation_fraction, options.seed)
    if labels.dim() == 2 and (options.few_shot or options.few_shot_fractions):
        raise ValueError(
            "few-shot images are drawn by class, these have several classes or numbers: leave out --few_shot"
        )
    if labels.dtype == torch.float64:
        sgd = (list(options.learning_rates), list(options.weight_decays))
        if sgd != (list(LEARNING_RATES), list(WEIGHT_DECAYS)):
            raise ValueError(
                "--learning_rates and --weight_decays are those of SGD, regression is solved exactly: leave them out"
            )
    for count in options.few_shot:
        few_shot_rows(labels, per_class=count)
    for part in options.few_shot_fractions:
        few_shot_rows(labels, fraction=part)


def _chosen(train: Features, test: Features, choice: str, options: CachedLinearOptions) -> tuple[Features, ...]:
    if not needs_layers(options):
        return train, test
    return tuple(replace(side, features=select_features(side.features, choice)) for side in (train, test))


def needs_layers(options: CachedLinearOptions) -> bool:
    """Whether the pooled features do not contain all inputs."""
    return list(options.features) != ["pooled"]


def run(options: CachedLinearOptions) -> dict[str, float]:
    """Load, extract, train, print, record, on all processes of this run. Raises ValueError for a user's mistake."""
    with evaluation_processes(options) as state:
        splits = open_splits(options)
        _check_tasks(options, torch.as_tensor(splits[0].labels))
        TargetScale.of(splits[0])  # refuses constant targets
        encoder = load_encoder(options.model).to(state.device)
        transform = open_transform(options, encoder.config, splits[0])
        started = time.perf_counter()
        train, test = (
            labeled_features(
                encoder,
                images,
                transform,
                layers=needs_layers(options),
                cache_dir=options.cache_dir,
                description=f"{name} features",
                **options.of_pass(),
            )
            for name, images in zip(("train", "test"), splits, strict=True)
        )
        # The fit takes a fraction of the time of the pass: one process does it and sends the outcome to the others.
        outcome: list = [None]
        if state.is_main_process:
            try:
                outcome = [linear_metrics(train, test, options, device=state.device)]
            except ValueError as error:
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], ValueError):
            raise outcome[0]
        metrics, choice = outcome[0]
        plots = choice.pop("plots", None)
        rate = f"learning rate {choice['learning_rate']:g}, " if choice["learning_rate"] else ""
        if state.is_main_process:
            record_and_print(
                options,
                "linear, cached",
                weights=weights_hash(encoder),
                transform=transform,
                settings={"chosen": choice},
                notes=[f"  selected: {choice['feature']}, {rate}weight decay {choice['weight_decay']:g}"],
                task="linear_cached",
                dataset=describe_splits(options, *splits),
                metrics=metrics,
                plots=plots,
                seed=options.seed,
                seconds=time.perf_counter() - started,
            )
        return metrics
