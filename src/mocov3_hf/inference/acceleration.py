"""Faster forward passes with the results of the plain model, chosen for device and architecture."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import PreTrainedModel
from transformers.utils import logging

from ..model.configuration_mocov3_vit import MoCoV3ViTConfig
from ..precision import best_precision


logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIXED_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# On a CPU, larger batches do not fit its caches (measured with ViT-S and ResNet-50: docs/inference.md).
BATCH_SIZES = {"cpu": 8}
OTHER_BATCH_SIZE = 128


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """
    The precision to compute in.

    Args:
        name: One of `DTYPES`, a torch dtype, or "auto": the best precision of the device, bfloat16 where it
            has instructions for it, float16 on older GPUs with tensor cores, else float32.
        device: Where the model runs.

    Raises:
        ValueError: An unknown name.
    """
    if name == "auto":
        return MIXED_PRECISIONS[best_precision(device)[0]]
    if name not in DTYPES and name not in DTYPES.values():
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    dtype = DTYPES.get(name, name)
    if dtype not in (torch.float32, MIXED_PRECISIONS[best_precision(device)[0]]) and device.type == "cpu":
        logger.warning(f"this CPU has no instructions for {dtype} and emulates it slowly: float32 is faster")
    return dtype


def prepare_for_inference(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> list[str]:
    """
    Set up a float32 model in evaluation mode for inference only, in place. Its weights no longer equal its file's.

    Returns:
        What was done, one phrase each.
    """
    done = []
    backbone_type = getattr(getattr(model.config, "backbone_config", None) or model.config, "model_type", "")
    if backbone_type == "resnet":
        done.append(f"{fold_batch_norms(model)} batch norms folded")
        for layer in model.modules():
            if isinstance(layer, nn.ReLU):  # nothing else reads the sums and normalizations before it
                layer.inplace = True
    model.to(device=device, dtype=dtype)
    if uses_channels_last(model):
        model.to(memory_format=torch.channels_last)
        done.append("channels_last")
    if backbone_type == MoCoV3ViTConfig.model_type:
        model.set_attn_implementation("sdpa")
        done.append("sdpa attention")
        if getattr(model.config, "pooling", "auto") != "mean":
            for layer in model.modules():
                if hasattr(layer, "pooled_query_only"):
                    layer.pooled_query_only = True
            done.append("last block for the pooled token only")
    return done


def uses_channels_last(model: nn.Module) -> bool:
    """Whether a model is made of convolutions: one alone is the patch projection of a ViT."""
    return sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) > 1


def fold_batch_norms(resnet: PreTrainedModel) -> int:
    """
    Fold the batch norms of transformers' ResNet into the convolutions before them.

    Args:
        resnet: In evaluation mode and in the precision of its file: in bfloat16, weights would be rounded twice.

    Returns:
        The number of batch norms.
    """
    pairs = [
        layer
        for layer in resnet.modules()
        if isinstance(getattr(layer, "convolution", None), nn.Conv2d)
        and isinstance(getattr(layer, "normalization", None), nn.BatchNorm2d)
    ]
    for layer in pairs:
        layer.convolution = fuse_conv_bn_eval(layer.convolution, layer.normalization)
        layer.normalization = nn.Identity()
    return len(pairs)
