"""Metrics of multi-label classification, where any number of classes apply to an image.

Legend: n images, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def multilabel_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] | None = None,
    thresholds: Sequence[float] | float = 0.5,
) -> dict[str, Any]:
    """
    Mean average precision and F1, between 0 and 1.

    Args:
        probabilities: (n, C), each class on its own.
        labels: (n, C), 1 for the classes that apply, else 0.
        class_names: C names for the average precision of each class; None for numbers.
        thresholds: Probability from which a class is predicted; one, or one for each class.

    Returns:
        `map`: mean over the classes that have images of the average precision, without interpolation
        (`average_precision_score` of scikit-learn); `micro_f1`, over all decisions; `macro_f1`, mean over the classes
        that have images; `per_class`: name to average precision, None for a class without images.

    Raises:
        ValueError: Shapes that do not match, no images, no image with a class, or probabilities with NaN.
    """
    probabilities, labels = _checked(probabilities, labels)
    present = np.flatnonzero(labels.any(axis=0))
    if len(present) == 0:
        raise ValueError(f"none of the {len(labels)} images has a class: pass a split with labels")
    precisions = {int(column): average_precision(probabilities[:, column], labels[:, column]) for column in present}
    predicted = probabilities >= np.asarray(thresholds)
    hits, sizes = (predicted & labels).sum(axis=0), predicted.sum(axis=0) + labels.sum(axis=0)
    names = [str(number) for number in range(labels.shape[1])] if class_names is None else class_names
    return {
        "map": float(np.mean(list(precisions.values()))),
        "micro_f1": float(2 * hits.sum() / sizes.sum()),
        "macro_f1": float((2 * hits[present] / sizes[present]).mean()),
        "per_class": {name: precisions.get(number) for number, name in enumerate(names)},
    }


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """
    Sum over the distinct scores, from the largest, of the precision times the gain in recall.

    Args:
        scores: (n,) of one class.
        labels: (n,) bool, at least one True.
    """
    _, hits, predicted = _cuts(scores, labels)
    return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / predicted))


def best_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """
    The threshold of each class with the best F1 on these images, halfway between two probabilities; 0.5 for a class
    without images. Of equal ones the highest. Arguments and errors are those of `multilabel_metrics`.
    """
    probabilities, labels = _checked(probabilities, labels)
    thresholds = []
    for scores, is_class in zip(probabilities.T, labels.T, strict=True):
        if not is_class.any():
            thresholds.append(0.5)
            continue
        cuts, hits, predicted = _cuts(scores, is_class)
        best = int(np.argmax(2 * hits / (predicted + hits[-1])))
        below = cuts[best + 1] if best + 1 < len(cuts) else 0.0
        middle = (cuts[best] + below) / 2
        thresholds.append(float(middle if middle > below else cuts[best]))
    return thresholds


def _cuts(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct scores in descending order; of the images from each score up, those with the class, and all."""
    order = np.argsort(-scores, kind="stable")
    is_last = np.append(np.diff(scores[order]) != 0, True)
    return scores[order][is_last], np.cumsum(labels[order])[is_last], np.flatnonzero(is_last) + 1


def _checked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape or len(labels) == 0:
        raise ValueError(
            f"expected probabilities and labels (n, C), n ≥ 1, got {probabilities.shape} and {labels.shape}"
        )
    check_not_nan(probabilities)
    return probabilities, labels.astype(bool)


def check_not_nan(outputs: np.ndarray) -> None:
    """ValueError if outputs (n, C) of a model have NaN."""
    if np.isnan(outputs).any():
        bad = np.isnan(outputs).any(axis=1).sum()
        raise ValueError(f"{bad} of {len(outputs)} images have NaN scores: the model has diverged")
