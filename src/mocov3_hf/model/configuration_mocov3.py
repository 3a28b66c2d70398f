# Copyright 2026 The mocov3_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configurations of MoCo v3: its own ViT, and the composition of any vision backbone with the heads."""

import difflib
from collections.abc import Iterable
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import auto_docstring, logging


logger = logging.get_logger(__name__)

STEMS = ("patch", "conv")
POSITION_EMBEDDINGS = ("sincos2d", "learned")
CONV_STEM_STRIDE = 16  # four convolutions of stride 2


def to_pair(value: int | Iterable[int]) -> tuple[int, int]:
    """`(height, width)` of a size given as one number or as two."""
    return tuple(value) if isinstance(value, Iterable) else (value, value)


def check_unknown_keys(config: PreTrainedConfig, names: Iterable[str]) -> None:
    """
    Refuse a misspelled key, which `PreTrainedConfig` would keep as one more attribute that nothing reads.

    Raises:
        ValueError: a key that the configuration does not have and that resembles one that it has.
    """
    known = [field.name for field in fields(config) if not field.name.startswith("_")]
    for name in names:
        # `num_labels` and the like are legitimate: properties and arguments that `PreTrainedConfig` itself takes up.
        if name.startswith("_") or name in known or hasattr(type(config), name):
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.9):
            raise ValueError(f"{type(config).__name__} has no key {name!r}. Did you mean {close[0]!r}?")


@auto_docstring
@strict
class MoCoV3ViTConfig(PreTrainedConfig):
    r"""
    stem (`str`, *optional*, defaults to `"patch"`):
        How an image becomes patches: `"patch"` for one strided convolution, `"conv"` for the stack of four strided
        3x3 convolutions with batch normalisation (always a stride of 16; the paper pairs it with one block fewer).
    freeze_patch_projection (`bool`, *optional*, defaults to `True`):
        Whether the patch projection keeps its random initial weights: the paper's remedy against instability (§4.2).
        It has no effect on the convolutional stem.
    drop_path_rate (`float`, *optional*, defaults to 0.0):
        Stochastic depth rate of the last block; the rate rises linearly from 0 at the first.
    position_embedding (`str`, *optional*, defaults to `"sincos2d"`):
        `"sincos2d"` for the fixed two-dimensional sine-cosine table, `"learned"` for a trained table. Both have the
        same key, so that a fixed table loads as the start of a learned one.

    Example:

    ```python
    >>> from mocov3_hf import MoCoV3ViTConfig, MoCoV3ViTModel

    >>> # ViT-Small as MoCo v3 defines it: 12 heads, not the 6 of DeiT
    >>> configuration = MoCoV3ViTConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    >>> model = MoCoV3ViTModel(configuration)
    ```"""

    model_type = "mocov3_vit"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    stem: str = "patch"
    freeze_patch_projection: bool = True
    drop_path_rate: float | int = 0.0
    position_embedding: str = "sincos2d"

    def __post_init__(self, **kwargs):
        check_unknown_keys(self, kwargs)
        if self.stem not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, got {self.stem!r}")
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise ValueError(
                f"position_embedding must be one of {POSITION_EMBEDDINGS}, got {self.position_embedding!r}"
            )
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and"
                f" {self.num_attention_heads}"
            )
        if self.position_embedding == "sincos2d" and self.hidden_size % 4 != 0:
            raise ValueError(
                f"the sincos2d position embedding needs a hidden_size that is a multiple of 4, got {self.hidden_size}"
            )
        if self.stem == "conv" and self.hidden_size % 8 != 0:
            raise ValueError(f"the conv stem needs a hidden_size that is a multiple of 8, got {self.hidden_size}")
        if self.stem == "conv" and to_pair(self.patch_size) != (CONV_STEM_STRIDE, CONV_STEM_STRIDE):
            raise ValueError(f"the conv stem has a fixed stride: patch_size must be 16, got {self.patch_size}")
        for image, patch in zip(to_pair(self.image_size), to_pair(self.patch_size), strict=True):
            if image % patch != 0:
                raise ValueError(
                    f"image_size must be divisible by patch_size, got {self.image_size} and {self.patch_size}: take"
                    f" image_size {max(1, round(image / patch)) * patch} or another patch_size"
                )
        super().__post_init__(**kwargs)


@auto_docstring
@strict
class MoCoV3Config(BackboneConfigMixin, PreTrainedConfig):
    r"""
    backbone_config (`dict` or `PreTrainedConfig`, *optional*):
        Configuration of the backbone: `"mocov3_vit"` (the default), the library's `"resnet"`, or any other vision
        model that `AutoModel` builds and that gives a pooled vector. A dictionary needs the key `model_type`.
    projection_dim (`int`, *optional*, defaults to 256):
        Width of the vectors that the loss compares.
    head_hidden_size (`int`, *optional*, defaults to 4096):
        Width of the hidden layers of projector and predictor.
    num_projector_layers (`int`, *optional*, defaults to 3):
        Number of linear layers of the projector: 3 for ViT, 2 for ResNet.
    num_predictor_layers (`int`, *optional*, defaults to 2):
        Number of linear layers of the predictor.
    predictor_final_norm (`bool`, *optional*, defaults to `True`):
        Whether the predictor ends in a batch normalisation without affine parameters: yes for ViT, no for ResNet.
    head_batch_norm (`bool`, *optional*, defaults to `True`):
        Whether projector and predictor have batch normalisation at all; without is an ablation of the paper.
    temperature (`float`, *optional*, defaults to 0.2):
        Temperature of the contrastive loss: 0.2 for ViT, 1.0 for ResNet.
    zero_init_residual (`bool`, *optional*, defaults to `True`):
        Whether the last normalisation of every residual block of a ResNet starts at zero.
    initializer_range (`float`, *optional*, defaults to 0.01):
        Standard deviation of the initial weights of the classification head.

    Example:

    ```python
    >>> from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining

    >>> # MoCo v3 on a ResNet-50
    >>> configuration = MoCoV3Config(
    ...     backbone_config={"model_type": "resnet"},
    ...     num_projector_layers=2,
    ...     predictor_final_norm=False,
    ...     temperature=1.0,
    ... )
    >>> model = MoCoV3ForPreTraining(configuration)
    ```"""

    model_type = "mocov3"

    backbone_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    head_hidden_size: int = 4096
    num_projector_layers: int = 3
    num_predictor_layers: int = 2
    predictor_final_norm: bool = True
    head_batch_norm: bool = True
    temperature: float | int = 0.2
    zero_init_residual: bool = True
    initializer_range: float | int = 0.01
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012

    def __post_init__(self, **kwargs):
        # Built before `super()` and here rather than by the base class, which finds sub-configurations through an Auto
        # class: that one does not know `mocov3_vit` where this file travels as remote code.
        self.backbone_config = build_backbone_config(self.backbone_config)
        out_indices, out_features = kwargs.pop("out_indices", None), kwargs.pop("out_features", None)
        check_unknown_keys(self, kwargs)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        for name in ("projection_dim", "head_hidden_size", "num_projector_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_predictor_layers < 0:
            raise ValueError(f"num_predictor_layers must be at least 0, got {self.num_predictor_layers}")
        self.stage_names = stage_names_of(self.backbone_config)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Number of hidden states after the stem's, as tools for backbones ask for it."""
        return len(self.stage_names) - 1


def build_backbone_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """
    The configuration object of a backbone.

    Raises:
        ValueError: a dictionary without `model_type`, or with one that transformers does not know.
    """
    if config is None:
        return MoCoV3ViTConfig()
    if isinstance(config, PreTrainedConfig):
        return config
    values = dict(config)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError("backbone_config needs the key 'model_type', for example 'mocov3_vit' or 'resnet'")
    if model_type == MoCoV3ViTConfig.model_type:
        return MoCoV3ViTConfig(**values)
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, [MoCoV3ViTConfig.model_type, *CONFIG_MAPPING.keys()], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"transformers knows no model type {model_type!r} for backbone_config.{hint}")
    return CONFIG_MAPPING[model_type](**values)


def stage_names_of(backbone_config: PreTrainedConfig) -> list[str]:
    """Names of the hidden states of a backbone, the stem's first, as the library's backbones name them."""
    if getattr(backbone_config, "stage_names", None):
        return list(backbone_config.stage_names)
    depths = getattr(backbone_config, "depths", None)
    num_stages = len(depths) if depths is not None else getattr(backbone_config, "num_hidden_layers", 0)
    return ["stem", *(f"stage{index}" for index in range(1, num_stages + 1))]


__all__ = ["MoCoV3Config", "MoCoV3ViTConfig"]
