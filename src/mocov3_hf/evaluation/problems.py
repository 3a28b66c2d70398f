"""
What differs between single-label classification, multi-label classification and regression: the meaning of the
outputs of a classifier, its metrics, and what is saved beside its weights.

Legend: n images, C classes or targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.labeled import LabeledImages
from ..metrics import (
    expected_calibration_error,
    multilabel_metrics,
    regression_metrics,
    reliability,
    selective_accuracy,
)
from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from ..reporting import UsageError
from .classifier import head_parameters


# The metrics of each problem, the first selects the best epoch; those that are better when lower.
METRICS = {SINGLE_LABEL: ["top1"], MULTI_LABEL: ["map", "micro_f1", "macro_f1"], REGRESSION: ["r2", "mae", "rmse"]}
LOWER_IS_BETTER = ("loss", "mae", "rmse")
# Points of the scatter plot of a regression.
_MOST_POINTS, _DIGITS = 500, 5


def problem_type_of(config: PreTrainedConfig) -> str:
    """What the outputs of a classifier mean. As in transformers, a single output is regression unless it is said."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)


def probabilities_of(logits: torch.Tensor) -> np.ndarray:
    """Probabilities (n, C) float64 of the classes of a multi-label classifier, each on its own."""
    return logits.double().sigmoid().numpy()


def target_metrics(
    logits: torch.Tensor, labels: np.ndarray, names: Sequence[str] | None, thresholds: Sequence[float] | None
) -> dict[str, Any]:
    """
    Metrics of multi-label classification or regression, with `loss`, and under `plots` what a report shows.

    Args:
        logits: (n, C) float32; of a regression in the units of the targets.
        labels: (n, C), float64 for regression.
        names: Of the classes or targets.
        thresholds: Of a multi-label classifier; None for 0.5.
    """
    target = torch.as_tensor(labels).double()
    if labels.dtype.kind == "f":
        metrics = regression_metrics(logits.numpy(), labels, names)
        loss = torch.nn.functional.mse_loss(logits.double(), target)
        rows = np.unique(np.linspace(0, len(labels) - 1, _MOST_POINTS).round().astype(int))
        sides = np.stack([labels[rows], logits.double().numpy()[rows]]).transpose(0, 2, 1)  # (2, T, n)
        # Digits of the spread of each target: dates in seconds have ten digits before those that differ.
        places = (_DIGITS - np.log10(np.ptp(sides, axis=(0, 2)).clip(1e-30))).astype(int).tolist()
        true, predicted = (
            [[round(value, digits) for value in row] for row, digits in zip(side, places, strict=True)]
            for side in sides.tolist()
        )
        plots = {"true": true, "predicted": predicted}
        return {**metrics, "loss": loss.item(), "plots": {"scatter": {"names": list(metrics["per_class"]), **plots}}}
    used = 0.5 if thresholds is None else thresholds
    metrics = multilabel_metrics(probabilities_of(logits), labels, names, used)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), target)
    counts = labels.sum(axis=0, dtype=np.int64).tolist()
    rows = [
        [name, _rounded(value), count]
        for (name, value), count in zip(metrics["per_class"].items(), counts, strict=True)
        if count
    ]
    return {**metrics, "loss": loss.item(), "plots": {"average_precision": rows}}


def confidence_metrics(
    logits: torch.Tensor, labels: np.ndarray, superclasses: Sequence[str] | None = None
) -> dict[str, Any]:
    """
    Of single-label classification: `ece`, the accuracy `superclass_top1` if superclasses (C names) are known, and
    under `plots` the reliability diagram and the selective accuracy.
    """
    confidence, predicted = (found.numpy() for found in logits.double().softmax(dim=1).max(dim=1))
    bins = reliability(confidence, predicted == labels)
    metrics: dict[str, Any] = {"ece": expected_calibration_error(bins)}
    if superclasses:
        parents = np.asarray(superclasses)
        metrics["superclass_top1"] = float((parents[predicted] == parents[labels]).mean())
    curves = {"reliability": bins, "selective_accuracy": selective_accuracy(confidence, predicted == labels)}
    plots = {
        name: {key: [_rounded(value) for value in values] for key, values in curve.items()}
        for name, curve in curves.items()
    }
    return metrics | {"plots": plots}


def _rounded(value: float | int | None) -> float | int | None:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class TargetScale:
    """
    Mean and standard deviation of the targets of a regression, (T,) float64. A head is trained on standardized
    targets, which makes learning rates independent of their units; at the end `apply` makes its outputs the targets.
    """

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, images: LabeledImages) -> "TargetScale | None":
        """Of a training split; None for classes. UsageError for a constant target."""
        if images.problem_type != REGRESSION:
            return None
        mean, std = images.labels.mean(axis=0), images.labels.std(axis=0)
        constant = np.flatnonzero(std <= 1e-12 * np.abs(mean))
        if len(constant):
            name = (images.class_names or [str(number) for number in range(len(std))])[constant[0]]
            raise UsageError(f"the target {name!r} is {mean[constant[0]]:g} in all training images: leave it out")
        return cls(mean, std)

    def standardized(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) with mean 0 and standard deviation 1."""
        mean, std = (torch.as_tensor(value, device=labels.device) for value in (self.mean, self.std))
        return ((labels.double() - mean) / std).float()

    def outputs(self, logits: torch.Tensor) -> torch.Tensor:
        """Standardized outputs (n, T) in the units of the targets."""
        return (logits.double() * torch.as_tensor(self.std) + torch.as_tensor(self.mean)).float()

    @torch.no_grad()
    def apply(self, classifier: PreTrainedModel) -> None:
        """Change a head from standardized targets to the targets."""
        for parameter in head_parameters(classifier).values():
            std, mean = (torch.as_tensor(value, device=parameter.device) for value in (self.std, self.mean))
            if parameter.ndim == 2:
                parameter.copy_(parameter.double() * std[:, None])
            else:
                parameter.copy_(parameter.double() * std + mean)


def superclasses_of(images: LabeledImages, num_classes: int) -> list[str] | None:
    """The superclass of each class, None if they are unknown. UsageError for a class without one."""
    if not images.superclasses:
        return None
    known: Mapping[str, str] = images.superclasses
    names = images.class_names or [str(number) for number in range(num_classes)]
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise UsageError(f"no training image tells the superclass of {missing!r}: leave out --superclass_column")
    return [known[name] for name in names]
