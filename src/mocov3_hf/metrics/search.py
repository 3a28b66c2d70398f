"""
Search among features: nearest neighbors with faiss, scikit-learn or torch, groups of near-duplicates, outliers.

All searches are exact, by cosine similarity. Legend: N features, Q queries, D width, k neighbors.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

from .knn import BANK_CHUNK, QUERY_CHUNK, check_features, check_k, nearest_neighbors, unit_rows


BACKENDS = ("auto", "faiss", "sklearn", "torch")
# Pairs of a block of similarities, all of which may be near-duplicates: 512 × 16,384 pairs of rows are 128 MiB.
PAIR_CHUNK = 512
# Above this modified z-score a value is an outlier (Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers").
OUTLIER_Z = 3.5
# Similarities of equal features in float32 differ from 1 by less, and so do those of two libraries.
ROUNDING = 2e-6
Neighbors = tuple[torch.Tensor, torch.Tensor]


def choose_backend(name: str, device: torch.device) -> str:
    """
    The library that searches. `auto` is faiss on a CPU if it is installed, else torch (benchmarks/search.py).

    Raises:
        ValueError: An unknown name, or a library that is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    packages = {"faiss": "faiss-cpu", "sklearn": "scikit-learn"}
    installed = [module for module in packages if importlib.util.find_spec(module) is not None]
    if name == "auto":
        return "faiss" if device.type == "cpu" and "faiss" in installed else "torch"
    if name in packages and name not in installed:
        raise ValueError(f"backend {name!r} is not installed: pip install {packages[name]}, or pass auto")
    return name


def search(
    queries: torch.Tensor, bank: torch.Tensor, k: int, *, backend: str = "auto", device: torch.device | None = None
) -> Neighbors:
    """
    The `k` rows of the bank most similar to each query.

    Args:
        queries: (Q, D) floating point.
        bank: (N, D). torch converts it in chunks; faiss and scikit-learn need a copy in float32.
        k: 1 ≤ k ≤ N.
        backend: As `choose_backend`.
        device: Of torch; None for the device of the bank.

    Returns:
        Cosine similarities (Q, k) float32 in descending order, and rows of the bank (Q, k) int64.

    Raises:
        ValueError: As `nearest_neighbors` and `choose_backend`.
    """
    device = bank.device if device is None else device
    backend = choose_backend(backend, device)
    if backend == "torch":
        similarities, rows = nearest_neighbors(queries, bank, k, device=device)
        return similarities.float(), rows
    for name, features in (("queries", queries), ("bank", bank)):
        check_features(name, features)
    check_k([k], len(bank))
    find = (_faiss if backend == "faiss" else _sklearn)(bank, k)
    found = [find(part) for part in _unit_chunks(queries, QUERY_CHUNK)]
    similarities, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return torch.from_numpy(similarities.astype(np.float32)), torch.from_numpy(rows.astype(np.int64))


def _unit_chunks(features: torch.Tensor, size: int) -> Iterator[np.ndarray]:
    for part in features.split(size):
        yield unit_rows(part, torch.device("cpu"), torch.float32).numpy()


def _faiss(bank: torch.Tensor, k: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    with warnings.catch_warnings():  # of its bindings, about types of Python
        warnings.simplefilter("ignore", DeprecationWarning)
        import faiss
    index = faiss.IndexFlatIP(bank.shape[1])
    for part in _unit_chunks(bank, BANK_CHUNK):
        index.add(part)
    return lambda queries: index.search(queries, k)


def _sklearn(bank: torch.Tensor, k: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    from sklearn.neighbors import NearestNeighbors

    # The order of unit vectors by Euclidean distance is that by cosine; it is searched in blocks, without a matrix.
    unit = np.concatenate(list(_unit_chunks(bank, BANK_CHUNK)))
    index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean").fit(unit)

    def find(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distances, rows = index.kneighbors(queries)
        return 1 - distances**2 / 2, rows

    return find


def nearest_others(
    features: torch.Tensor, k: int, *, backend: str = "auto", device: torch.device | None = None
) -> Neighbors:
    """
    The `k` other rows most similar to each row, as `search`; fewer where there are not so many rows.

    Raises:
        ValueError: Fewer than two rows, and as `search`.
    """
    if len(features) < 2:
        raise ValueError(f"neighbors need at least 2 images, got {len(features)}")
    similarities, rows = search(features, features, min(k + 1, len(features)), backend=backend, device=device)
    is_self = rows == torch.arange(len(rows))[:, None]
    # Among more equal rows than neighbors, a row may not find itself.
    is_self[~is_self.any(dim=1), -1] = True
    shape = (len(rows), rows.shape[1] - 1)
    return similarities[~is_self].view(shape), rows[~is_self].view(shape)


def duplicate_groups(
    features: torch.Tensor, neighbors: Neighbors, threshold: float, *, device: torch.device | None = None
) -> torch.Tensor:
    """
    Groups of rows that are connected by pairs with at least this similarity.

    Rows of which all neighbors are that similar may have more than k: these are compared with all rows, in blocks.

    Args:
        features: (N, D).
        neighbors: Of `nearest_others`.
        threshold: Cosine similarity; one that is lower by `ROUNDING` reaches it.
        device: Where the blocks are computed; None for that of the features.

    Returns:
        (N,) int64: the smallest row of the group. A row without near-duplicates is a group of itself.
    """
    similarities, rows = neighbors
    threshold -= ROUNDING
    is_similar = similarities >= threshold
    groups = np.arange(len(features))
    first, place = is_similar.nonzero(as_tuple=True)
    _merge(groups, first.numpy(), rows[first, place].numpy())
    crowded = is_similar.all(dim=1).nonzero()[:, 0] if rows.shape[1] < len(features) - 1 else rows.new_empty(0)
    device = features.device if device is None else device
    for some in crowded.split(PAIR_CHUNK):
        query = unit_rows(features[some], device, torch.float32)
        for begin in range(0, len(features), BANK_CHUNK):
            bank = unit_rows(features[begin : begin + BANK_CHUNK], device, torch.float32)
            first, second = (query @ bank.T >= threshold).nonzero(as_tuple=True)
            _merge(groups, some[first.cpu()].numpy(), second.cpu().numpy() + begin)
    return torch.from_numpy(groups)


def _merge(groups: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Unite the groups of pairs of rows, in place: every row keeps the smallest row of its group."""
    while True:
        one, other = groups[first], groups[second]
        low, high = np.minimum(one, other), np.maximum(one, other)
        if (low == high).all():
            return
        np.minimum.at(groups, high, low)
        while not np.array_equal(groups, groups[groups]):
            groups[:] = groups[groups]


def outlier_scores(similarities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How far rows are from the others.

    Args:
        similarities: (N, k) of `nearest_others`.

    Returns:
        Mean cosine distance to the k neighbors, (N,) float32, and its modified z-score: the distance from the median
        in units of the median absolute deviation, times 0.6745. Above `OUTLIER_Z` it is an outlier. Where more than
        half of the scores are equal, as among copies, the unit is the mean absolute deviation times 0.8453, which is
        as large for normally distributed scores.
    """
    scores = (1 - similarities.mean(dim=1)).clamp(min=0)
    centered = scores - scores.median()
    median, mean = centered.abs().median(), centered.abs().mean()
    deviation = median if median > ROUNDING else 0.8453 * mean
    return scores, 0.6745 * centered / deviation if deviation > ROUNDING else torch.zeros_like(scores)
