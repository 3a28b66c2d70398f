"""Accuracy of classifiers.

Legend: n images, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def accuracy_metrics(
    scores: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None = None, top: Sequence[int] = (1, 5)
) -> dict[str, Any]:
    """
    Top-k, mean per-class and per-class accuracy, between 0 and 1.

    Args:
        scores: (n, C) logits or probabilities. Of equal scores, the class with the lower number ranks first.
        labels: (n,) integers in 0..C-1.
        class_names: C names for the per-class accuracies; None for numbers.
        top: Values of k; those that are not below the number of classes are skipped, except for 1.

    Returns:
        `top{k}` for every k; `mean_per_class`: mean accuracy over the classes that have images; `per_class`: name to
        accuracy, None for a class without images.

    Raises:
        ValueError: Shapes that do not match, no images, labels out of range, scores with NaN.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(f"expected scores (n, C) and labels (n,), n ≥ 1, got {scores.shape} and {labels.shape}")
    num_classes = scores.shape[1]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}, the classes of the scores, got {labels.min()}..{labels.max()}:"
            " pass the data set that the classifier was trained for"
        )
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for scores of {num_classes} classes")
    if np.isnan(scores).any():
        raise ValueError(
            f"{np.isnan(scores).any(axis=1).sum()} of {len(scores)} images have NaN scores: the model has diverged"
        )
    own = scores[np.arange(len(labels)), labels][:, None]
    before = np.arange(num_classes) < labels[:, None]
    ranks = ((scores > own) | ((scores == own) & before)).sum(axis=1)
    metrics: dict[str, Any] = {f"top{k}": float((ranks < k).mean()) for k in top if k == 1 or k < num_classes}
    counts = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[ranks == 0], minlength=num_classes)
    present = counts > 0
    metrics["mean_per_class"] = float((hits[present] / counts[present]).mean())
    names = [str(number) for number in range(num_classes)] if class_names is None else class_names
    metrics["per_class"] = {
        name: float(hit / count) if count else None for name, hit, count in zip(names, hits, counts, strict=True)
    }
    return metrics
