"""Whether the probabilities of a classifier are right: expected calibration error and selective accuracy.

Legend: n images.
"""

import numpy as np


NUM_BINS, NUM_POINTS = 15, 50


def reliability(confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS) -> dict[str, list]:
    """
    The bins of a reliability diagram (Guo et al. 2017, arXiv 1706.04599), equally wide between 0 and 1.

    Args:
        confidence: (n,) probabilities of the predicted classes.
        correct: (n,) bool, whether the predictions are right.
        num_bins: Number of bins; a confidence on an edge is in the lower one.

    Returns:
        Of each bin `count`, and `confidence` and `accuracy`, means over its images, None for an empty one.
    """
    bins = np.clip(np.ceil(np.asarray(confidence) * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    means = {
        name: [float(total / count) if count else None for total, count in zip(totals, counts, strict=True)]
        for name, totals in (
            ("confidence", np.bincount(bins, confidence, num_bins)),
            ("accuracy", np.bincount(bins, correct, num_bins)),
        )
    }
    return {"count": counts.tolist(), **means}


def expected_calibration_error(bins: dict[str, list]) -> float:
    """Mean over images of the difference between confidence and accuracy of their bin, between 0 and 1."""
    total = sum(bins["count"])
    rows = zip(bins["count"], bins["confidence"], bins["accuracy"], strict=True)
    return sum(count / total * abs(confidence - accuracy) for count, confidence, accuracy in rows if count)


def selective_accuracy(
    confidence: np.ndarray, correct: np.ndarray, num_points: int = NUM_POINTS
) -> dict[str, list[float]]:
    """
    Accuracy on the most confident part of the images: the risk-coverage curve (Geifman and El-Yaniv 2017).

    Images of equal confidence are accepted together, so that the curve does not depend on their order.

    Args:
        confidence, correct: As `reliability`.
        num_points: Most points of the curve, spread over the coverage.

    Returns:
        `coverage`, ascending to 1, and `accuracy` of the images with the largest confidence.
    """
    confidence = np.asarray(confidence)
    order = np.argsort(-confidence, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True))
    ends = ends[np.unique(np.searchsorted(ends, np.linspace(0, len(order) - 1, num_points)))]
    accuracy = np.cumsum(np.asarray(correct)[order])[ends] / (ends + 1)
    return {"coverage": ((ends + 1) / len(order)).tolist(), "accuracy": accuracy.tolist()}
