"""Linear evaluation on cached features: a grid of classifiers for the price of one pass over the images, and few-shot
accuracy from the same features."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .arguments import (
    FeatureArguments,
    describe_splits,
    evaluation_processes,
    open_splits,
    record_and_print,
    run_command,
)
from .encoder import FEATURES, load_encoder, load_transform, select_features, weights_hash
from .features import Features, labelled_features
from .few_shot import few_shot_metrics, few_shot_rows
from .knn import collapse_metrics
from .sweep import LEARNING_RATES, WEIGHT_DECAYS, ChosenLinear, checked_grid, choose_linear_classifier


@dataclass(frozen=True)
class CachedLinearArguments(FeatureArguments):
    """Arguments of `scripts/linear_probe.py --cached`."""

    cached: bool = field(
        default=True, metadata={"help": "Train on features of the unaugmented images, computed once."}
    )
    features: list[str] = field(
        default_factory=lambda: ["pooled"],
        metadata={
            "help": "What the classifiers stand on: pooled (CLS of a ViT), pooled_mean (and the mean of its patches),"
            " last4 (CLS of the last four layers). Several are compared on the held-out part."
        },
    )
    learning_rates: list[float] = field(
        default_factory=lambda: list(LEARNING_RATES), metadata={"help": "Grid of learning rates at this batch size."}
    )
    weight_decays: list[float] = field(
        default_factory=lambda: list(WEIGHT_DECAYS), metadata={"help": "Grid of weight decays."}
    )
    num_train_epochs: int = field(default=90, metadata={"help": "Epochs of SGD over the features."})
    train_batch_size: int = field(default=1024, metadata={"help": "Features per step of SGD."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Part of the training split held out to choose the setting on."}
    )
    few_shot: list[int] = field(
        default_factory=list, metadata={"help": "Also train on so many images per class, for example 1 5 10."}
    )
    few_shot_fractions: list[float] = field(
        default_factory=list, metadata={"help": "Also train on these parts of the labels, for example 0.01 0.1."}
    )
    num_draws: int = field(default=5, metadata={"help": "Draws of the few-shot training images."})
    seed: int = field(default=0, metadata={"help": "Of the held-out part, the order, the start and the draws."})


def linear_metrics(
    train: Features, test: Features, arguments: CachedLinearArguments, progress: bool = True, device=None
) -> tuple[dict[str, float], dict[str, object]]:
    """Accuracies of the classifier chosen on a held-out part of the training features.

    Args:
        train, test: `layer_features` where the arguments name a feature other than "pooled", else pooled features.
        arguments: grid, features, seed and few-shot tasks.
        progress: show bars.
        device: where to compute.

    Returns:
        `linear_top1`, `linear_top5` (more than 5 classes) on the test features, `linear_validation_top1`, those of
        `few_shot_metrics` on the first feature and of `collapse_metrics` on the chosen one; and what was chosen:
        feature, learning rate, weight decay, validation accuracy of every setting.
    """
    sides = {choice: _chosen(train, test, choice, arguments) for choice in arguments.features}
    num_classes = max(train.num_classes, int(test.labels.max()) + 1)
    candidates: dict[str, ChosenLinear] = {
        choice: choose_linear_classifier(
            train_features.features,
            train.labels,
            num_classes,
            learning_rates=arguments.learning_rates,
            weight_decays=arguments.weight_decays,
            num_epochs=arguments.num_train_epochs,
            batch_size=arguments.train_batch_size,
            validation_fraction=arguments.validation_fraction,
            seed=arguments.seed,
            progress=progress,
            device=device,
        )
        for choice, (train_features, _) in sides.items()
    }
    best = max(candidates, key=lambda choice: candidates[choice].validation_accuracy)
    chosen, rows = candidates[best], sides[best][1].features
    metrics = {"linear_top1": chosen.classifier.accuracy(rows, test.labels)}
    if num_classes > 5:
        metrics["linear_top5"] = chosen.classifier.accuracy(rows, test.labels, top=5)
    metrics["linear_validation_top1"] = chosen.validation_accuracy
    metrics |= few_shot_metrics(
        *sides[arguments.features[0]],
        per_class=arguments.few_shot,
        fractions=arguments.few_shot_fractions,
        num_draws=arguments.num_draws,
        seed=arguments.seed,
        device=device,
    )
    metrics |= collapse_metrics(rows)
    choice = {
        "feature": best,
        "learning_rate": chosen.learning_rate,
        "weight_decay": chosen.weight_decay,
        "validation_accuracies": {name: found.validation_accuracies for name, found in candidates.items()},
    }
    return metrics, choice


def _check_tasks(arguments: CachedLinearArguments, labels: torch.Tensor) -> None:
    """ValueError for what would only be found out after the images were passed over."""
    checked_grid(arguments.learning_rates, arguments.weight_decays)
    if not 0 < arguments.validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {arguments.validation_fraction}")
    for count in arguments.few_shot:
        few_shot_rows(labels, per_class=count)
    for part in arguments.few_shot_fractions:
        few_shot_rows(labels, fraction=part)


def _chosen(
    train: Features, test: Features, choice: str, arguments: CachedLinearArguments
) -> tuple[Features, Features]:
    if not needs_layers(arguments):
        return train, test
    return tuple(replace(side, features=select_features(side.features, choice)) for side in (train, test))


def needs_layers(arguments: CachedLinearArguments) -> bool:
    """Whether a feature is asked for that the pooled vector does not hold."""
    return list(arguments.features) != ["pooled"]


def run(arguments: CachedLinearArguments) -> dict[str, float]:
    """Load, extract, train, print, record, on all processes of this run. Raises ValueError as what it calls."""
    unknown = [name for name in arguments.features if name not in FEATURES]
    if unknown or not arguments.features:
        raise ValueError(f"features must be among {', '.join(FEATURES)}, got {', '.join(unknown) or 'none'}")
    with evaluation_processes(arguments) as state:
        return _run(arguments, state)


def _run(arguments: CachedLinearArguments, state: PartialState) -> dict[str, float]:
    splits = open_splits(arguments)
    _check_tasks(arguments, torch.as_tensor(splits[0].labels))
    encoder = load_encoder(arguments.model).to(state.device)
    transform = load_transform(arguments.model, encoder, arguments.image_size)
    started = time.perf_counter()
    train, test = (
        labelled_features(
            encoder,
            images,
            transform,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            mixed_precision=arguments.mixed_precision,
            layers=needs_layers(arguments),
            cache_dir=arguments.cache_dir,
            description=f"{name} features",
        )
        for name, images in zip(("train", "test"), splits, strict=True)
    )
    # The fit takes a fraction of the time of the pass: one process does it, the others receive the outcome.
    outcome: list = [None]
    if state.is_main_process:
        try:
            outcome = [linear_metrics(train, test, arguments, device=state.device)]
        except ValueError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    metrics, choice = outcome[0]
    if state.is_main_process:
        record_and_print(
            arguments,
            "linear, cached",
            weights=weights_hash(encoder),
            transform=transform,
            settings={"chosen": choice},
            notes=[
                f"  chosen: {choice['feature']}, learning rate {choice['learning_rate']:g}, "
                f"weight decay {choice['weight_decay']:g}"
            ],
            task="linear_cached",
            dataset=describe_splits(arguments, *splits),
            metrics=metrics,
            seed=arguments.seed,
            seconds=time.perf_counter() - started,
        )
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line of linear evaluation on cached features. Bad input ends the process with one line and status 1.

    Args:
        argv: None for those of the process.
    """
    description = "Linear evaluation on cached features, of any vision model."
    return run_command(CachedLinearArguments, argv, description, run)
