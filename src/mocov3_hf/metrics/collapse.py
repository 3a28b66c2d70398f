"""
Collapse metrics of features: whether they differ between images, and in how many directions.

Legend: N features, D width.
"""

import math
from dataclasses import dataclass

import torch

from .knn import check_features


# Below this fraction of 1/√D, all images share one feature. Even untrained networks are above it.
COLLAPSED_STD_RATIO = 0.01
_CHUNK = 16384


@dataclass(frozen=True)
class CollapseSummary:
    """
    Collapse metrics of N features.

    Attributes:
        std: Mean over dimensions of the standard deviation of the L2-normalized features.
        std_ratio: `std` times √D: 0 for a constant, 1 for features spread evenly over the sphere.
        effective_rank: Number of directions in use, between 1 and `dimensions`.
        dimensions: D.
        num_features: N.
    """

    std: float
    std_ratio: float
    effective_rank: float
    dimensions: int
    num_features: int

    @property
    def is_collapsed(self) -> bool:
        """Whether all features are the same vector (complete collapse)."""
        return self.std_ratio < COLLAPSED_STD_RATIO


@torch.no_grad()
def normalized_std(features: torch.Tensor) -> torch.Tensor:
    """
    Standard deviation of every dimension of the L2-normalized features (SimSiam, arXiv 2011.10566, §4.1).

    Computed in float64 in two passes over chunks (mean, then centered squares); divides by N.

    Args:
        features: (N, D) floating point, N ≥ 2.

    Returns:
        (D,) float64 on the CPU: 1/√D for features spread evenly over the sphere, 0 for a collapsed model.

    Raises:
        ValueError: Another shape or dtype, a single row, NaN or infinity.
    """
    _check_several(features)
    mean = sum(_unit_chunk(chunk).sum(dim=0) for chunk in features.split(_CHUNK)) / len(features)
    squares = sum((_unit_chunk(chunk) - mean).square_().sum(dim=0) for chunk in features.split(_CHUNK))
    return (squares / len(features)).sqrt().cpu()


@torch.no_grad()
def effective_rank(features: torch.Tensor) -> float:
    """
    Number of directions that the features use: exp of the entropy of their normalized singular values.

    Roy and Vetterli 2007, eq. 1-3; for features of a self-supervised model, RankMe (arXiv 2210.02885, eq. 2). Features
    are L2-normalized and not centered, so that a model that returns one vector for all images has rank 1. A QR
    decomposition in float64 folds blocks of rows into one triangle: as exact as a full decomposition, with D² memory.

    Args:
        features: (N, D) floating point, N ≥ 2.

    Returns:
        Between 1 and min(N, D); 1 also for features that are all zero.

    Raises:
        ValueError: Another shape or dtype, a single row, NaN or infinity.
    """
    _check_several(features)
    triangle = None
    # A block of at least D rows keeps the QR of [triangle; block] worth its cost.
    for chunk in features.split(max(2048, 2 * features.shape[1])):
        block = _unit_chunk(chunk)
        block = block if triangle is None else torch.cat([triangle, block])
        triangle = torch.linalg.qr(block, mode="r").R
    values = torch.linalg.svdvals(triangle)
    total = values.sum()
    if total == 0:
        return 1.0
    shares = values / total
    return torch.special.entr(shares).sum().exp().item()


def collapse_summary(features: torch.Tensor) -> CollapseSummary:
    """All collapse metrics of (N, D) features. Raises as `normalized_std`."""
    std = normalized_std(features).mean().item()
    rows, width = features.shape
    return CollapseSummary(
        std=std,
        std_ratio=std * math.sqrt(width),
        effective_rank=effective_rank(features),
        dimensions=width,
        num_features=rows,
    )


def _unit_chunk(features: torch.Tensor) -> torch.Tensor:
    # MPS has no float64.
    device = torch.device("cpu") if features.device.type == "mps" else features.device
    return torch.nn.functional.normalize(features.to(device).double(), dim=1)


def _check_several(features: torch.Tensor) -> None:
    check_features("features", features)
    if len(features) < 2:
        raise ValueError("collapse metrics need features of at least 2 images")
