"""What lies near what among the features of some images.

Legend: n images, D width, k neighbours.
"""

import numpy as np
import torch
from sklearn.manifold import TSNE
from torch.nn import functional as F

from ..metrics.knn import nearest_neighbors


# As many points as t-SNE needs for its perplexity to mean something.
MIN_POINTS = 10
PERPLEXITY = 30


def neighbors_of_each(features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k most similar other images of each.

    Args:
        features: (n, D), n > k.

    Returns:
        Cosine similarities (n, k), the highest first, and their numbers (n, k).
    """
    similarities, rows = nearest_neighbors(features, features, k + 1)
    own = rows == torch.arange(len(features))[:, None]
    # An image with more than k twins need not be among its own neighbours: then the last is dropped.
    own[:, -1] |= ~own.any(dim=1)
    return similarities[~own].view(len(features), k), rows[~own].view(len(features), k)


def agreement(labels: np.ndarray, rows: np.ndarray) -> float:
    """Share of the neighbours (n, k) that have the class (n,) of their image."""
    return float((labels[rows] == labels[:, None]).mean())


def embed(features: torch.Tensor, seed: int = 0) -> np.ndarray:
    """
    t-SNE (van der Maaten and Hinton, 2008) of L2-normalised features.

    Args:
        features: (n, D), n ≥ `MIN_POINTS`.
        seed: of the few draws that are left with a start from principal components.

    Returns:
        (n, 2) float32.
    """
    unit = F.normalize(features, dim=1).numpy()
    perplexity = min(PERPLEXITY, (len(unit) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)
