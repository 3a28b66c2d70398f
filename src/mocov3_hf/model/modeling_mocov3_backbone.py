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
"""The encoder of MoCo v3 as a backbone for detection and segmentation: feature maps, tokens or a feature pyramid."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple

from .backbone_mocov3 import KNOWN_BACKBONES, pooled_width
from .configuration_mocov3 import PYRAMID_NAMES, MoCoV3Config, declares_stages, is_plain_vit
from .configuration_mocov3_vit import to_pair
from .feature_maps_mocov3 import FeatureMaps, feature_maps_of, last_of
from .modeling_mocov3 import MoCoV3Model, MoCoV3PreTrainedModel
from .modeling_mocov3_vit import init_torch_default


# Dimensions: B batch, C H W image, h w grid of patches or positions, L tokens, D width of a ViT.


class MoCoV3ChannelLayerNorm(nn.LayerNorm):
    """Layer normalization over the channels of a map `(B, C, h, w)`. Unlike a batch norm, it fits batches of one."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MoCoV3PyramidLevel(nn.Sequential):
    """
    A level of the simple feature pyramid (ViTDet, Li et al. 2022, §3): `(B, D, h, w)` to `2^exponent` times the grid.

    Up, every doubling is a transposed convolution that halves the width. Down, it is max pooling.
    """

    def __init__(self, width: int, exponent: int):
        layers: list[nn.Module] = []
        for step in range(exponent):
            if step > 0:
                layers += [MoCoV3ChannelLayerNorm(width), nn.GELU()]
            layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
            width //= 2
        if exponent < 0:
            layers.append(
                nn.MaxPool2d(2**-exponent, ceil_mode=True)
            )  # a part of a cell at the edge is one, as in CNNs
        super().__init__(*layers)
        self.width = width


@auto_docstring(
    custom_intro="""
    The encoder of MoCo v3 as a backbone for detection and segmentation: it returns the feature maps of the stages
    in `config.out_features`, of images of any size. The stages of a ViT are its blocks, or with `config.add_fpn` the
    levels of a feature pyramid on its last one.
    """
)
class MoCoV3Backbone(BackboneMixin, MoCoV3PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = MoCoV3Model._keys_to_ignore_on_load_unexpected

    def __init__(self, config: MoCoV3Config):
        super().__init__(config)
        self.mocov3 = MoCoV3Model(config)
        inner = self.mocov3.backbone
        self.is_plain_vit = is_plain_vit(config.backbone_config)
        self.can_interpolate = "interpolate_pos_encoding" in inspect.signature(inner.forward).parameters
        self.has_attentions = any(hasattr(inner.config, name) for name in ("num_attention_heads", "num_heads"))
        if config.add_fpn:
            width = pooled_width(inner)
            levels = dict(zip(self.stage_names[1:], config.fpn_exponents, strict=True))
            # A level without a reader would have weights without a gradient, an error under DDP.
            self.fpn = nn.ModuleDict(
                {name: MoCoV3PyramidLevel(width, levels[name]) for name in self.out_features if name in levels}
            )
            self.num_features = [width, *(width // 2 ** max(exponent, 0) for exponent in levels.values())]
        self.measure()
        self.post_init()

    def measure(self) -> None:
        """
        Find which hidden state is the map of which stage, and the channels of all stages, None where there is no map.

        Raises:
            UnsupportedBackboneError: the hidden states of the backbone are not maps.
            ValueError: a requested stage has none.
        """
        inner = self.mocov3.backbone
        self.maps: FeatureMaps | None = None
        if inner.config.model_type in KNOWN_BACKBONES:
            if inner.config.model_type == "resnet":
                self.num_features = [inner.config.embedding_size, *inner.config.hidden_sizes]
            elif not self.config.add_fpn:
                self.num_features = [inner.config.hidden_size] * len(self.stage_names)
            return
        self.maps = feature_maps_of(inner, self.mocov3.pooling)
        if self.config.add_fpn:
            return
        is_declared = declares_stages(inner.config)
        self.levels = self.maps.named(self.stage_names if is_declared else None)
        if not is_declared and self.stage_names != list(PYRAMID_NAMES):  # no map was chosen
            self.out_features = [list(self.levels)[-1]]
            self.stage_names = self.config.stage_names
        for stage in self.out_features:
            self.index_of(stage)
        self.num_features = [self.levels[name].channels if name in self.levels else None for name in self.stage_names]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.ConvTranspose2d):
            init_torch_default(module)
        else:
            super()._init_weights(module)

    @can_return_tuple
    @filter_output_hidden_states
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        r"""
        Returns `feature_maps`, one of shape `(B, channels, h, w)` for each of `config.out_features`. Those of a ViT
        pass through its final normalization unless `config.apply_layernorm` is `False`. Its position embeddings are
        interpolated for images of another size than it was trained with, and images that are not a multiple of its
        patch size are padded with zeros on the right and at the bottom, so that `h` is `H / patch_size`, rounded up.
        With `config.reshape_hidden_states=False`, the maps of a ViT are tokens `(B, L, D)`, and such images are
        refused with a `ValueError`, because decoders of tokens round `h` down.

        Example:

        ```python
        >>> import torch
        >>> from mocov3_hf import MoCoV3Backbone, MoCoV3Config

        >>> vit = {"model_type": "mocov3_vit", "hidden_size": 48, "num_hidden_layers": 2, "patch_size": 16}
        >>> model = MoCoV3Backbone(MoCoV3Config(backbone_config=vit, add_fpn=True)).eval()
        >>> outputs = model(torch.randn(1, 3, 96, 128))
        >>> [list(feature_map.shape) for feature_map in outputs.feature_maps]
        [[1, 12, 24, 32], [1, 24, 12, 16], [1, 48, 6, 8], [1, 48, 3, 4]]
        ```
        """
        if self.is_plain_vit:
            pixel_values = self.pad_to_patches(pixel_values)
        if self.can_interpolate and tuple(pixel_values.shape[-2:]) != to_pair(self.config.image_size):
            kwargs.setdefault("interpolate_pos_encoding", True)
        outputs = self.mocov3(pixel_values, output_hidden_states=True, output_attentions=output_attentions, **kwargs)
        hidden_states = outputs.hidden_states if self.maps is None else self.maps.check(outputs.hidden_states)
        if self.config.add_fpn:
            feature_maps = self.pyramid(hidden_states, pixel_values)
        else:
            feature_maps = tuple(
                self.feature_map(hidden_states, self.index_of(stage), pixel_values) for stage in self.out_features
            )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def pad_to_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Images with zeros on the right and at the bottom, which are the mean after normalization, up to whole patches.
        Those of the backbone's own size stay as they are if its position embeddings fit no other.

        Raises:
            ValueError: tokens are requested, whose grid is that of whole patches for their readers.
        """
        height, width = pixel_values.shape[-2:]
        rows, columns = to_pair(self.config.backbone_config.patch_size)
        bottom, right = -height % rows, -width % columns
        is_native = (height, width) == to_pair(self.config.image_size)
        if (bottom, right) == (0, 0) or (is_native and not self.can_interpolate):
            return pixel_values
        if not self.config.reshape_hidden_states:
            raise ValueError(
                f"images of {height}×{width} pixels are not a multiple of the patch size {rows}×{columns}, which"
                " reshape_hidden_states=False needs: resize or pad them"
            )
        return nn.functional.pad(pixel_values, (0, right, 0, bottom))

    def pyramid(self, hidden_states: Sequence[torch.Tensor], pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        The maps of `out_features`: levels of the pyramid on the last hidden state, and the stem.

        Raises:
            ValueError: `out_features` was changed after the model was built.
        """
        last = self.feature_map(hidden_states, len(hidden_states) - 1, pixel_values)
        maps = []
        for stage in self.out_features:
            if stage == "stem":
                maps.append(self.feature_map(hidden_states, 0, pixel_values))
            elif stage in self.fpn:
                maps.append(self.fpn[stage](last))
            else:
                raise ValueError(
                    f"the pyramid was built without {stage!r}: pass out_features to the configuration of a new model"
                )
        return tuple(maps)

    def index_of(self, stage: str) -> int:
        """Index of the hidden state of a stage; ValueError if it has none."""
        if self.maps is None:
            return self.stage_names.index(stage)
        if stage not in self.levels:
            kind, maps = self.config.backbone_config.model_type, ", ".join(self.levels)
            raise ValueError(f"a {kind} backbone has no map {stage!r}: choose out_features among {maps}")
        return self.levels[stage].index

    def feature_map(
        self, hidden_states: Sequence[torch.Tensor], index: int, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """Feature map `(B, channels, h, w)` of a hidden state; without `reshape_hidden_states` its tokens."""
        hidden_state = last_of(hidden_states[index])
        if hidden_state.dim() == 4 and self.maps is None:
            return hidden_state
        if self.maps is not None and not (hidden_state.dim() == 3 and self.is_plain_vit):
            return self.maps.to_map(hidden_state, self.maps.states[index], tuple(pixel_values.shape[-2:]))
        layernorm = getattr(self.mocov3.backbone, "layernorm", None)
        if layernorm is not None and self.config.apply_layernorm:
            hidden_state = layernorm(hidden_state)
        if not self.config.reshape_hidden_states:
            return hidden_state
        height, width = token_grid(hidden_state, pixel_values, self.config.backbone_config)
        end = hidden_state.shape[1] - (0 if self.maps is None else self.maps.states[index].suffix)
        patches = hidden_state[:, end - height * width : end]
        return patches.transpose(1, 2).unflatten(2, (height, width)).contiguous()


def token_grid(hidden_state: torch.Tensor, pixel_values: torch.Tensor, config: MoCoV3Config) -> tuple[int, int]:
    """Grid `(h, w)` of the patch tokens. Hierarchical models halve it in each stage."""
    height, width = (
        size // patch for size, patch in zip(pixel_values.shape[-2:], to_pair(config.patch_size), strict=True)
    )
    while height * width > hidden_state.shape[1]:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


__all__ = ["MoCoV3Backbone"]
