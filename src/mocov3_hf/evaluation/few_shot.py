"""Few labels: logistic regression on n images per class, or on a fraction of the labels, over several draws."""

import statistics
from collections.abc import Sequence

import torch

from .features import Features
from .linear import fit_linear_classifier


def few_shot_rows(
    labels: torch.Tensor, *, per_class: int | None = None, fraction: float | None = None, seed: int = 0
) -> torch.Tensor:
    """Rows of a draw that has every class.

    Args:
        labels: (n,) integers.
        per_class: images of each class; or
        fraction: part of each class, rounded, at least one image; between 0 and 1.
        seed: of the draw. What is drawn of a class does not depend on the other classes, and more of the same seed
            contains less of it.

    Returns:
        Sorted int64 rows.

    Raises:
        ValueError: neither or both of `per_class` and `fraction`, out of range, or a class with fewer images.
    """
    if (per_class is None) == (fraction is None):
        raise ValueError("give either per_class or fraction")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    rows = []
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero()[:, 0].cpu()
        count = per_class if per_class is not None else max(1, round(fraction * len(of_class)))
        if count > len(of_class):
            raise ValueError(f"class {label} has {len(of_class)} images, {count} per class were asked for")
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
    """Accuracy between 0 and 1 on the test features, mean and standard deviation over draws of the training features.

    Args:
        train, test: features of both splits.
        per_class: numbers of images per class.
        fractions: parts of the training split, 0.01 for 1 %.
        num_draws: draws with the seeds `seed`, `seed + 1`, ...
        seed: of the first draw.
        l2: as `fit_linear_classifier`; None for one over the number of images, scikit-learn's `C = 1`. (There are too
            few labels to choose it by, and the test set is not there to be chosen on.)
        device: where to fit.

    Returns:
        `{n}shot_top1`, `{n}shot_top1_std` and the same of `{p}percent`; the deviation is that of a sample (n - 1),
        and 0 for a single draw.

    Raises:
        ValueError: as `few_shot_rows`; no draws.
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
