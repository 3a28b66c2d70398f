"""The command `mocov3 knn`: weighted k-nearest-neighbor classification on frozen features, without training."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..data.labeled import LabeledImages
from ..loading import base_encoder, load_encoder
from ..metrics import collapse_summary, knn_average, knn_predict, multilabel_metrics, regression_metrics
from ..options import Command, option, parse
from ..reporting import reporting
from ..weights import weights_hash
from .common import (
    EvaluationOptions,
    TrainSplitOptions,
    describe_splits,
    evaluation_processes,
    open_splits,
    record_and_print,
)
from .features import Features, labeled_features
from .pixels import open_transform
from .problems import TargetScale


# Test features for the collapse metrics, spread over the split.
COLLAPSE_ROWS = 10_000
DEFAULT_K = (1, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True, kw_only=True)
class KNNOptions(TrainSplitOptions, EvaluationOptions):
    """Nearest neighbors"""

    k: list[int] = option(
        list(DEFAULT_K), "Numbers of neighbors. Those above the size of the training split are skipped.", at_least=1
    )
    temperature: float = option(0.07, "T of the weight of a vote, exp(similarity / T).", above=0)
    cache_dir: str | None = option(None, "Folder to keep features in and to read them from.", metavar="DIR")


COMMAND = Command("knn", "Evaluate an encoder by its nearest neighbors.", (KNNOptions,), "model")


def evaluate_knn(
    model: nn.Module,
    train: LabeledImages,
    test: LabeledImages,
    *,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    k: Sequence[int] = DEFAULT_K,
    temperature: float = 0.07,
    batch_size: int = 64,
    num_workers: int = 0,
    mixed_precision: str = "no",
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """
    Classify one split by its nearest neighbors in another. With several processes, all must call it.

    Args:
        model: Any vision model, possibly with heads or wrapped; its modes are restored afterwards.
        train: Split whose labels vote.
        test: Split to classify.
        transform: From uint8 (C, H, W) to float32 (C, size, size); None for the default image processor at the model's
            image size.
        k: Numbers of neighbors; those above the size of `train` are skipped with a warning.
        temperature, batch_size, num_workers, mixed_precision, cache_dir, progress: As in `KNNOptions`.

    Returns:
        The metrics of `knn_metrics`, the same on every process.

    Raises:
        ValueError: No `k` left, and as `labeled_features`.
    """
    options = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "mixed_precision": mixed_precision,
        "cache_dir": cache_dir,
        "progress": progress,
    }
    # Before the pass over the images, which may take an hour.
    k = usable_k(k, len(train))
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    train_features = labeled_features(model, train, transform, description="train features", **options)
    test_features = labeled_features(model, test, transform, description="test features", **options)
    device = getattr(base_encoder(model), "device", None)
    return knn_metrics(train_features, test_features, k=k, temperature=temperature, device=device)


def knn_metrics(
    train: Features,
    test: Features,
    *,
    k: Sequence[int] = DEFAULT_K,
    temperature: float = 0.07,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """
    Accuracies between 0 and 1, and collapse metrics, of given features.

    With several classes per image or numbers, the neighbors' labels are averaged with the weights of their votes.

    Returns:
        `knn{k}_top1` for every `k`, `knn{k}_top5` for more than 5 classes and `k` ≥ 5, and the metrics of
        `collapse_metrics` of the test features. With several classes per image `knn{k}_map`, with numbers
        `knn{k}_r2`, `knn{k}_mae` and `knn{k}_rmse` instead.
    """
    metrics: dict[str, float] = {}
    if train.labels.ndim == 2:
        means = knn_average(
            test.features, train.features, train.labels, sorted(set(k)), temperature=temperature, device=device
        )
        is_regression = train.labels.dtype == torch.float64
        for number, mean in means.items():
            found = (regression_metrics if is_regression else multilabel_metrics)(mean.numpy(), test.labels.numpy())
            names = ("r2", "mae", "rmse") if is_regression else ("map",)
            metrics |= {f"knn{number}_{name}": found[name] for name in names}
        return metrics | collapse_metrics(test.features)
    top = 5 if train.num_classes > 5 else 1
    predictions = knn_predict(
        test.features,
        train.features,
        train.labels,
        k,
        temperature=temperature,
        num_classes=max(train.num_classes, int(train.labels.max()) + 1),
        top=top,
        device=device,
    )
    for number, predicted in predictions.items():
        hits = predicted == test.labels[:, None]
        metrics[f"knn{number}_top1"] = hits[:, 0].double().mean().item()
        if top == 5 and number >= 5:
            metrics[f"knn{number}_top5"] = hits.any(dim=1).double().mean().item()
    return metrics | collapse_metrics(test.features)


def collapse_metrics(features: torch.Tensor) -> dict[str, float]:
    """
    `feature_std_ratio` and `effective_rank` of up to 10,000 of the features (n, D), none for a single one; a warning
    if they have collapsed to one vector.
    """
    if len(features) < 2:
        return {}
    summary = collapse_summary(features[:: -(-len(features) // COLLAPSE_ROWS)])
    if summary.is_collapsed:
        warnings.warn(
            f"the features have collapsed: their standard deviation is {summary.std_ratio:.1e} times that of features"
            f" spread evenly over the sphere, effective rank {summary.effective_rank:.2f} of {summary.dimensions}; the"
            " accuracies are at chance level",
            stacklevel=2,
        )
    return {"feature_std_ratio": summary.std_ratio, "effective_rank": summary.effective_rank}


def usable_k(k: Sequence[int], rows: int) -> list[int]:
    """The numbers of neighbors that a training split of `rows` images allows; a warning names the others."""
    if any(number < 1 for number in k):
        raise ValueError(f"k must be at least 1, got {min(k)}")
    fitting = [number for number in k if number <= rows]
    if not fitting:
        raise ValueError(
            f"every k ({', '.join(map(str, k))}) exceeds the {rows} images of the training split: pass a smaller --k"
        )
    if len(fitting) < len(k):
        skipped = ", ".join(str(number) for number in k if number > rows)
        warnings.warn(f"skipped k = {skipped}: the training split has {rows} images", stacklevel=3)
    return fitting


def run(options: KNNOptions) -> dict[str, float]:
    """Load, evaluate, print, record, on all processes of this run. Raises ValueError for a user's mistake."""
    with evaluation_processes(options) as state:
        train, test = open_splits(options)
        TargetScale.of(train)  # refuses constant targets
        encoder = load_encoder(options.model).to(state.device)
        transform = open_transform(options, encoder.config, train)
        started = time.perf_counter()
        metrics = evaluate_knn(
            encoder,
            train,
            test,
            transform=transform,
            k=options.k,
            temperature=options.temperature,
            cache_dir=options.cache_dir,
            **options.of_pass(),
        )
        if state.is_main_process:
            record_and_print(
                options,
                "kNN",
                weights=weights_hash(encoder),
                transform=transform,
                task="knn",
                dataset=describe_splits(options, train, test),
                metrics=metrics,
                seconds=time.perf_counter() - started,
            )
        return metrics


def main(arguments: list[str]) -> dict[str, float]:
    """The command `mocov3 knn`."""
    with reporting():
        (options,) = parse(COMMAND, arguments)
        return run(options)
