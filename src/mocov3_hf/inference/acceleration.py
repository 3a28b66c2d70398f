"""What makes a forward pass fast: chosen for device and architecture, the results being those of the plain model."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import PreTrainedModel

from ..model.configuration_mocov3 import MoCoV3ViTConfig
from .packed_vit import can_pack, pack


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# On a CPU, larger batches leave its caches (measured with ViT-S and ResNet-50: docs/inference.md).
BATCH_SIZES = {"cpu": 8}
OTHER_BATCH_SIZE = 128
PACKED = "packed weights"


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """
    The precision to compute in.

    Args:
        name: one of `DTYPES`, a torch dtype, or "auto": bfloat16 where the device multiplies it faster than float32.
        device: where the model runs.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if name in DTYPES.values():
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device has instructions of its own for bfloat16; a CPU without imitates them, slowly."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def accelerate(model: PreTrainedModel, dtype: torch.dtype, device: torch.device, batch_size: int) -> list[str]:
    """
    Set up a float32 model in eval mode for inference only, in place; its weights are no longer those of its file.

    Returns:
        What was done, in words.
    """
    done = []
    folded = fold_batch_norms(model)
    if folded:
        done.append(f"{folded} batch normalisations folded")
    model.to(device=device, dtype=dtype)
    if sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) > 1:  # one alone is the projection of patches
        model.to(memory_format=torch.channels_last)
        done.append("channels_last")
    for layer in model.modules():
        if isinstance(layer, nn.ReLU) and is_resnet(model):
            layer.inplace = True
    if is_own_vit(model):
        if device.type == "cpu" and dtype == torch.bfloat16 and can_pack():
            pack(model, batch_size)
            done.append(PACKED)
        else:
            model.set_attn_implementation("sdpa")
            done.append("sdpa attention")
        for module in model.modules():
            if hasattr(module, "pooled_query_only"):
                module.pooled_query_only = True
        done.append("last block for the pooled token")
    return done


def body_type(model: PreTrainedModel) -> str:
    """`model_type` of the backbone, or of the model itself."""
    config = model.config
    return getattr(getattr(config, "backbone_config", None) or config, "model_type", "")


def is_own_vit(model: PreTrainedModel) -> bool:
    """Whether the backbone is MoCo v3's own ViT."""
    return body_type(model) == MoCoV3ViTConfig.model_type


def is_resnet(model: PreTrainedModel) -> bool:
    """Whether it is transformers' ResNet, whose ReLUs follow normalisations and sums that nobody else reads."""
    return body_type(model) == "resnet"


def fold_batch_norms(model: PreTrainedModel) -> int:
    """
    Take the batch normalisations of a ResNet of transformers into the convolutions before them.

    Args:
        model: in eval mode, in the precision of its file: folded in bfloat16, the weights would be rounded twice.

    Returns:
        How many.
    """
    # Only there are the two known to follow each other.
    pairs = [layer for layer in model.modules() if is_convolution_and_norm(layer)] if is_resnet(model) else []
    for layer in pairs:
        layer.convolution = fuse_conv_bn_eval(layer.convolution, layer.normalization)
        layer.normalization = nn.Identity()
    return len(pairs)


def is_convolution_and_norm(layer: nn.Module) -> bool:
    """A layer of transformers' ResNet whose forward pass is its convolution and then its normalisation."""
    return isinstance(getattr(layer, "convolution", None), nn.Conv2d) and isinstance(
        getattr(layer, "normalization", None), nn.BatchNorm2d
    )
