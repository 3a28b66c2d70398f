"""Checkpoints of the world in, models for the world out."""

from .checkpoints import Converted, convert_state_dict, revert_state_dict
from .convert import convert_checkpoint
from .errors import CheckpointError
from .layouts import LAYOUTS


__all__ = ["LAYOUTS", "CheckpointError", "Converted", "convert_checkpoint", "convert_state_dict", "revert_state_dict"]
