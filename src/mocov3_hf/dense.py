"""
Pre-trained weights in models for dense prediction: the decoders of transformers that take a backbone.

Two calls: `backbone_config` for the configuration of the decoder, `load_backbone` for the weights.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .loading import load_config, load_encoder
from .model import MoCoV3Backbone, MoCoV3Config, MoCoV3Model
from .model.configuration_mocov3 import MAP_OPTIONS
from .reporting import UsageError, is_first_process
from .run_folder import read_run_folder
from .weights import NAMES_AND_DATES


# What decoders of transformers take, by their `model_type`. All others take maps of any strides.
TAKE_TOKENS = ("depth_anything", "dpt", "prompt_depth_anything", "zoedepth")
TAKE_PYRAMIDS = ("d_fine", "rt_detr", "rt_detr_v2")  # every map has twice the stride of the one before

# Differences between two backbones that share all weights.
MAY_DIFFER = (
    *NAMES_AND_DATES,
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "freeze_patch_projection",
    "hidden_dropout_prob",
    "initializer_range",
    "num_channels",  # checked with the weights
    "output_attentions",
    "output_hidden_states",
    "position_embedding",  # a fixed table initializes a learned one
    "problem_type",
)


def backbone_config(model: str | os.PathLike, **options: Any) -> MoCoV3Config:
    """
    The configuration of a pre-trained encoder as `backbone_config` of a decoder's configuration.

    Args:
        model: A folder of `mocov3 pretrain` or of `save_pretrained`, a Hub id, or a published name. An encoder of
            transformers that is not a MoCo v3 model is wrapped in a `MoCoV3Config`.
        options: `out_features` or `out_indices`, `add_fpn`, `apply_layernorm`, `reshape_hidden_states`, see
            `MoCoV3Config`.

    Returns:
        The configuration. Its `backbone_config` can be changed where the weights stay the same: dropout,
        `freeze_patch_projection`, `position_embedding`, and more `num_channels`.

    Raises:
        ValueError: No such model, or options that its backbone cannot have.

    Example:

    ```python
    >>> from transformers import UperNetConfig, UperNetForSemanticSegmentation
    >>> from mocov3_hf import dense

    >>> backbone = dense.backbone_config("runs/first", out_indices=[3, 6, 9, 12])
    >>> model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=37))
    >>> dense.load_backbone(model, "runs/first")
    ```
    """
    unknown = sorted(options.keys() - set(MAP_OPTIONS))
    if unknown:
        raise UsageError(f"backbone_config has no option {unknown[0]!r}: use {', '.join(MAP_OPTIONS)}")
    config = load_config(model)
    if not isinstance(config, MoCoV3Config):
        return MoCoV3Config(backbone_config=config, **options)
    return MoCoV3Config.from_dict(config.to_dict(), **options)


def load_backbone(model: nn.Module, pretrained: str | os.PathLike, **options: Any) -> MoCoV3Backbone:
    """
    Load pre-trained weights into the backbone of a model for detection, segmentation, depth or matting, in place, and
    print what was found.

    All weights of the encoder are loaded; decoder and feature pyramid keep theirs. If the model takes more channels
    than the encoder, as ViTMatte does (an image and a trimap), the weights of the added ones start at zero.

    Args:
        model: A model whose `backbone_config` is a `MoCoV3Config`, or a `MoCoV3Backbone` itself.
        pretrained: A folder of `mocov3 pretrain` or of `save_pretrained`, a Hub id, or a published name.
        options: Of `from_pretrained`, such as `revision`.

    Returns:
        The backbone inside `model`, to freeze it or to give its parameters another learning rate.

    Raises:
        ValueError: A model without such a backbone, or with one that its decoder cannot take; a backbone of another
            architecture than the encoder; no such encoder, or weights that are damaged or missing.
    """
    backbone = find_backbone(model)
    check_decoder(getattr(model, "config", None), backbone)
    encoder = load_encoder(pretrained, **options)
    source = encoder.backbone if isinstance(encoder, MoCoV3Model) else encoder
    target = backbone.mocov3.backbone
    check_same_architecture(source.config, target.config, os.fspath(pretrained))
    state, added = dict(source.state_dict()), ""
    for name, expected in target.state_dict().items():
        if name in state and state[name].shape != expected.shape:
            state[name] = with_more_channels(name, state[name], expected, target)
            added = f"; zeros for the channels after the first {source.config.num_channels}"
    # Decoders replace batch norms by frozen ones, which count no batches.
    names = sorted(state.keys() ^ target.state_dict().keys())
    different = [name for name in names if not name.endswith("num_batches_tracked")]
    if different:
        raise ValueError(
            f"{os.fspath(pretrained)!r} holds another architecture than the backbone of {type(model).__name__}:"
            f" {different[0]} is in one of them only"
        )
    target.load_state_dict(state, strict=False)
    if is_first_process():
        print(f"{type(model).__name__}: {len(state)} weights of {describe(encoder, pretrained)}{added}")
    return backbone


def find_backbone(model: nn.Module) -> MoCoV3Backbone:
    """The one `MoCoV3Backbone` inside a model; ValueError if there is none."""
    found = [module for module in model.modules() if isinstance(module, MoCoV3Backbone)]
    if len(found) != 1:
        raise UsageError(
            f"{type(model).__name__} has {len(found) or 'no'} MoCoV3Backbone, expected one: build it with"
            " backbone_config=mocov3_hf.dense.backbone_config(...)"
        )
    return found[0]


def check_decoder(config: PreTrainedConfig | None, backbone: MoCoV3Backbone) -> None:
    """
    Raises:
        ValueError: a decoder of transformers that cannot take the output of the backbone.
    """
    decoder, kind = getattr(config, "model_type", None), backbone.mocov3.backbone.config.model_type
    returns_tokens = not backbone.config.reshape_hidden_states
    if decoder in TAKE_TOKENS and not returns_tokens:
        if not backbone.is_plain_vit:
            raise UsageError(f"{decoder} takes the tokens of a ViT, which a {kind} backbone does not have: use a ViT")
        raise UsageError(
            f"{decoder} takes the tokens of a ViT: build it with reshape_hidden_states=False and without add_fpn"
        )
    if returns_tokens and decoder != backbone.config.model_type and decoder not in TAKE_TOKENS:
        raise UsageError(f"{decoder} takes maps, not tokens: build it without reshape_hidden_states=False")
    if decoder in TAKE_PYRAMIDS and backbone.is_plain_vit and not backbone.config.add_fpn:
        raise UsageError(
            f"{decoder} takes maps of the strides 8, 16 and 32, and all blocks of a ViT have one stride: build it with"
            ' add_fpn=True and out_features=["stage2", "stage3", "stage4"]'
        )


def check_same_architecture(source: PreTrainedConfig, target: PreTrainedConfig, name: str) -> None:
    """
    Raises:
        ValueError: two configurations of backbones whose weights or outputs differ.
    """
    found, expected = source.to_dict(), target.to_dict()
    for key in ("model_type", *sorted(found.keys() | expected.keys())):
        if key not in MAY_DIFFER and found.get(key) != expected.get(key):
            raise ValueError(
                f"{name!r} holds another architecture than the backbone of the model: {key} is {found.get(key)!r}"
                f" there and {expected.get(key)!r} here; build the model with"
                f" mocov3_hf.dense.backbone_config({name!r})"
            )


def with_more_channels(
    name: str, weight: torch.Tensor, expected: torch.Tensor, target: PreTrainedModel
) -> torch.Tensor:
    """
    The weights of the first layer for more channels than they were trained with, zero for those added.

    Raises:
        ValueError: shapes that differ otherwise, or a first layer that is frozen and would never use them.
    """
    found, wanted = weight.shape[1], expected.shape[1]
    if wanted < found or weight.shape[2:] != expected.shape[2:]:
        raise ValueError(f"{name} has the shape {tuple(weight.shape)}, expected {tuple(expected.shape)}")
    if not dict(target.named_parameters())[name].requires_grad:
        raise UsageError(
            f"the model takes {wanted} channels and the encoder {found}; the weights of the added ones start at zero"
            " and are frozen: set backbone_config.backbone_config.freeze_patch_projection = False"
        )
    return torch.cat([weight, weight.new_zeros(expected[:, found:].shape)], dim=1)


def describe(encoder: PreTrainedModel, pretrained: str | os.PathLike) -> str:
    """What a folder holds, such as `'runs/first' (pretraining, mocov3_vit, step 300)`."""
    config = getattr(encoder.config, "backbone_config", encoder.config)
    parts, path = [config.model_type], os.path.expanduser(os.fspath(pretrained))
    if os.path.isdir(path):
        folder = read_run_folder(path)
        parts.insert(0, folder.kind)
        if folder.metrics and "step" in folder.metrics[-1]:
            parts.append(f"step {folder.metrics[-1]['step']}")
    return f"{os.fspath(pretrained)!r} ({', '.join(parts)})"
