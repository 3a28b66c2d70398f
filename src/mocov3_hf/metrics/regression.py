"""Metrics of regression.

Legend: n images, T targets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .multilabel import check_not_nan


def regression_metrics(
    predictions: np.ndarray, targets: np.ndarray, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """
    R², mean absolute error and root mean squared error, means over the targets.

    Args:
        predictions, targets: (n, T), in the units of the targets.
        names: T names for R² of each target; None for numbers.

    Returns:
        `r2`: 1 - squared error / squared deviation from the mean of these targets; of constant targets 1 if they are
        predicted exactly, else 0. `mae`, `rmse`, in the units of the targets. `per_class`: name to R².

    Raises:
        ValueError: Shapes that do not match, no images, predictions with NaN.
    """
    predictions, targets = (np.asarray(values, dtype=np.float64) for values in (predictions, targets))
    if predictions.ndim != 2 or targets.shape != predictions.shape or len(targets) == 0:
        raise ValueError(f"expected predictions and targets (n, T), n ≥ 1, got {predictions.shape}, {targets.shape}")
    check_not_nan(predictions)
    errors = np.square(predictions - targets).sum(axis=0)
    deviations = np.square(targets - targets.mean(axis=0)).sum(axis=0)
    is_constant = deviations == 0
    scores = np.where(is_constant, errors == 0, 1 - errors / np.where(is_constant, 1, deviations))
    names = [str(number) for number in range(targets.shape[1])] if names is None else names
    return {
        "r2": float(scores.mean()),
        "mae": float(np.abs(predictions - targets).mean()),
        "rmse": float(np.sqrt(errors / len(targets)).mean()),
        "per_class": dict(zip(names, scores.tolist(), strict=True)),
    }
