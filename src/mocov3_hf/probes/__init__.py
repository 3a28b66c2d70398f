"""Judgements on feature tensors: nearest neighbours and signs of collapse. Pure functions, no models, no files."""

from .collapse import CollapseSummary, collapse_summary, effective_rank, normalized_std
from .knn import knn_accuracy, knn_predict, nearest_neighbors


__all__ = [
    "CollapseSummary",
    "collapse_summary",
    "effective_rank",
    "knn_accuracy",
    "knn_predict",
    "nearest_neighbors",
    "normalized_std",
]
