"""Metrics of features, scores and predictions. Pure functions on tensors and arrays."""

from .accuracy import accuracy_metrics
from .calibration import expected_calibration_error, reliability, selective_accuracy
from .collapse import CollapseSummary, collapse_summary, effective_rank, normalized_std
from .knn import knn_accuracy, knn_average, knn_predict, nearest_neighbors
from .multilabel import best_thresholds, multilabel_metrics
from .regression import regression_metrics


__all__ = [
    "CollapseSummary",
    "accuracy_metrics",
    "best_thresholds",
    "collapse_summary",
    "effective_rank",
    "expected_calibration_error",
    "knn_accuracy",
    "knn_average",
    "knn_predict",
    "multilabel_metrics",
    "nearest_neighbors",
    "normalized_std",
    "regression_metrics",
    "reliability",
    "selective_accuracy",
]
