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
"""Configuration of the ViT of MoCo v3, and the checks of values that both configurations share."""

import difflib
from collections.abc import Iterable
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import auto_docstring


STEMS = ("patch", "conv")
POSITION_EMBEDDINGS = ("sincos2d", "learned")
MLP_NORMS = ("layer_norm", "batch_norm")
CONV_STEM_STRIDE = 16  # four convolutions of stride 2


def to_pair(value: int | Iterable[int]) -> tuple[int, int]:
    """`(height, width)` of a size given as one integer or as two."""
    return tuple(value) if isinstance(value, Iterable) else (value, value)


def check_unknown_keys(config: PreTrainedConfig, names: Iterable[str]) -> None:
    """
    Reject a misspelled key. `PreTrainedConfig` would store it as an attribute that nothing reads.

    Raises:
        ValueError: the configuration has no such key, but one with a similar name.
    """
    known = [field.name for field in fields(config) if not field.name.startswith("_")]
    for name in names:
        # `num_labels` and others are not fields: `PreTrainedConfig` has properties and arguments for them.
        if name.startswith("_") or name in known or hasattr(type(config), name):
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.9):
            raise ValueError(f"{type(config).__name__} has no key {name!r}. Did you mean {close[0]!r}?")


def check_at_least(config: PreTrainedConfig, minimum: int, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: an integer, or one of a pair of integers, is smaller than `minimum`.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, Iterable) and len(value) != 2:
            raise ValueError(f"{name} must be one integer or a pair (height, width), got {value}")
        if min(to_pair(value)) < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_probabilities(config: PreTrainedConfig, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a rate is not in [0, 1].
    """
    for name in names:
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(config, name)}")


@auto_docstring
@strict
class MoCoV3ViTConfig(PreTrainedConfig):
    r"""
    stem (`str`, *optional*, defaults to `"patch"`):
        Patch embedding: `"patch"` for a single strided convolution, `"conv"` for four strided 3x3 convolutions with
        batch normalization (its stride is always 16; the paper uses it with one transformer block fewer).
    freeze_patch_projection (`bool`, *optional*, defaults to `True`):
        Whether to freeze the randomly initialized patch projection, which stabilizes training (paper §4.2). It has no
        effect on the convolutional stem.
    drop_path_rate (`float`, *optional*, defaults to 0.0):
        Stochastic depth rate of the last block. The rate increases linearly from 0 at the first block.
    position_embedding (`str`, *optional*, defaults to `"sincos2d"`):
        `"sincos2d"` for the fixed two-dimensional sine-cosine table, `"learned"` for a trained table. Both use the
        same key in checkpoints, so a fixed table can initialize a learned one.
    mlp_norm (`str`, *optional*, defaults to `"layer_norm"`):
        Normalization before the MLP of every block: `"layer_norm"`, or `"batch_norm"` over all images, tokens and
        processes, which is the paper's ViT-BN (§6). Attention and output have LayerNorm in both.

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
    mlp_norm: str = "layer_norm"

    def __post_init__(self, **kwargs):
        check_unknown_keys(self, kwargs)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Checks that the values are in range and fit together."""
        check_at_least(self, 0, ["hidden_size", "num_hidden_layers", "intermediate_size"])
        check_at_least(self, 1, ["num_attention_heads", "image_size", "patch_size", "num_channels"])
        check_probabilities(self, ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
        if self.stem not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, got {self.stem!r}")
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise ValueError(
                f"position_embedding must be one of {POSITION_EMBEDDINGS}, got {self.position_embedding!r}"
            )
        if self.mlp_norm not in MLP_NORMS:
            raise ValueError(f"mlp_norm must be one of {MLP_NORMS}, got {self.mlp_norm!r}")
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
                    f"image_size must be divisible by patch_size, got {self.image_size} and {self.patch_size}: use"
                    f" image_size {max(1, round(image / patch)) * patch} or another patch_size"
                )


__all__ = ["MoCoV3ViTConfig"]
