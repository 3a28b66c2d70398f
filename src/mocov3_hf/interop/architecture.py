"""The architecture of a checkpoint, inferred from the names and shapes of its tensors."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedConfig, ResNetConfig

from ..model.configuration_mocov3 import MoCoV3Config
from ..model.configuration_mocov3_vit import MoCoV3ViTConfig
from ..model.modeling_mocov3_vit_embeddings import sincos_position_embedding
from .layouts import DIALECTS, ConversionError, Layout


# Legend of dimensions: D width, L tokens with CLS, P projection.

Shapes = Mapping[str, tuple[int, ...]]

# The number of heads cannot be inferred from shapes. MoCo v3's ViT-S has 12 (paper, table 1); DeiT's and timm's has 6.
HEADS_BY_WIDTH = {384: 12, 768: 12, 1024: 16}
TEMPERATURES = {"vit": 0.2, "resnet": 1.0}  # the official pre-training commands


def shape_of(shapes: Shapes, key: str, dimensions: int) -> tuple[int, ...]:
    """
    Raises:
        ConversionError: No tensor of this name, or one with another number of dimensions.
    """
    if key not in shapes:
        raise ConversionError(f"missing keys: {key}, needed to infer the architecture")
    if len(shapes[key]) != dimensions:
        raise ConversionError(f"misshaped keys: {key} has {list(shapes[key])}, expected {dimensions} dimensions")
    return shapes[key]


def count_indexed(shapes: Shapes, prefix: str) -> int:
    """
    Number of modules `<prefix><number>.`, from the highest number.

    Raises:
        ConversionError: The numbers do not follow each other.
    """
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,9})\.")
    numbers = {int(match.group(1)) for key in shapes if (match := pattern.match(key))}
    count = max(numbers, default=-1) + 1
    if count > len(numbers) + 1:  # the stages of a ResNet begin at 1
        gap = next(number for number in range(1, count) if number not in numbers)
        raise ConversionError(f"missing keys: {prefix}{gap}.*, although the file has {prefix}{count - 1}.*")
    return count


def infer_vit(shapes: Shapes, layout: Layout, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `MoCoV3ViTConfig`, without those in `overrides`."""
    block, _, _, fc1, _, _, patches = DIALECTS[layout.dialect]
    prefix = layout.base
    width = shape_of(shapes, f"{prefix}cls_token", 3)[-1]
    values = {
        "hidden_size": width,
        "num_hidden_layers": count_indexed(shapes, f"{prefix}{block}."),
        "intermediate_size": shape_of(shapes, f"{prefix}{block}.0.{fc1}.weight", 2)[0],
        "qkv_bias": f"{prefix}{block}.0.attn.qkv.bias" in shapes,
    }
    if f"{prefix}{patches}.0.weight" in shapes:
        patch = (16, 16)
        values |= {"stem": "conv", "num_channels": shape_of(shapes, f"{prefix}{patches}.0.weight", 4)[1]}
    else:
        projection = shape_of(shapes, f"{prefix}{patches}.weight", 4)
        patch = tuple(projection[2:])
        values |= {"stem": "patch", "num_channels": projection[1]}
    values["patch_size"] = patch[0] if patch[0] == patch[1] else patch
    if "image_size" not in overrides:
        tokens = shape_of(shapes, f"{prefix}pos_embed", 3)[1] - 1
        side = math.isqrt(tokens)
        if side * side != tokens or patch[0] != patch[1]:
            raise ConversionError(
                f"{prefix}pos_embed has {tokens} patches, which is not a square: pass image_size as (height, width)"
            )
        values["image_size"] = side * patch[0]
    if "num_attention_heads" not in overrides:
        heads = HEADS_BY_WIDTH.get(width, 12)
        if width % heads:
            raise ConversionError(
                f"the number of attention heads cannot be inferred for a width of {width} (known widths:"
                f" {', '.join(map(str, HEADS_BY_WIDTH))}): pass --num_attention_heads"
            )
        values["num_attention_heads"] = heads
    return values


def infer_resnet(shapes: Shapes, layout: Layout) -> dict[str, Any]:
    """Arguments of `ResNetConfig` for torchvision's ResNet v1.5 (stride in the 3x3 convolution)."""
    prefix = layout.base
    bottleneck = f"{prefix}layer1.0.conv3.weight" in shapes
    num_stages = count_indexed(shapes, f"{prefix}layer") - 1
    last = "conv3" if bottleneck else "conv2"
    return {
        "num_channels": shape_of(shapes, f"{prefix}conv1.weight", 4)[1],
        "embedding_size": shape_of(shapes, f"{prefix}conv1.weight", 4)[0],
        "depths": [count_indexed(shapes, f"{prefix}layer{stage}.") for stage in range(1, num_stages + 1)],
        "hidden_sizes": [
            shape_of(shapes, f"{prefix}layer{stage}.0.{last}.weight", 4)[0] for stage in range(1, num_stages + 1)
        ],
        "layer_type": "bottleneck" if bottleneck else "basic",
    }


def infer_heads(shapes: Shapes, layout: Layout, backbone: str) -> dict[str, Any]:
    """Arguments of `MoCoV3Config` that describe projector and predictor."""
    if layout.heads is None:
        return {}
    modules = layout.projectors(backbone)
    projector = linear_widths(shapes, modules["projector"], layout.heads)
    predictor = linear_widths(shapes, modules["predictor"], layout.heads)
    if not projector:
        raise ConversionError(f"missing keys: {modules['projector']}.*, the projector")
    if not predictor:
        raise ConversionError(f"missing keys: {modules['predictor']}.*, the predictor")
    last = len(predictor) - 1
    norm = (
        f"{modules['predictor']}.bn{last}"
        if layout.heads == "mmpretrain"
        else f"{modules['predictor']}.{3 * last + 1}"
    )
    return {
        "num_projector_layers": len(projector),
        "num_predictor_layers": len(predictor),
        "head_hidden_size": projector[0] if len(projector) > 1 else predictor[0],
        "projection_dim": projector[-1],
        "predictor_final_norm": f"{norm}.running_mean" in shapes,
        "temperature": TEMPERATURES[backbone],
    }


def linear_widths(shapes: Shapes, module: str, style: str) -> list[int]:
    """Output widths of the linear layers of a head, in order."""
    names = (f"{module}.fc{i}.weight" if style == "mmpretrain" else f"{module}.{3 * i}.weight" for i in range(100))
    widths = []
    for name in names:
        if len(shapes.get(name, ())) != 2:
            break
        widths.append(shapes[name][0])
    return widths


def is_sincos_table(table: torch.Tensor, grid: tuple[int, int]) -> bool:
    """Whether position embeddings (1, L, D) are the fixed sine-cosine ones, up to rounding to half precision."""
    if table.dim() != 3 or table.shape[2] % 4 or table.shape[1] != 1 + grid[0] * grid[1]:
        return False
    return torch.allclose(table.float(), sincos_position_embedding(table.shape[2], grid), rtol=0, atol=5e-3)


def split_overrides(overrides: Mapping[str, Any], backbone: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    `overrides` for the configuration of the backbone and for `MoCoV3Config`.

    Raises:
        ConversionError: A name that neither has.
    """
    backbone_class = MoCoV3ViTConfig if backbone == "vit" else ResNetConfig
    shared = {field.name for field in fields(PreTrainedConfig)} | {"num_labels"}
    of_backbone = {field.name for field in fields(backbone_class)} - shared
    of_model = {field.name for field in fields(MoCoV3Config)} | {"num_labels", "id2label", "label2id"}
    backbone_values, model_values = {}, {}
    for name, value in overrides.items():
        if name in of_backbone:
            backbone_values[name] = value
        elif name in of_model and name != "backbone_config":
            model_values[name] = value
        else:
            close = difflib.get_close_matches(name, [*of_backbone, *of_model], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConversionError(f"{name!r} is not an option of a model with a {backbone} backbone{hint}")
    return backbone_values, model_values
