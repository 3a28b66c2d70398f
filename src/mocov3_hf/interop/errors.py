"""The one error of this room: a file or state dict that cannot be converted, with the reason in one line."""


class CheckpointError(ValueError):
    """A checkpoint that is refused: what was expected, what was found, and the repair."""
