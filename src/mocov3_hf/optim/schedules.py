"""Learning rate and momentum as functions of the step, so that the position of a run is one number."""

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """
    Learning rate of update `step` (from 0): linear from 0 to `peak` over `warmup_steps`, then half a cosine to 0.

    Evaluated at every step, as the official code does. Past `total_steps` it is 0.

    Raises:
        ValueError: a negative step, or a warm-up longer than the run.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps must lie between 0 and total_steps={total_steps}, got {warmup_steps}")
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_momentum(step: int, total_steps: int, base: float) -> float:
    """
    Momentum of the moving average at update `step`: `1 - (1 - base) · ½ (1 + cos(π · step / total_steps))`.

    Rises from `base` to 1 (official `--moco-m-cos`).
    """
    progress = min(step / total_steps, 1.0)
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * progress))
