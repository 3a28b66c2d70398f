"""Weighted nearest-neighbour evaluation of a model: no training, no choices, one figure in minutes."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from torch import nn

from ..data.labelled import LabelledImages
from ..metrics import collapse_summary, knn_predict
from .arguments import (
    FeatureArguments,
    describe_splits,
    evaluation_processes,
    open_splits,
    record_and_print,
    run_command,
)
from .encoder import base_encoder, load_encoder, load_transform, weights_hash
from .features import Features, labelled_features


# Features that the signs of collapse are computed on, spread over the test split.
COLLAPSE_ROWS = 10_000
DEFAULT_K = (1, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class KNNArguments(FeatureArguments):
    """Arguments of `scripts/knn.py`."""

    k: list[int] = field(
        default_factory=lambda: list(DEFAULT_K),
        metadata={"help": "Numbers of neighbours; those larger than the training split are left out with a warning."},
    )
    temperature: float = field(default=0.07, metadata={"help": "T of the votes' weights, exp(similarity / T)."})


def evaluate_knn(
    model: nn.Module,
    train: LabelledImages,
    test: LabelledImages,
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
    """Classify one split by its nearest neighbours in another. With several processes, all must call it.

    Args:
        model: any vision model; heads and wrappers are looked through, modes left as they were.
        train: the split whose labels vote.
        test: the split that is classified.
        transform: uint8 (3, H, W) to float32 (3, size, size); None for MoCo v3's own at the model's image size.
        k: numbers of neighbours; those larger than `train` are left out with a warning.
        temperature, batch_size, num_workers, mixed_precision, cache_dir, progress: as `KNNArguments`.

    Returns:
        The metrics of `knn_metrics`, the same on every process.

    Raises:
        ValueError: no `k` left, and as `labelled_features`.
    """
    options = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "mixed_precision": mixed_precision,
        "cache_dir": cache_dir,
        "progress": progress,
    }
    # Before the images are passed over, which may take an hour.
    k = usable_k(k, len(train))
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    train_features = labelled_features(model, train, transform, description="train features", **options)
    test_features = labelled_features(model, test, transform, description="test features", **options)
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
    """Accuracies between 0 and 1, and signs of collapse, of features that are at hand.

    Returns:
        `knn{k}_top1` for every `k`, `knn{k}_top5` where there are more than 5 classes and `k` ≥ 5, and
        `feature_std_ratio`, `effective_rank` of (up to 10,000) test features (`mocov3_hf.probes.collapse`). Features
        that are all the same are reported in a warning: every accuracy is then that of a guess.
    """
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
    metrics = {}
    for number, predicted in predictions.items():
        hits = predicted == test.labels[:, None]
        metrics[f"knn{number}_top1"] = hits[:, 0].double().mean().item()
        if top == 5 and number >= 5:
            metrics[f"knn{number}_top5"] = hits.any(dim=1).double().mean().item()
    return metrics | collapse_metrics(test.features)


def collapse_metrics(features: torch.Tensor) -> dict[str, float]:
    """Signs of collapse of features (n, D), and a warning where they are all the same.

    Returns:
        `feature_std_ratio` and `effective_rank` of up to 10,000 of them; nothing for a single one.
    """
    if len(features) < 2:
        return {}
    summary = collapse_summary(features[:: -(-len(features) // COLLAPSE_ROWS)])
    if summary.is_collapsed:
        warnings.warn(
            f"the features have collapsed: their standard deviation is {summary.std_ratio:.1e} of that of evenly"
            f" spread ones, effective rank {summary.effective_rank:.2f} of {summary.dimensions}; the accuracies are"
            " those of a guess",
            stacklevel=2,
        )
    return {"feature_std_ratio": summary.std_ratio, "effective_rank": summary.effective_rank}


def usable_k(k: Sequence[int], rows: int) -> list[int]:
    """The numbers of neighbours that a training split of `rows` images has; a warning names the others."""
    if any(number < 1 for number in k):
        raise ValueError(f"k must be at least 1, got {min(k)}")
    fitting = [number for number in k if number <= rows]
    if not fitting:
        raise ValueError(f"every k ({', '.join(map(str, k))}) exceeds the {rows} images of the training split")
    if len(fitting) < len(k):
        left_out = ", ".join(str(number) for number in k if number > rows)
        warnings.warn(f"k = {left_out} left out: the training split has {rows} images", stacklevel=3)
    return fitting


def run(arguments: KNNArguments) -> dict[str, float]:
    """Load, evaluate, print, record, on all processes of this run. Raises ValueError as what it calls."""
    with evaluation_processes(arguments) as state:
        return _run(arguments, state)


def _run(arguments: KNNArguments, state: PartialState) -> dict[str, float]:
    train, test = open_splits(arguments)
    encoder = load_encoder(arguments.model).to(state.device)
    transform = load_transform(arguments.model, encoder, arguments.image_size)
    started = time.perf_counter()
    options = ("k", "temperature", "batch_size", "num_workers", "mixed_precision", "cache_dir")
    metrics = evaluate_knn(
        encoder, train, test, transform=transform, **{name: getattr(arguments, name) for name in options}
    )
    if state.is_main_process:
        record_and_print(
            arguments,
            "kNN",
            weights=weights_hash(encoder),
            transform=transform,
            task="knn",
            dataset=describe_splits(arguments, train, test),
            metrics=metrics,
            seconds=time.perf_counter() - started,
        )
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line of kNN evaluation. Bad input ends the process with one line and status 1.

    Args:
        argv: None for those of the process.
    """
    return run_command(KNNArguments, argv, "Weighted kNN evaluation of any vision model.", run)
