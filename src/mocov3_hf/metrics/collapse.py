"""Signs of collapse in features: do they still differ between images, and along how many directions.

Legend: N features, D width.
"""

import math
from dataclasses import dataclass

import torch

from .knn import check_features


# Below this part of 1/√D all images share one feature; so far down even untrained networks do not lie.
COLLAPSED_STD_RATIO = 0.01
_CHUNK = 16384


@dataclass(frozen=True)
class CollapseSummary:
    """
    Attributes:
        std: mean over dimensions of the standard deviation of the L2-normalised features.
        std_ratio: `std` times √D: 0 for a constant, 1 for features spread evenly over the sphere.
        effective_rank: directions in use, between 1 and `dimensions`.
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
        """Whether all features are one vector (complete collapse)."""
        return self.std_ratio < COLLAPSED_STD_RATIO


@torch.no_grad()
def normalized_std(features: torch.Tensor) -> torch.Tensor:
    """Standard deviation of every dimension of the L2-normalised features (SimSiam, arXiv 2011.10566, §4.1).

    Computed in float64 and in two passes (mean, then centred squares), in chunks; divides by N.

    Args:
        features: (N, D) floating point, N ≥ 2.

    Returns:
        (D,) float64 on the CPU. Features spread evenly over the sphere have 1/√D everywhere, a collapsed model 0.

    Raises:
        ValueError: another shape or dtype, a single row, NaN or infinity.
    """
    _check_several(features)
    mean = sum(_unit_chunk(chunk).sum(dim=0) for chunk in features.split(_CHUNK)) / len(features)
    squares = sum((_unit_chunk(chunk) - mean).square_().sum(dim=0) for chunk in features.split(_CHUNK))
    return (squares / len(features)).sqrt().cpu()


@torch.no_grad()
def effective_rank(features: torch.Tensor) -> float:
    """Number of directions the features use: exp of the entropy of their normalised singular values.

    Roy and Vetterli 2007, eq. 1-3; on features of a self-supervised model, RankMe (arXiv 2210.02885, eq. 2). Features
    are L2-normalised and not centred, so that a model that gives one vector for everything has rank 1. Singular values
    come from blocks folded into one triangle by QR in float64: as exact as a full decomposition, in memory of D².

    Args:
        features: (N, D) floating point, N ≥ 2.

    Returns:
        Between 1 and min(N, D); 1 also for features that are all zero.

    Raises:
        ValueError: another shape or dtype, a single row, NaN or infinity.
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
    """Both signs of collapse of (N, D) features. Raises as `normalized_std`."""
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
        raise ValueError("features of a single image cannot differ: give at least 2 rows")
