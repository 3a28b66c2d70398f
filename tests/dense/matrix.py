"""
The decoders of transformers, tiny, on every kind of backbone: what works, what is refused, and the table of both in
docs/dense.md, which `python -m tests.dense.matrix` writes.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VitMatteConfig,
    VitMatteForImageMatting,
)

from examples.comparison import table as comparison
from mocov3_hf import MoCoV3Config
from tests.launch import ROOT


SIZE, WIDTH, NUM_LABELS = 64, 32, 3
VIT = {
    "model_type": "mocov3_vit",
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 16,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "bottleneck",
}
# By the heading of their column: the encoder, and the options that make it this kind.
BACKBONES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ViT": (VIT, {}),
    "ViT, `add_fpn=True`": (VIT, {"add_fpn": True}),
    "ViT, conv stem": (VIT | {"stem": "conv"}, {}),
    "ResNet": (RESNET, {}),
}
ALL_MAPS = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
LAST_MAPS = {"out_features": ["stage2", "stage3", "stage4"]}


def semantic(height: int, width: int) -> dict[str, Any]:
    return {"labels": torch.arange(2 * height * width).reshape(2, height, width) % NUM_LABELS}


def boxes(height: int, width: int) -> dict[str, Any]:
    one = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.25, 0.5]])}
    return {"labels": [one, one]}


def instances(height: int, width: int) -> dict[str, Any]:
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : height // 2, width // 4 :] = 1
    return {"mask_labels": [mask, mask], "class_labels": [torch.tensor([1]), torch.tensor([2])]}


def nothing(height: int, width: int) -> dict[str, Any]:
    """Depth and matting models of transformers compute no loss."""
    return {}


@dataclass
class Decoder:
    """
    A model of transformers.

    Attributes:
        takes: What it reads of the backbone.
        model_class: The model.
        config: Its configuration on a backbone, from the channels of the maps.
        options: Of `dense.backbone_config`, for all backbones.
        targets: What the loss takes, from height and width.
        output: Name of the output to compare.
        sizes: Other image sizes, height and width.
        options_of: More options, by backbone.
        refused: Part of the message, by backbone that cannot work.
        num_channels: Of the images.
    """

    takes: str
    model_class: type[PreTrainedModel]
    config: Callable[[MoCoV3Config, list[int]], PreTrainedConfig]
    options: dict[str, Any]
    targets: Callable[[int, int], dict[str, Any]]
    output: str = "logits"
    sizes: tuple[tuple[int, int], ...] = ((96, 64), (75, 90))
    options_of: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    num_channels: int = 3


ENCODER_DECODER = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 4,
}


def upernet(backbone, channels):
    return UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_channels=8,
        num_labels=NUM_LABELS,
    )


def detr(backbone, channels):
    return DetrConfig(backbone_config=backbone, d_model=32, num_labels=NUM_LABELS, **ENCODER_DECODER)


def deformable_detr(backbone, channels):
    return DeformableDetrConfig(
        backbone_config=backbone,
        d_model=32,
        num_feature_levels=len(channels),
        num_labels=NUM_LABELS,
        **{**ENCODER_DECODER, "decoder_layers": 2},  # one has no weights to tie, an error in transformers
    )


def rt_detr(backbone, channels):
    return RTDetrConfig(
        backbone_config=backbone,
        d_model=16,
        encoder_hidden_dim=16,
        encoder_in_channels=channels,
        decoder_in_channels=[16, 16, 16],
        decoder_n_points=1,
        num_denoising=2,
        num_labels=NUM_LABELS,
        **ENCODER_DECODER,
    )


def mask_former(backbone, channels):
    decoder = DetrConfig(d_model=32, backbone_config=backbone, **ENCODER_DECODER)
    return MaskFormerConfig(
        backbone_config=backbone,
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=16,
        num_labels=NUM_LABELS,
    )


def mask2_former(backbone, channels):
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=16,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=4,
        train_num_points=32,
        num_labels=NUM_LABELS,
    )


def dpt(backbone, channels):
    return DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, add_projection=False
    )


def depth_anything(backbone, channels):
    return DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=backbone.patch_size or 16,
        reassemble_hidden_size=WIDTH,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )


def vitmatte(backbone, channels):
    return VitMatteConfig(
        backbone_config=backbone,
        hidden_size=channels[-1],
        convstream_hidden_sizes=[8, 8, 8],
        fusion_hidden_sizes=[16, 8, 8, 8],
    )


NEEDS_TOKENS = {"ViT, `add_fpn=True`": "takes the tokens of a ViT", "ResNet": "which a resnet backbone does not have"}
NEEDS_A_PYRAMID = dict.fromkeys(("ViT", "ViT, conv stem"), "all blocks of a ViT have one stride")
TOKENS = {**ALL_MAPS, "reshape_hidden_states": False}
MAPS = {"ViT, `add_fpn=True`": ALL_MAPS, "ResNet": ALL_MAPS}
DECODERS = {
    "UperNet": Decoder("4 maps", UperNetForSemanticSegmentation, upernet, ALL_MAPS, semantic),
    "DETR": Decoder("1 map", DetrForObjectDetection, detr, {"out_features": ["stage4"]}, boxes),
    "Deformable DETR": Decoder("1 map or more", DeformableDetrForObjectDetection, deformable_detr, LAST_MAPS, boxes),
    "RT-DETR": Decoder(
        "3 maps of the strides 8, 16, 32",
        RTDetrForObjectDetection,
        rt_detr,
        LAST_MAPS,
        boxes,
        sizes=((96, 64),),
        refused=NEEDS_A_PYRAMID,
    ),
    "MaskFormer": Decoder(
        "2 maps or more", MaskFormerForInstanceSegmentation, mask_former, ALL_MAPS, instances, "masks_queries_logits"
    ),
    "Mask2Former": Decoder(
        "4 maps", Mask2FormerForUniversalSegmentation, mask2_former, ALL_MAPS, instances, "masks_queries_logits"
    ),
    "DPT": Decoder(
        "tokens of 4 blocks",
        DPTForDepthEstimation,
        dpt,
        TOKENS,
        nothing,
        "predicted_depth",
        ((96, 64),),
        MAPS,
        NEEDS_TOKENS,
    ),
    "Depth Anything": Decoder(
        "tokens of 4 blocks",
        DepthAnythingForDepthEstimation,
        depth_anything,
        TOKENS,
        nothing,
        "predicted_depth",
        ((96, 64),),
        MAPS,
        NEEDS_TOKENS,
    ),
    "ViTMatte": Decoder(
        "1 map of stride 16",
        VitMatteForImageMatting,
        vitmatte,
        {"out_features": ["stage4"]},
        nothing,
        "alphas",
        ((96, 64),),
        {"ViT, `add_fpn=True`": {"out_features": ["stage3"]}, "ResNet": {"out_features": ["stage3"]}},
        num_channels=4,
    ),
}
CASES = [(decoder, backbone) for decoder in DECODERS for backbone in BACKBONES]
PAGE = ROOT / "docs" / "dense.md"
RESULTS = ROOT / "benchmarks" / "results"


def table() -> str:
    """The matrix in Markdown."""
    lines = [f"| decoder | takes | {' | '.join(BACKBONES)} |", "|---" * (2 + len(BACKBONES)) + "|"]
    for name, decoder in DECODERS.items():
        cells = ["refused" if backbone in decoder.refused else "works" for backbone in BACKBONES]
        lines.append(f"| {name} | {decoder.takes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured() -> str:
    """The tables of the two examples, from the `comparison.json` of each."""
    parts = []
    for name, decoder in (("segmentation", "UperNet"), ("detection", "RT-DETR")):
        found = json.loads((RESULTS / f"dense_{name}_cpu.json").read_text(encoding="utf-8"))
        results = found["results"]
        steps, seconds = results["random"]["steps"], sum(each["seconds"] for each in results.values())
        images = f"{found['train_images']} images to train on, {found['test_images']} to test on"
        parts.append(
            f"{decoder}, {images}, {steps} steps, {seconds:.0f} seconds for both"
            f" ([all numbers](../benchmarks/results/dense_{name}_cpu.json)):\n\n{comparison(results)}"
        )
    return "\n\n".join(parts)


def with_tables(text: str) -> str:
    """The text of the page with the tables of today."""
    for name, content in (("what works", table()), ("measured", measured())):
        pattern = re.compile(rf"(<!-- {name}[^\n]*-->\n).*(<!-- end of {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
