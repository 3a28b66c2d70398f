"""Random numbers of a training step as a function of the step, so that a run can resume at any."""

SEED_STRIDE = 0x9E3779B97F4A7C15  # odd and larger than any place: seeds of two runs do not meet


def step_seed(seed: int, place: int) -> int:
    """
    Seed for `torch.manual_seed` of what a forward pass draws, such as dropout and stochastic depth.

    Args:
        seed: Of the run.
        place: Number of the forward pass in the run: made from step, process and whatever else has draws of its own.
    """
    return (seed * SEED_STRIDE + place) % (1 << 63)
