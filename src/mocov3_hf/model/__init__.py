"""Configurations, models and image processor of MoCo v3: the files that a Hub repository contains as remote code."""

from .configuration_mocov3 import MoCoV3Config
from .configuration_mocov3_vit import MoCoV3ViTConfig
from .image_processing_mocov3 import MoCoV3ImageProcessor
from .modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model, MoCoV3PreTrainedModel
from .modeling_mocov3_backbone import MoCoV3Backbone
from .modeling_mocov3_pretraining import MoCoV3ForPreTraining, MoCoV3ForPreTrainingOutput
from .modeling_mocov3_vit import MoCoV3ViTModel, MoCoV3ViTPreTrainedModel


__all__ = [
    "MoCoV3Backbone",
    "MoCoV3Config",
    "MoCoV3ForImageClassification",
    "MoCoV3ForPreTraining",
    "MoCoV3ForPreTrainingOutput",
    "MoCoV3ImageProcessor",
    "MoCoV3Model",
    "MoCoV3PreTrainedModel",
    "MoCoV3ViTConfig",
    "MoCoV3ViTModel",
    "MoCoV3ViTPreTrainedModel",
]
