"""
Weighted k-nearest-neighbor classification on frozen features.

The protocol of the literature (Wu et al. 2018, arXiv 1805.01978, §3.4; the same in DINO and the successors of MoCo):
cosine similarity; every neighbor votes for its class with weight `exp(similarity / T)`, `T = 0.07`.

Legend: Q queries, N bank (labeled features), D width, K neighbors, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


# Chunks of the similarity matrix: 4,096 × 16,384 in float32 are 256 MiB.
QUERY_CHUNK = 4096
BANK_CHUNK = 16384


@torch.no_grad()
def nearest_neighbors(
    queries: torch.Tensor,
    bank: torch.Tensor,
    k: int,
    *,
    device: torch.device | str | None = None,
    query_chunk: int = QUERY_CHUNK,
    bank_chunk: int = BANK_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `k` rows of the bank most similar to each query, by exact search.

    Both sides are processed in chunks, and the best of every bank chunk is merged into the best so far: memory on the
    device is bounded by `query_chunk × bank_chunk` similarities for any Q and N. The order of equally similar rows is
    not defined.

    Args:
        queries: (Q, D) floating point. Half precision is computed in float32, float64 in float64.
        bank: (N, D), on any device and possibly memory-mapped: it is moved in chunks.
        k: Number of neighbors, 1 ≤ k ≤ N.
        device: Where to compute; None for the device of the queries.
        query_chunk, bank_chunk: Rows per chunk.

    Returns:
        Cosine similarities (Q, k) in descending order, and rows of the bank (Q, k) int64, both on the CPU. A feature
        of zeros has similarity 0 to all others.

    Raises:
        ValueError: Shapes other than (rows, D) with the same D, no rows, `k` outside 1..N, NaN or infinity.
    """
    check_features("queries", queries)
    check_features("bank", bank)
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions and the bank {bank.shape[1]}: both must be of one model"
        )
    check_k([k], len(bank))
    for name, size in (("query_chunk", query_chunk), ("bank_chunk", bank_chunk)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    device = queries.device if device is None else torch.device(device)
    dtype = torch.float64 if torch.float64 in (queries.dtype, bank.dtype) else torch.float32
    similarities = torch.empty(len(queries), k, dtype=dtype)
    rows = torch.empty(len(queries), k, dtype=torch.int64)
    # Under autocast, for example inside a training step, similarities would have three digits.
    with torch.autocast(device.type, enabled=False):
        for begin in range(0, len(queries), query_chunk):
            some = slice(begin, begin + query_chunk)
            query = unit_rows(queries[some], device, dtype)
            similarities[some], rows[some] = _search(query, bank, k, bank_chunk)
    return similarities, rows


def _search(query: torch.Tensor, bank: torch.Tensor, k: int, bank_chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = best_rows = None
    for begin in range(0, len(bank), bank_chunk):
        chunk = unit_rows(bank[begin : begin + bank_chunk], query.device, query.dtype)
        values, rows = (query @ chunk.T).topk(min(k, len(chunk)), dim=1)
        rows += begin
        if best is not None:
            values, rows = torch.cat([best, values], dim=1), torch.cat([best_rows, rows], dim=1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            rows = rows.gather(1, order)
        best, best_rows = values, rows
    return best, best_rows


@torch.no_grad()
def knn_predict(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    k: int | Sequence[int] = 20,
    *,
    temperature: float = 0.07,
    num_classes: int | None = None,
    top: int = 1,
    device: torch.device | str | None = None,
    query_chunk: int = QUERY_CHUNK,
    bank_chunk: int = BANK_CHUNK,
) -> dict[int, torch.Tensor]:
    """
    Predicted classes of the queries for every `k`, from one search.

    Args:
        queries, bank, device, query_chunk, bank_chunk: As `nearest_neighbors`.
        bank_labels: (N,) integers from 0.
        k: One or several numbers of neighbors, at most the size of the bank.
        temperature: `T` of the vote, positive.
        num_classes: None for the largest label + 1.
        top: Number of classes per query, the most voted first.

    Returns:
        For every `k` an int64 tensor (Q, top) on the CPU. Places without a vote are -1 (with k = 1, only one class has
        votes). Of classes with equal votes, the lower number comes first.

    Raises:
        ValueError: As `nearest_neighbors`; labels of another length, negative or too large; `temperature` or `top` out
            of range.
    """
    wanted = [k] if isinstance(k, int) else list(k)
    check_features("bank", bank, values=False)
    check_k(wanted, len(bank))
    bank_labels = check_labels("bank_labels", bank_labels, len(bank), "bank")
    smallest, largest = int(bank_labels.min()), int(bank_labels.max())
    num_classes = largest + 1 if num_classes is None else num_classes
    if smallest < 0 or largest >= num_classes:
        raise ValueError(f"bank_labels must be in 0..{num_classes - 1}, got {smallest}..{largest}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not 1 <= top <= num_classes:
        raise ValueError(f"top must be in 1..{num_classes}, the number of classes, got {top}")
    similarities, rows = nearest_neighbors(
        queries, bank, max(wanted), device=device, query_chunk=query_chunk, bank_chunk=bank_chunk
    )
    predictions = {number: torch.empty(len(queries), top, dtype=torch.int64) for number in sorted(set(wanted))}
    for begin in range(0, len(queries), query_chunk):
        some = slice(begin, begin + query_chunk)
        # Subtracting the largest similarity scales all votes of a query; otherwise exp overflows at low temperatures.
        weights = ((similarities[some] - similarities[some, :1]).double() / temperature).exp()
        classes = bank_labels[rows[some]]
        votes = torch.zeros(len(weights), num_classes, dtype=torch.float64)
        counted = 0
        for number, predicted in predictions.items():
            votes.scatter_add_(1, classes[:, counted:number], weights[:, counted:number])
            counted = number
            predicted[some] = _most_voted(votes, top)
    return predictions


def _most_voted(votes: torch.Tensor, top: int) -> torch.Tensor:
    if top == 1:
        return votes.argmax(dim=1, keepdim=True)
    sorted_votes, classes = votes.sort(dim=1, descending=True, stable=True)
    return torch.where(sorted_votes > 0, classes, -1)[:, :top]


@torch.no_grad()
def knn_average(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_values: torch.Tensor,
    k: Sequence[int],
    *,
    temperature: float = 0.07,
    device: torch.device | str | None = None,
) -> dict[int, torch.Tensor]:
    """
    Means of the values of the neighbors, weighted as the votes of `knn_predict`: of 0 and 1 the shares of the votes of
    each class, of numbers a regression.

    Args:
        queries, bank, k, temperature, device: As `knn_predict`.
        bank_values: (N, C) numbers.

    Returns:
        For every `k` (Q, C) float64 on the CPU.

    Raises:
        ValueError: As `nearest_neighbors`.
    """
    similarities, rows = nearest_neighbors(queries, bank, max(k), device=device)
    means = {number: torch.empty(len(queries), bank_values.shape[1], dtype=torch.float64) for number in k}
    chunk = max(1, QUERY_CHUNK // bank_values.shape[1])  # k values of every class for each query
    for begin in range(0, len(queries), chunk):
        some = slice(begin, begin + chunk)
        weights = ((similarities[some] - similarities[some, :1]).double() / temperature).exp()
        values = bank_values[rows[some]].double()
        for number, mean in means.items():
            used = weights[:, :number, None]
            mean[some] = (used * values[:, :number]).sum(dim=1) / used.sum(dim=1)
    return means


def knn_accuracy(
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    k: int | Sequence[int] = 20,
    *,
    temperature: float = 0.07,
    device: torch.device | str | None = None,
    query_chunk: int = QUERY_CHUNK,
    bank_chunk: int = BANK_CHUNK,
) -> dict[int, float]:
    """
    Top-1 accuracy of `knn_predict` between 0 and 1 for every `k`.

    Args:
        query_labels: (Q,) integers from 0; a class that only queries have is always wrong. Others as `knn_predict`.

    Raises:
        ValueError: As `knn_predict`; query labels of another length.
    """
    check_features("queries", queries, values=False)
    query_labels = check_labels("query_labels", query_labels, len(queries), "queries")
    predictions = knn_predict(
        queries,
        bank,
        bank_labels,
        k,
        temperature=temperature,
        device=device,
        query_chunk=query_chunk,
        bank_chunk=bank_chunk,
    )
    return {
        number: (predicted[:, 0] == query_labels).double().mean().item() for number, predicted in predictions.items()
    }


def unit_rows(features: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return F.normalize(features.to(device=device, dtype=dtype), dim=1)


def check_features(name: str, features: torch.Tensor, values: bool = True) -> None:
    """ValueError unless `features` is a floating point tensor (rows, D) with rows, finite if `values` are checked."""
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            f"{name} must be a floating point tensor of shape (rows, D), got {tuple(features.shape)} {features.dtype}"
        )
    if len(features) == 0:
        raise ValueError(f"{name} must have at least one row, got none")
    if values:
        # In chunks: the mask of a memory-mapped bank would have a quarter of its size.
        bad = sum(int((~chunk.isfinite().all(dim=1)).sum()) for chunk in features.split(BANK_CHUNK))
        if bad:
            raise ValueError(
                f"{bad} of {len(features)} rows of {name} contain NaN or infinity: the model has diverged"
            )


def check_labels(name: str, labels: torch.Tensor, rows: int, side: str) -> torch.Tensor:
    """`labels` as int64 on the CPU; ValueError unless there is one integer for each row."""
    if labels.dim() != 1 or labels.is_floating_point() or len(labels) != rows:
        raise ValueError(
            f"{name} must be one integer for each of the {rows} rows of {side}, got {tuple(labels.shape)} "
            f"{labels.dtype}"
        )
    return labels.to("cpu", torch.int64)


def check_k(values: Sequence[int], rows: int) -> None:
    """ValueError unless every k lies in 1..rows."""
    if not values:
        raise ValueError("k needs at least one number of neighbors, got none")
    for k in values:
        if not 1 <= k <= rows:
            raise ValueError(f"k must be in 1..{rows}, the rows of the bank, got {k}")
