"""
Accuracy of classifiers as a metric of the `evaluate` library, without a network.

No command imports it: next to a script called `evaluate.py`, `import evaluate` finds that script.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from .accuracy import accuracy_metrics


class ClassificationAccuracy(evaluate.Metric):
    """
    `accuracy_metrics` as a metric of `evaluate`: add batches, compute once, on one or several processes.

    Args:
        class_names: Names for the per-class accuracies.
        top: As `accuracy_metrics`.
        options: Of `evaluate.Metric` (`num_process`, `process_id`, `experiment_id`, `cache_dir`, ...).
    """

    def __init__(self, class_names: Sequence[str] | None = None, top: Sequence[int] = (1, 5), **options):
        self.class_names, self.top = class_names, tuple(top)
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-k, mean per-class and per-class accuracy.",
            citation="",
            inputs_description="predictions: scores (n, C); references: labels (n,), integers from 0.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, Any]:
        return accuracy_metrics(np.asarray(predictions), np.asarray(references), self.class_names, self.top)
