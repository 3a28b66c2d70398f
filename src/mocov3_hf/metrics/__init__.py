"""Metrics of features and scores: nearest neighbors, collapse, accuracy. Pure functions on tensors and arrays."""

from .accuracy import accuracy_metrics
from .collapse import CollapseSummary, collapse_summary, effective_rank, normalized_std
from .knn import knn_accuracy, knn_predict, nearest_neighbors


__all__ = [
    "CollapseSummary",
    "accuracy_metrics",
    "collapse_summary",
    "effective_rank",
    "knn_accuracy",
    "knn_predict",
    "nearest_neighbors",
    "normalized_std",
]
