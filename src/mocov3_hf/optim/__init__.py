"""Optimizers, schedules and parameter groups of MoCo v3."""

from .ema import ema_update_
from .lars import LARS
from .param_groups import parameter_groups
from .schedules import cosine_momentum, warmup_cosine


__all__ = ["LARS", "cosine_momentum", "ema_update_", "parameter_groups", "warmup_cosine"]
