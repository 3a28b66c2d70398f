"""Conversion of checkpoints of other codebases, and export to other libraries."""

from .checkpoints import Converted, convert_state_dict, revert_state_dict
from .convert import convert_checkpoint
from .layouts import LAYOUTS, ConversionError


__all__ = ["LAYOUTS", "ConversionError", "Converted", "convert_checkpoint", "convert_state_dict", "revert_state_dict"]
