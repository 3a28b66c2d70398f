"""
MoCo v3 self-supervised pre-training for the vision backbones of Hugging Face transformers and timm.

Importing the package registers its models and image processor, so that `AutoModel.from_pretrained` and `pipeline` know
them.
"""

import sys

import mocov3_cli


if sys.argv[:1] == ["-m"]:  # `python -m mocov3_hf`, which imports this package before the command
    mocov3_cli.handle_signals("SIGTERM", "SIGINT", "SIGUSR1")
    mocov3_cli.wait_passively()

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from . import report
from ._version import __version__
from .api import Run, evaluate, finetune, knn, linear_probe, neighbors, pretrain
from .model import (
    MoCoV3Backbone,
    MoCoV3Config,
    MoCoV3ForImageClassification,
    MoCoV3ForPreTraining,
    MoCoV3ForPreTrainingOutput,
    MoCoV3ImageProcessor,
    MoCoV3Model,
    MoCoV3PreTrainedModel,
    MoCoV3ViTConfig,
    MoCoV3ViTModel,
    MoCoV3ViTPreTrainedModel,
)


AutoConfig.register(MoCoV3ViTConfig.model_type, MoCoV3ViTConfig, exist_ok=True)
AutoConfig.register(MoCoV3Config.model_type, MoCoV3Config, exist_ok=True)
AutoModel.register(MoCoV3ViTConfig, MoCoV3ViTModel, exist_ok=True)
AutoModel.register(MoCoV3Config, MoCoV3Model, exist_ok=True)
AutoModelForPreTraining.register(MoCoV3Config, MoCoV3ForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(MoCoV3Config, MoCoV3ForImageClassification, exist_ok=True)
AutoBackbone.register(MoCoV3Config, MoCoV3Backbone, exist_ok=True)
AutoImageProcessor.register(MoCoV3Config, fast_image_processor_class=MoCoV3ImageProcessor, exist_ok=True)

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
    "Run",
    "__version__",
    "evaluate",
    "finetune",
    "knn",
    "linear_probe",
    "neighbors",
    "pretrain",
    "report",
]
