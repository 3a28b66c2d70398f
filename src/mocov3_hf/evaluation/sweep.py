"""
A grid of linear classifiers, trained together by SGD on cached features: the published linear protocol without
augmentation, at the cost of one classifier.

Legend: G settings of the grid, n features, B batch, D width, C classes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..metrics import best_thresholds, multilabel_metrics, regression_metrics
from .common import held_out_rows
from .linear import LinearClassifier, check_labeled, fit_linear_regressions
from .problems import probabilities_of


# Published at batch 1024: 0.4 for ResNet-50, 12 for ViT; here with a factor of about three between neighbors.
LEARNING_RATES = (0.1, 0.4, 1.2, 4.0, 12.0, 40.0)
WEIGHT_DECAYS = (0.0, 1e-6, 1e-4)
# Of ridge regression on standardized features.
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
MOMENTUM = 0.9
INITIAL_STD = 0.01


@dataclass(frozen=True)
class LinearSweep:
    """
    Classifiers of a grid.

    Attributes:
        settings: (learning rate, weight decay) of each of the G classifiers.
        weight: (G, C, D) float32.
        bias: (G, C) float32.
        loss: (G,) float64, mean cross-entropy over the last epoch, not finite for a setting that diverged.
    """

    settings: list[tuple[float, float]]
    weight: torch.Tensor
    bias: torch.Tensor
    loss: torch.Tensor

    def classifier(self, index: int) -> LinearClassifier:
        """One of the grid, on the CPU."""
        return LinearClassifier(self.weight[index].cpu(), self.bias[index].cpu(), loss=self.loss[index].item())

    def accuracies(self, features: torch.Tensor, labels: torch.Tensor, *, batch_size: int = 1024) -> torch.Tensor:
        """
        (G,) float64: accuracy of each classifier on features (n, D) and labels (n,), or with labels (n, C) of several
        classes per image the mean average precision; 0 for a diverged one.
        """
        if labels.dim() == 2:
            finite = self.loss.isfinite().tolist()
            scores = [
                self.classifier(index).logits(features).cpu() if good else None for index, good in enumerate(finite)
            ]
            found = [0.0 if rows is None else mean_average_precision(rows, labels) for rows in scores]
            return torch.tensor(found, dtype=torch.float64)
        groups, classes, width = self.weight.shape
        hits = torch.zeros(groups, dtype=torch.float64)
        for rows, target in zip(features.split(batch_size), labels.split(batch_size), strict=True):
            rows, target = rows.to(self.weight), target.to(self.weight.device)
            logits = (rows @ self.weight.view(groups * classes, width).T).view(-1, groups, classes) + self.bias
            hits += (logits.argmax(dim=2) == target[:, None]).sum(dim=0).cpu()
        return torch.where(self.loss.isfinite().cpu(), hits / len(features), 0.0)


@torch.no_grad()
def sweep_linear_classifiers(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int | None = None,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    num_epochs: int = 90,
    batch_size: int = 1024,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> LinearSweep:
    """
    Train one linear classifier for every pair of a learning rate and a weight decay, all in one pass per epoch.

    Each classifier is trained as it would be alone: SGD with momentum 0.9 on the mean cross-entropy, weight decay on
    the weight but not on the bias, a cosine learning rate from its peak to 0 over all steps, initial weights from a
    normal distribution of standard deviation 0.01, batches in one random order (values of the published linear
    recipes). They share the loading of a batch, and one matrix product instead of G.

    Args:
        features: (n, D) floating point, not standardized, as published.
        labels: (n,) integers from 0; or (n, C), 1 for the classes that apply to an image, else 0: then the loss is the
            mean binary cross-entropy.
        num_classes: None for the largest label + 1.
        learning_rates: At this batch size, positive.
        weight_decays: Not negative.
        num_epochs, batch_size: Of SGD. The last batch of an epoch may be smaller.
        seed: Of initial weights and order.
        device: Where to compute; None for the device of the features.
        progress: Whether to show a progress bar.

    Returns:
        The classifiers, learning rates in the outer loop and weight decays in the inner, on `device`.

    Raises:
        ValueError: Features and labels as `fit_linear_classifier`; an empty grid or values out of range.
    """
    labels, num_classes = check_labeled(features, labels, num_classes)
    settings = checked_grid(learning_rates, weight_decays)
    for name, value in (("num_epochs", num_epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    device = features.device if device is None else torch.device(device)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    groups, width, count = len(settings), features.shape[1], len(features)
    rates, decays = torch.tensor(settings, dtype=dtype, device=device).T[..., None, None]
    generator = torch.Generator().manual_seed(seed)
    start = INITIAL_STD * torch.randn(num_classes, width, generator=generator, dtype=dtype)
    weight = start.to(device).repeat(groups, 1, 1)
    bias = torch.zeros(groups, num_classes, 1, dtype=dtype, device=device)
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    # MPS has no float64.
    loss = torch.zeros(groups, dtype=dtype if device.type == "mps" else torch.float64, device=device)
    steps_per_epoch = -(-count // batch_size)
    step = 0
    with tqdm(total=num_epochs * steps_per_epoch, unit="step", desc="linear sweep", disable=not progress) as bar:
        for _ in range(num_epochs):
            loss.zero_()
            for rows in torch.randperm(count, generator=generator).split(batch_size):
                x, target = features[rows].to(device, dtype), labels[rows.to(labels.device)].to(device)
                # (G, C, B): products of G·C rows without a transposed copy.
                logits = torch.add((weight.view(-1, width) @ x.T).view(groups, num_classes, -1), bias)
                if labels.dim() == 2:
                    applies = target.T.to(dtype).expand_as(logits)
                    losses = F.binary_cross_entropy_with_logits(logits, applies, reduction="none")
                    loss += losses.sum(dim=(1, 2)) / (count * num_classes)
                    error = logits.sigmoid_().sub_(applies).div_(num_classes)
                else:
                    log_probabilities = F.log_softmax(logits, dim=1)
                    index = target.expand(groups, 1, -1)
                    loss -= log_probabilities.gather(1, index).sum(dim=(1, 2)) / count
                    error = log_probabilities.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=dtype))
                error /= len(rows)
                rate = rates * (0.5 * (1 + math.cos(math.pi * step / (num_epochs * steps_per_epoch))))
                gradient = (error.view(-1, len(rows)) @ x).view_as(weight).addcmul_(weight, decays)
                weight_momentum.mul_(MOMENTUM).add_(gradient)
                bias_momentum.mul_(MOMENTUM).add_(error.sum(dim=2, keepdim=True))
                weight.addcmul_(weight_momentum, rate, value=-1)
                bias.addcmul_(bias_momentum, rate, value=-1)
                step += 1
                bar.update()
    return LinearSweep(settings, weight.float(), bias[..., 0].float(), loss)


@dataclass(frozen=True)
class ChosenLinear:
    """
    The best setting of a grid, selected without the test set.

    Attributes:
        classifier: Trained with this setting on all features.
        learning_rate, weight_decay: The setting.
        validation_accuracy: Accuracy on the held-out part when trained without it; with several classes per image mean
            average precision, of regression R².
        validation_accuracies: Of every setting, "lr=0.4 wd=1e-06" to accuracy.
        thresholds: With several classes per image, of each class on the held-out part.
    """

    classifier: LinearClassifier
    learning_rate: float
    weight_decay: float
    validation_accuracy: float
    validation_accuracies: dict[str, float]
    thresholds: list[float] | None = None


def choose_linear_classifier(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int | None = None,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    validation_fraction: float = 0.1,
    seed: int = 0,
    **options,
) -> ChosenLinear:
    """
    Select learning rate and weight decay on a held-out part of the training features, then train on all of them.

    The test set is not used: the best of a grid on the test set would overestimate the accuracy.

    Args:
        features, labels, num_classes, learning_rates, weight_decays, seed: As `sweep_linear_classifiers`.
        validation_fraction: Fraction of every class to hold out, between 0 and 1.
        options: Other arguments of `sweep_linear_classifiers`.

    Raises:
        ValueError: As `sweep_linear_classifiers`; a fraction out of range, or that holds out nothing or everything.
    """
    labels, num_classes = check_labeled(features, labels, num_classes)
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be above 0 and below 1, got {validation_fraction}")
    held_out = _held_out(labels, validation_fraction, seed).to(features.device)
    grid = sweep_linear_classifiers(
        features[~held_out],
        labels[~held_out],
        num_classes,
        learning_rates=learning_rates,
        weight_decays=weight_decays,
        seed=seed,
        **options,
    )
    accuracies = grid.accuracies(features[held_out], labels[held_out])
    # Of equal ones the first, which has the smallest learning rate if they are in ascending order.
    best = int(accuracies.argmax())
    thresholds = None
    if labels.dim() == 2:
        logits = grid.classifier(best).logits(features[held_out])
        thresholds = best_thresholds(probabilities_of(logits), labels[held_out].numpy())
    rate, decay = grid.settings[best]
    final = sweep_linear_classifiers(
        features, labels, num_classes, learning_rates=[rate], weight_decays=[decay], seed=seed, **options
    )
    return ChosenLinear(
        final.classifier(0),
        learning_rate=rate,
        weight_decay=decay,
        validation_accuracy=accuracies[best].item(),
        validation_accuracies={
            f"lr={rate:g} wd={decay:g}": accuracy
            for (rate, decay), accuracy in zip(grid.settings, accuracies.tolist(), strict=True)
        },
        thresholds=thresholds,
    )


def choose_linear_regression(
    features: torch.Tensor,
    targets: torch.Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    validation_fraction: float = 0.1,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ChosenLinear:
    """
    Select the penalty of `fit_linear_regressions` on a held-out part of the training features by R², then fit all of
    them. Of the result, `learning_rate` is 0 and `weight_decay` the penalty. Arguments and errors are those of
    `choose_linear_classifier`.
    """
    held_out = _held_out(targets, validation_fraction, seed).to(features.device)
    candidates = fit_linear_regressions(features[~held_out], targets[~held_out], penalties, device=device)
    scores = [
        regression_metrics(candidate.logits(features[held_out]).cpu().numpy(), targets[held_out].numpy())["r2"]
        for candidate in candidates
    ]
    best = int(np.argmax(scores))
    (final,) = fit_linear_regressions(features, targets, [penalties[best]], device=device)
    return ChosenLinear(
        final,
        learning_rate=0.0,
        weight_decay=penalties[best],
        validation_accuracy=scores[best],
        validation_accuracies={f"l2={l2:g}": score for l2, score in zip(penalties, scores, strict=True)},
    )


def _held_out(labels: torch.Tensor, validation_fraction: float, seed: int) -> torch.Tensor:
    return torch.from_numpy(held_out_rows(labels.cpu().numpy(), validation_fraction, seed))


def mean_average_precision(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean average precision of logits (n, C); 0 for a held-out part without any class."""
    return multilabel_metrics(logits.numpy(), labels.cpu().numpy())["map"] if labels.any() else 0.0


def checked_grid(learning_rates: Sequence[float], weight_decays: Sequence[float]) -> list[tuple[float, float]]:
    """All pairs, learning rates in the outer loop; ValueError for an empty list or a value out of range."""
    for name, values, lowest in (("learning_rates", learning_rates, 0), ("weight_decays", weight_decays, None)):
        if not values:
            raise ValueError(f"{name} needs at least one value, got none")
        for value in values:
            if not (math.isfinite(value) and (value > 0 or (value == 0 and lowest is None))):
                raise ValueError(f"{name} must be {'positive' if lowest == 0 else 'at least 0'}, got {value}")
    return list(itertools.product(map(float, learning_rates), map(float, weight_decays)))
