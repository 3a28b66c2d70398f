"""Moving averages of weights, all tensors at once and in place."""

from ..model.modeling_mocov3_pretraining import ema_update_


__all__ = ["ema_update_"]
