"""Logistic and ridge regression on frozen features.

Legend: n features, D width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


# Rows whose logits are held at once: 65,536 × 1,000 classes in float64 are 500 MiB.
_ROWS = 65536
# Standardized features up to this number of values (2 GiB) are kept between steps.
_KEPT_VALUES = 2**28


@dataclass(frozen=True)
class LinearClassifier:
    """
    `logits = features @ weight.T + bias`, on features that are not standardized.

    Attributes:
        weight: (C, D) float32.
        bias: (C,) float32.
        loss: Final value of the objective, mean cross-entropy plus penalty; of SGD, its mean over the last epoch; NaN
            of ridge regression.
        iterations: Number of iterations; None for SGD.
        converged: Whether the gradient fell below the tolerance; None for SGD.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    loss: float
    iterations: int | None = None
    converged: bool | None = None

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(n, C) of features (n, D), on their device."""
        return F.linear(features.to(self.weight.dtype), self.weight.to(features.device), self.bias.to(features.device))

    def predict(self, features: torch.Tensor, top: int = 1) -> torch.Tensor:
        """The `top` most probable classes (n, top) int64 on the CPU, the most probable first."""
        return torch.cat([self.logits(chunk).topk(top, dim=1).indices.cpu() for chunk in features.split(_ROWS)])

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor, top: int = 1) -> float:
        """Fraction of the features whose label (n,) is among the `top` most probable classes."""
        return (self.predict(features, top) == labels.cpu()[:, None]).any(dim=1).double().mean().item()


def fit_linear_classifier(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int | None = None,
    *,
    l2: float = 1e-3,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    device: torch.device | str | None = None,
) -> LinearClassifier:
    """
    Multinomial logistic regression: a convex problem, whose solution depends on no learning rate and no seed.

    Minimizes `mean cross-entropy + l2/2 · ‖W‖²` over weights on standardized features (each dimension to mean 0 and
    standard deviation 1 over the training set; the bias is not penalized) by full-batch L-BFGS in float64, then folds
    the standardization into weight and bias. The same problem as scikit-learn's `LogisticRegression(C)` on
    standardized features with `l2 = 1 / (C · n)`.

    Args:
        features: (n, D) floating point.
        labels: (n,) integers from 0.
        num_classes: None for the largest label + 1. Classes without an example are allowed.
        l2: Weight of the penalty, positive: without it, separable features have no optimal classifier.
        max_iterations: Of L-BFGS.
        tolerance: Largest entry of the gradient at which the fit ends.
        device: Where to compute; None for the device of the features.

    Returns:
        The classifier for features that are not standardized, on the CPU.

    Raises:
        ValueError: Shapes or labels that do not match, NaN or infinity, `l2` not positive.
    """
    labels, num_classes = check_labeled(features, labels, num_classes)
    if not l2 > 0:
        raise ValueError(f"l2 must be positive, got {l2}")
    device = features.device if device is None else torch.device(device)
    # MPS has no float64.
    device = torch.device("cpu") if device.type == "mps" else device
    labels = labels.to(device)
    mean, scale = standardization(features, device)
    width = features.shape[1]
    parameters = torch.zeros(num_classes, width + 1, dtype=torch.float64, device=device)

    def standardized(begin: int) -> torch.Tensor:
        return (features[begin : begin + _ROWS].to(device, torch.float64) - mean) / scale

    begins = range(0, len(features), _ROWS)
    # Kept if they fit: standardizing again in each of some hundred iterations costs more than the iterations.
    kept = [standardized(begin) for begin in begins] if features.numel() <= _KEPT_VALUES else None

    def objective() -> torch.Tensor:
        """Value and gradient in closed form, in chunks of rows."""
        weight, bias = parameters[:, :width], parameters[:, width]
        value = 0.5 * l2 * weight.square().sum()
        gradient = torch.zeros_like(parameters)
        gradient[:, :width] = l2 * weight
        for index, begin in enumerate(begins):
            rows = standardized(begin) if kept is None else kept[index]
            target = labels[begin : begin + _ROWS]
            log_probabilities = F.log_softmax(torch.addmm(bias, rows, weight.T), dim=1)
            value = value - log_probabilities.gather(1, target[:, None]).sum() / len(features)
            error = log_probabilities.exp_()
            error[torch.arange(len(target), device=device), target] -= 1
            error /= len(features)
            gradient[:, :width].addmm_(error.T, rows)
            gradient[:, width] += error.sum(dim=0)
        parameters.grad = gradient
        return value

    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    with torch.no_grad():
        optimizer.step(objective)
        loss = objective().item()
        converged = parameters.grad.abs().max().item() <= tolerance
        weight = parameters[:, :width] / scale
        bias = parameters[:, width] - weight @ mean
    return LinearClassifier(
        weight.float().cpu(),
        bias.float().cpu(),
        loss=loss,
        iterations=optimizer.state[parameters]["n_iter"],
        converged=converged,
    )


def standardization(features: torch.Tensor, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and standard deviation of every dimension, (D,) float64, in two passes over chunks of rows. The standard
    deviation of a constant dimension is 1, to avoid a division by zero.
    """
    count = len(features)
    mean = sum(chunk.to(device, torch.float64).sum(dim=0) for chunk in features.split(_ROWS)) / count
    squares = sum((chunk.to(device, torch.float64) - mean).square_().sum(dim=0) for chunk in features.split(_ROWS))
    deviation = (squares / count).sqrt_()
    # Differences below this are rounding errors of float32.
    constant = deviation <= 1e-7 * mean.abs()
    return mean, torch.where(constant, 1.0, deviation)


@torch.no_grad()
def fit_linear_regressions(
    features: torch.Tensor,
    targets: torch.Tensor,
    penalties: Sequence[float],
    *,
    device: torch.device | str | None = None,
) -> list[LinearClassifier]:
    """
    Ridge regressions, solved exactly in float64: minimizes `mean squared error + l2 · ‖W‖²` over weights on
    standardized features and targets, for every penalty l2 from one eigendecomposition: scikit-learn's
    `Ridge(alpha = l2 · n)`.

    Args:
        features: (n, D) floating point.
        targets: (n, T) floating point, in their own units; none constant.
        penalties: Values of l2, positive.
        device: Where to compute; None for the device of the features.

    Returns:
        Of each penalty the regression for features and targets that are not standardized, on the CPU.

    Raises:
        ValueError: Shapes that do not match, NaN or infinity.
    """
    check_labeled(features, targets, None)
    device = features.device if device is None else torch.device(device)
    # MPS has no float64.
    device = torch.device("cpu") if device.type == "mps" else device
    mean, scale = standardization(features, device)
    target_mean, target_scale = standardization(targets, device)
    width = features.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    moment = torch.zeros(width, targets.shape[1], dtype=torch.float64, device=device)
    for rows, target in zip(features.split(_ROWS), targets.split(_ROWS), strict=True):
        x = (rows.to(device, torch.float64) - mean) / scale
        gram.addmm_(x.T, x, alpha=1 / len(features))
        moment.addmm_(x.T, (target.to(device, torch.float64) - target_mean) / target_scale, alpha=1 / len(features))
    values, vectors = torch.linalg.eigh(gram)
    rotated = vectors.T @ moment
    found = []
    for penalty in penalties:
        weight = (vectors @ (rotated / (values + penalty)[:, None])).T * target_scale[:, None] / scale
        bias = target_mean - weight @ mean
        found.append(LinearClassifier(weight.float().cpu(), bias.float().cpu(), loss=float("nan")))
    return found


def check_labeled(features: torch.Tensor, labels: torch.Tensor, num_classes: int | None) -> tuple[torch.Tensor, int]:
    """
    Labels as int64, or (n, C) as they are, and the number of classes; ValueError for features or labels that are not
    valid.
    """
    if features.dim() != 2 or not features.is_floating_point() or len(features) == 0:
        raise ValueError(
            f"features must be a floating point tensor (n, D) with n ≥ 1, got {tuple(features.shape)} {features.dtype}"
        )
    if labels.dim() == 2 and len(labels) == len(features) and labels.isfinite().all():
        _check_finite(features)
        return labels, labels.shape[1]
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be one integer for each of the {len(features)} features, got {tuple(labels.shape)} "
            f"{labels.dtype}"
        )
    smallest, largest = int(labels.min()), int(labels.max())
    num_classes = largest + 1 if num_classes is None else num_classes
    if smallest < 0 or largest >= num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {smallest}..{largest}")
    _check_finite(features)
    return labels.long(), num_classes


def _check_finite(features: torch.Tensor) -> None:
    if not all(bool(chunk.isfinite().all()) for chunk in features.split(_ROWS)):
        raise ValueError("features contain NaN or infinity: the model has diverged")
