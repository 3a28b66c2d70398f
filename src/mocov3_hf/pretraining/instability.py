"""Alarms for what the paper is about (§4): training that goes wrong without a sound.

Dips in accuracy are preceded by a spike of the gradient, in the first layer first and some tens of iterations later in
the last. The detector judges every step by the steps before it, so that it needs no threshold for each model.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable

from torch import nn


# How many robust standard deviations of its logarithm a gradient norm may lie above the median of those before.
SPIKE_DEVIATIONS = 8.0
# A smooth run has almost no spread: at least this factor above the median is needed to call it a spike.
SMALLEST_SPIKE = 2.0


class SpikeDetector:
    """
    Finds values far above those before them: by median and median absolute deviation of their logarithms, which a few
    spikes do not move.

    Args:
        window: Values that are looked back at.
        minimum: Values that must have been seen before anything is called a spike.
        history: Values of before, for a run that continues.
    """

    def __init__(self, window: int = 200, minimum: int = 20, history: Iterable[float] = ()):
        self.minimum = minimum
        self.history = deque(history, maxlen=window)

    def add(self, value: float) -> float | None:
        """Take in a value; for a spike, how many times the usual one it is. Only positive numbers count."""
        if not (math.isfinite(value) and value > 0):
            return None
        before = [math.log(seen) for seen in self.history]
        self.history.append(value)
        if len(before) < self.minimum:
            return None
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(seen - median) for seen in before)
        limit = median + max(SPIKE_DEVIATIONS * deviation, math.log(SMALLEST_SPIKE))
        return math.exp(math.log(value) - median) if math.log(value) > limit else None


def first_and_last_weight(backbone: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """
    The weights with a gradient nearest to the image and farthest from it; tokens and position tables are no layers.

    Raises:
        ValueError: no weight of the backbone has a gradient.
    """
    weights = [
        parameter
        for name, parameter in backbone.named_parameters()
        if parameter.grad is not None and parameter.ndim > 1 and not name.endswith(("token", "embeddings"))
    ]
    if not weights:
        raise ValueError(f"no weight of {type(backbone).__name__} has a gradient: the whole backbone is frozen")
    return weights[0], weights[-1]
