"""Export to timm: a state dict with its names, and the `create_model` line that loads it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BaseImageProcessor, PreTrainedConfig

from ..model.configuration_mocov3_vit import to_pair
from ..model.modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model
from ..processing import pixel_format_of
from ..storage import write_json
from .checkpoints import backbone_of, revert_state_dict
from .export_native import require_backbone
from .layouts import ConversionError


VITS = {  # width, depth and heads of timm's models; other arguments are passed where they differ
    "vit_small_patch16_224": (384, 12, 6),
    "vit_base_patch16_224": (768, 12, 12),
    "vit_large_patch16_224": (1024, 24, 16),
}
RESNETS = {
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
}
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


def vit_arguments(config: PreTrainedConfig) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of a ViT: `num_heads=12` for MoCo v3's ViT-S, where timm has 6."""
    shape = (config.hidden_size, config.num_hidden_layers)
    name = next((name for name, values in VITS.items() if values[:2] == shape), "vit_base_patch16_224")
    width, depth, heads = VITS[name]
    arguments = {
        "embed_dim": (config.hidden_size, width),
        "depth": (config.num_hidden_layers, depth),
        "num_heads": (config.num_attention_heads, heads),
        "mlp_ratio": (config.intermediate_size / config.hidden_size, 4.0),
        "img_size": (config.image_size, 224),
        "patch_size": (config.patch_size, 16),
        "in_chans": (config.num_channels, 3),
        "qkv_bias": (config.qkv_bias, True),
    }
    return name, {key: value for key, (value, default) in arguments.items() if value != default}


def resnet_arguments(config: PreTrainedConfig) -> tuple[str, dict[str, Any]]:
    """
    timm's name and arguments of a ResNet.

    Raises:
        ConversionError: Widths or strides that timm's ResNets do not have.
    """
    expansion = 4 if config.layer_type == "bottleneck" else 1
    widths = [64 * 2**stage * expansion for stage in range(4)]
    if config.hidden_sizes != widths or config.embedding_size != 64 or config.downsample_in_bottleneck:
        raise ConversionError(
            f"timm has no ResNet with hidden_sizes {config.hidden_sizes} and embedding_size {config.embedding_size},"
            f" expected {widths} and 64: pass --format onnx or --format torch_export"
        )
    name = RESNETS.get((config.layer_type, tuple(config.depths)))
    arguments = {} if name else {"layers": list(config.depths)}
    if config.num_channels != 3:
        arguments["in_chans"] = config.num_channels
    return name or ("resnet50" if config.layer_type == "bottleneck" else "resnet18"), arguments


def write_timm(
    model: MoCoV3Model | MoCoV3ForImageClassification, processor: BaseImageProcessor, folder: Path
) -> tuple:
    """`model.safetensors` and `config.json`, which `timm.create_model("local-dir:...")` and timm's Hub loader load."""
    import timm

    is_vit = backbone_of(model.config) == "vit"
    require_backbone(model.config, "vit" if is_vit else "resnet", "timm")
    backbone = model.config.backbone_config
    name, arguments = vit_arguments(backbone) if is_vit else resnet_arguments(backbone)
    classes = model.config.num_labels if isinstance(model, MoCoV3ForImageClassification) else 0
    state_dict = revert_state_dict(model.state_dict(), model.config, layout="timm")
    save_file({key: value.contiguous() for key, value in state_dict.items()}, folder / "model.safetensors")

    crop, short = processor.crop_size["height"], processor.size["shortest_edge"]
    feature_width = backbone.hidden_size if is_vit else backbone.hidden_sizes[-1]
    config = {
        "architecture": name,
        "num_classes": classes,
        "num_features": feature_width,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [backbone.num_channels, *to_pair(getattr(backbone, "image_size", crop))],
            "interpolation": INTERPOLATIONS.get(int(processor.resample), "bilinear"),
            "crop_pct": crop / short,
            "crop_mode": "center",
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "num_classes": classes,
            "fixed_input_size": is_vit,
            "first_conv": "patch_embed.proj" if is_vit else "conv1",
            "classifier": "head" if is_vit else "fc",
        },
    }
    if classes:
        config["label_names"] = [model.config.id2label[index] for index in range(classes)]
    write_json(folder / "config.json", config)
    if not pixel_format_of(processor).is_rgb8:
        processor.save_pretrained(folder)  # timm has no settings for the range and the gaps of such images

    path = folder / "model.safetensors"
    loaded = timm.create_model(name, num_classes=classes, checkpoint_path=str(path), **arguments).eval()
    listed = "".join(f", {key}={value!r}" for key, value in arguments.items())
    usage = f"timm.create_model({name!r}, num_classes={classes}{listed}, checkpoint_path={str(path)!r})"

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        return loaded(pixel_values)

    return run, usage
