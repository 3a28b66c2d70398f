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
"""Configuration of MoCo v3: a vision backbone with the projector and the predictor."""

import copy
import difflib
import math

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import auto_docstring

from .configuration_mocov3_vit import MoCoV3ViTConfig, check_at_least, check_unknown_keys, to_pair


POOLINGS = ("auto", "cls", "mean")
MAX_LAYERS = 10_000
FPN_STRIDES = (4, 8, 16, 32)
# Stages of a pyramid: a map for each of these strides, and one before them.
PYRAMID_NAMES = ("stem", *(f"stage{level}" for level in range(1, len(FPN_STRIDES) + 1)))
# Set together by `MoCoV3Config.from_dict`: which maps `MoCoV3Backbone` returns, and how.
MAP_OPTIONS = ("add_fpn", "apply_layernorm", "reshape_hidden_states", "out_features", "out_indices")
# What `MoCoV3Config` reads from its backbone.
BACKBONE_ATTRIBUTES = ("hidden_size", "image_size", "num_channels", "num_hidden_layers", "patch_size")


@auto_docstring
@strict
class MoCoV3Config(BackboneConfigMixin, PreTrainedConfig):
    r"""
    backbone_config (`dict` or `PreTrainedConfig`, *optional*):
        Configuration of the backbone: `"mocov3_vit"` (the default), `"resnet"`, or another vision model of
        `AutoModel`; `docs/backbones.md` lists those that work. A dictionary must have the key `model_type`.
    projection_dim (`int`, *optional*, defaults to 256):
        Dimension of the embeddings in the contrastive loss.
    head_hidden_size (`int`, *optional*, defaults to 4096):
        Dimension of the hidden layers of the projector and the predictor.
    num_projector_layers (`int`, *optional*, defaults to 3):
        Number of linear layers of the projector: 3 for ViT, 2 for ResNet.
    num_predictor_layers (`int`, *optional*, defaults to 2):
        Number of linear layers of the predictor.
    predictor_final_norm (`bool`, *optional*, defaults to `True`):
        Whether the predictor ends with a batch normalization without affine parameters: yes for ViT, no for ResNet.
    head_batch_norm (`bool`, *optional*, defaults to `True`):
        Whether the projector and the predictor use batch normalization. `False` is an ablation of the paper.
    temperature (`float`, *optional*, defaults to 0.2):
        Temperature of the contrastive loss: 0.2 for ViT, 1.0 for ResNet.
    zero_init_residual (`bool`, *optional*, defaults to `True`):
        Whether to initialize the last normalization of every residual block of a ResNet with zeros.
    initializer_range (`float`, *optional*, defaults to 0.01):
        Standard deviation of the normal distribution that initializes the classification head.
    add_fpn (`bool`, *optional*, defaults to `False`):
        Whether `MoCoV3Backbone` makes a feature pyramid of the last map of a ViT: `"stage1"` to `"stage4"` with the
        strides 4, 8, 16 and 32, as a ResNet has them (the simple pyramid of ViTDet, Li et al. 2022). With a patch
        size that is not a power of two, the strides are multiples of it near these.
    apply_layernorm (`bool`, *optional*, defaults to `True`):
        Whether the feature maps of a ViT pass through its final normalization.
    reshape_hidden_states (`bool`, *optional*, defaults to `True`):
        Whether the feature maps of a ViT have the shape `(B, D, h, w)`. Otherwise they are tokens `(B, L, D)`, with
        the CLS token, as DPT and Depth Anything take them.
    pooling (`str`, *optional*, defaults to `"auto"`):
        How the output of the backbone becomes one vector per image. `"auto"` takes the backbone's own `pooler_output`;
        of a backbone without any, the CLS token after the final normalization, or else the mean. `"cls"` takes the CLS
        token, `"mean"` the mean over the tokens of the patches (without CLS token and registers) or over the feature
        map.

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
    add_fpn: bool = False
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    pooling: str = "auto"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012

    def __post_init__(self, **kwargs):
        # The base class would look up sub-configurations in the Auto classes, which do not know `mocov3_vit` when this
        # file is loaded as remote code.
        self.backbone_config = build_backbone_config(self.backbone_config)
        out_indices, out_features = kwargs.pop("out_indices", None), kwargs.pop("out_features", None)
        check_unknown_keys(self, kwargs)
        for name in BACKBONE_ATTRIBUTES:
            if name in kwargs:
                raise ValueError(
                    f"{name} belongs to the backbone: pass backbone_config={{'model_type': ..., {name!r}: ...}}"
                )
        self.check_feature_maps()
        saved_names = kwargs.pop("stage_names", None)
        self.stage_names = stage_names_of(self.backbone_config)
        if self.add_fpn:
            self.stage_names = list(PYRAMID_NAMES)
            if out_features is None and out_indices is None:
                out_features = self.stage_names[1:]
        elif not declares_stages(self.backbone_config) and saved_names == list(PYRAMID_NAMES):
            self.stage_names = saved_names
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Checks that the values are in range."""
        check_at_least(self, 1, ["projection_dim", "head_hidden_size", "num_projector_layers"])
        check_at_least(self, 0, ["num_predictor_layers"])
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {self.pooling!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"initializer_range must not be negative, got {self.initializer_range}")
        if self.hidden_size is not None and self.hidden_size < 1:
            raise ValueError(f"the backbone must have a hidden_size of at least 1, got {self.hidden_size}")

    def check_feature_maps(self) -> None:
        """
        Raises:
            ValueError: feature maps that the backbone cannot return.
        """
        kind = self.backbone_config.model_type
        if self.add_fpn and not is_plain_vit(self.backbone_config):
            raise ValueError(
                f"add_fpn makes a pyramid of the one map of a ViT, and a {kind} backbone has maps of several strides:"
                " leave it out, and choose maps with out_features"
            )
        if not self.reshape_hidden_states and not is_plain_vit(self.backbone_config):
            raise ValueError(
                f"reshape_hidden_states=False returns the tokens of a ViT, and a {kind} backbone has maps: use a ViT"
            )
        if self.add_fpn and not self.reshape_hidden_states:
            raise ValueError(
                "a feature pyramid consists of maps: pass add_fpn or reshape_hidden_states=False, not both"
            )
        if self.add_fpn and self.hidden_size % (divisor := 2 ** max(*self.fpn_exponents, 0)) != 0:
            raise ValueError(f"add_fpn needs a hidden_size that is a multiple of {divisor}, got {self.hidden_size}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As that of `PreTrainedConfig`, which would set the options of feature maps one after another."""
        given = {name: kwargs.pop(name) for name in MAP_OPTIONS if name in kwargs}
        if given.keys() & {"add_fpn", "out_features", "out_indices"}:
            config_dict = {**config_dict, "out_features": None, "out_indices": None}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def set_output_features_output_indices(self, out_features, out_indices):
        """As that of `BackboneConfigMixin`. A choice of maps of a backbone whose stages are unknown names a stride."""
        is_default = out_features == self.stage_names[-1:] and out_indices == [len(self.stage_names) - 1]
        is_chosen = not (out_features is None and out_indices is None) and not is_default
        if is_chosen and not declares_stages(self.backbone_config):
            self.stage_names = list(PYRAMID_NAMES)
        super().set_output_features_output_indices(out_features, out_indices)

    @property
    def fpn_exponents(self) -> list[int]:
        """The factors from the grid of patches to each level of the pyramid, as powers of two: 2, 1, 0, -1 for 16."""
        patch_size = max(to_pair(self.patch_size))
        return [round(math.log2(patch_size / stride)) for stride in FPN_STRIDES]

    @property
    def num_hidden_layers(self) -> int:
        """Number of hidden states of the backbone, not counting that of the stem."""
        return len(stage_names_of(self.backbone_config)) - 1

    @property
    def hidden_size(self) -> int | None:
        """
        Dimension of `pooler_output`. For some backbones it is known, and saved, once a model was built: before, it is
        `None` (timm) or the size that the backbone's configuration has.
        """
        measured = getattr(self, "_pooled_width", None)
        if measured is not None:
            return measured
        hidden_sizes = getattr(self.backbone_config, "hidden_sizes", None)
        if hidden_sizes:
            return hidden_sizes[-1]
        return getattr(self.backbone_config, "hidden_size", getattr(self.backbone_config, "num_features", None))

    def set_pooled_width(self, width: int) -> None:
        """Set `hidden_size` to that of a built backbone, where the configuration of the backbone has another one."""
        if self.hidden_size != width:
            self._pooled_width = width

    @property
    def image_size(self) -> int | list[int] | tuple[int, int] | None:
        """Image size of the backbone, or `None` if it has none, as a ResNet."""
        if self.timm_arguments is not None:
            return self.timm_arguments.get("img_size")
        return getattr(self.backbone_config, "image_size", None)

    @property
    def patch_size(self) -> int | list[int] | tuple[int, int] | None:
        """Patch size of the backbone, one integer if it is square, or `None` if it has none, as a ResNet."""
        size = getattr(self.backbone_config, "patch_size", None)
        return size[0] if isinstance(size, (list, tuple)) and len(set(size)) == 1 else size

    @property
    def num_channels(self) -> int | None:
        """Number of channels of the images, or `None` if the backbone's configuration does not have it."""
        if self.timm_arguments is not None:
            return self.timm_arguments.get("in_chans", 3)
        return getattr(self.backbone_config, "num_channels", None)

    @property
    def timm_arguments(self) -> dict | None:
        """Arguments of a timm model, or `None` for other backbones."""
        if not hasattr(self.backbone_config, "model_args"):
            return None
        return self.backbone_config.model_args or {}


def build_backbone_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """
    Build the configuration of a backbone, without random masking.

    Raises:
        ValueError: a dictionary has no `model_type`, or one that is unknown to transformers.
    """
    if config is None:
        return MoCoV3ViTConfig()
    if isinstance(config, PreTrainedConfig):
        return without_masking(config)
    values = dict(config)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError("backbone_config needs the key 'model_type', such as 'mocov3_vit' or 'resnet'")
    if model_type == MoCoV3ViTConfig.model_type:
        return MoCoV3ViTConfig(**values)
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, [MoCoV3ViTConfig.model_type, *CONFIG_MAPPING.keys()], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"backbone_config: model type {model_type!r} is unknown to transformers.{hint}")
    return without_masking(CONFIG_MAPPING[model_type](**values))


def without_masking(backbone_config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration with which the backbone sees the whole image: ViT-MAE hides a part of the patches at random."""
    if backbone_config.model_type == "vit_mae" and backbone_config.mask_ratio != 0:
        backbone_config = copy.deepcopy(backbone_config)
        backbone_config.mask_ratio = 0.0
    return backbone_config


def is_plain_vit(backbone_config: PreTrainedConfig) -> bool:
    """Whether all hidden states of a backbone are tokens of one width on one grid of patches."""
    is_one = isinstance(getattr(backbone_config, "hidden_size", None), int) and hasattr(backbone_config, "patch_size")
    return is_one and not any(getattr(backbone_config, name, None) for name in ("depths", "hidden_sizes"))


def declares_stages(backbone_config: PreTrainedConfig) -> bool:
    """Whether the configuration of a backbone has the number of its stages, or of blocks of a ViT."""
    names = ("stage_names", "depths") + (("num_hidden_layers",) if hasattr(backbone_config, "patch_size") else ())
    return any(getattr(backbone_config, name, None) for name in names)


def stage_names_of(backbone_config: PreTrainedConfig) -> list[str]:
    """
    Names of the hidden states of a backbone, starting with the stem, as transformers' backbones name them.

    Raises:
        ValueError: the backbone has more layers than any model.
    """
    if getattr(backbone_config, "stage_names", None):
        return list(backbone_config.stage_names)
    depths = getattr(backbone_config, "depths", None)
    num_stages = len(depths) if depths is not None else getattr(backbone_config, "num_hidden_layers", 0)
    if num_stages > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {MAX_LAYERS}, got {num_stages}")
    return ["stem", *(f"stage{index}" for index in range(1, num_stages + 1))]


__all__ = ["MoCoV3Config", "MoCoV3ViTConfig"]
