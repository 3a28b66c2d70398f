"""Learning rate and EMA decay as functions of the step, so that the step alone is the state of a schedule."""

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """
    Learning rate at `step` (from 0): linear warmup from 0 to `peak` over `warmup_steps`, then cosine decay to 0.

    Evaluated at every step, as in the official code. It is 0 from `total_steps` on.

    Raises:
        ValueError: `step` is negative, or the warmup is longer than the run.
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


def cosine_ema_decay(step: int, total_steps: int, base: float) -> float:
    """
    EMA decay of the momentum encoder at `step`: `1 - (1 - base) · ½ (1 + cos(π · step / total_steps))`.

    Increases from `base` to 1 (official `--moco-m-cos`).
    """
    progress = min(step / total_steps, 1.0)
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * progress))
