"""Optimizers, schedules and parameter groups of MoCo v3."""

from ..model.modeling_mocov3_pretraining import ema_update_
from .lars import LARS
from .param_groups import parameter_groups
from .schedules import cosine_ema_decay, warmup_cosine


__all__ = ["LARS", "cosine_ema_decay", "ema_update_", "parameter_groups", "warmup_cosine"]
