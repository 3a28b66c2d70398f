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
"""The hidden states of any vision model of transformers as feature maps: which they are, and their layout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .backbone_mocov3 import Pooling, input_shape, masking_options
from .configuration_mocov3 import PYRAMID_NAMES, is_plain_vit
from .configuration_mocov3_vit import to_pair


# Dimensions: B batch, C H W image, h w grid of patches or positions, L tokens.

ADVICE = "docs/backbones.md lists the model types with feature maps"

# What was measured in this process, by configuration.
_measured: dict[str, "FeatureMaps"] = {}


@dataclass(frozen=True)
class Level:
    """
    A hidden state as a feature map.

    Attributes:
        index: Of the hidden state.
        channels: Size of the map.
        grid: `(h, w)` for images of the measured size.
        prefix: Number of tokens before those of the patches.
        suffix: Number of tokens after them.
    """

    index: int
    channels: int
    grid: tuple[int, int]
    prefix: int = 0
    suffix: int = 0


@dataclass(frozen=True)
class FeatureMaps:
    """
    The hidden states of a backbone, measured for images of one size.

    Attributes:
        size: `(H, W)` of these images.
        states: A level for each hidden state.
        is_channels_last: Whether hidden states of four dimensions are `(B, h, w, channels)`.
    """

    size: tuple[int, int]
    states: tuple[Level, ...]
    is_channels_last: bool

    def named(self, stage_names: Sequence[str] | None) -> dict[str, Level]:
        """
        Levels by stage, in order: the hidden states if there is one for each name, or for each but the stem. Otherwise
        the last one of each stride, `"stage1"` to `"stage4"` for the strides 4 to 32, as in a ResNet, and `"stem"` for
        a finer one.
        """
        if stage_names is not None and len(self.states) in (len(stage_names), len(stage_names) - 1):
            return dict(zip(stage_names[-len(self.states) :], self.states, strict=True))
        levels = {}
        for state in self.states:
            number = max(round(math.log2(self.size[0] / state.grid[0])) - 1, 0)
            if number < len(PYRAMID_NAMES):
                levels[PYRAMID_NAMES[number]] = state
        return {name: levels[name] for name in PYRAMID_NAMES if name in levels}

    def check(self, hidden_states: Sequence[Any]) -> Sequence[Any]:
        """
        The hidden states of a forward pass, without those that the hooks of models inside each other record twice.

        Raises:
            ValueError: there are more or fewer than were measured.
        """
        if len(hidden_states) != len(self.states):
            before = [None, *hidden_states[:-1]]
            hidden_states = [state for state, last in zip(hidden_states, before, strict=True) if state is not last]
        if len(hidden_states) != len(self.states):
            raise ValueError(f"the backbone returned {len(hidden_states)} hidden states, expected {len(self.states)}")
        return hidden_states

    def to_map(self, hidden_state: torch.Tensor, level: Level, size: tuple[int, int]) -> torch.Tensor:
        """
        The map `(B, channels, h, w)` of a hidden state.

        Args:
            hidden_state: `(B, channels, h, w)`, `(B, h, w, channels)` or tokens `(B, L, channels)`.
            level: Its level.
            size: `(H, W)` of the images.

        Raises:
            ValueError: tokens that are not a grid of the measured stride.
        """
        if hidden_state.dim() == 4:
            return hidden_state.permute(0, 3, 1, 2).contiguous() if self.is_channels_last else hidden_state
        patches = hidden_state[:, level.prefix : hidden_state.shape[1] - level.suffix]
        # Models drop the rest of an image at its edge, or pad it.
        lengths = [(new * cells, old) for new, cells, old in zip(size, level.grid, self.size, strict=True)]
        for grid in ([a // b for a, b in lengths], [-(-a // b) for a, b in lengths]):
            if math.prod(grid) == patches.shape[1]:
                return patches.transpose(1, 2).unflatten(2, grid).contiguous()
        raise ValueError(
            f"images of {size[0]}×{size[1]} pixels give {patches.shape[1]} tokens, which are not a grid of the strides"
            f" for {self.size[0]}×{self.size[1]}: pad the images to a multiple of the largest stride"
        )


def feature_maps_of(backbone: PreTrainedModel, pooling: Pooling) -> FeatureMaps:
    """
    Measure the hidden states of a built backbone by a forward pass of a copy without data, see `Pooling.measure`.

    Raises:
        UnsupportedBackboneError: the model has no hidden states, or they are not maps.
    """
    key = backbone.config.to_json_string(use_diff=False)
    if key not in _measured:
        _measured[key], _ = pooling.on_copies(backbone, lambda copy: try_out(copy, pooling))
    return _measured[key]


@torch.no_grad()
def try_out(backbone: PreTrainedModel, pooling: Pooling) -> FeatureMaps:
    """The hidden states of a backbone on the default device."""
    size = input_shape(backbone.config)[1:]
    pixel_values = torch.zeros(2, *input_shape(backbone.config), dtype=next(backbone.parameters()).dtype)
    options = masking_options(backbone, pixel_values)
    outputs = backbone(pixel_values, output_hidden_states=True, return_dict=True, **options)
    states = [last_of(state) for state in outputs.get("hidden_states") or ()]
    if not states:
        raise pooling.error("it returns no hidden states, which feature maps are made of", ADVICE)
    last = any(state.ndim == 4 and is_channels_last(state, size) for state in states)
    levels = tuple(level_of(index, state, pooling, size, last) for index, state in enumerate(states))
    return FeatureMaps(size, levels, last)


def last_of(hidden_state: Any) -> torch.Tensor:
    """The hidden state of a stage; MaskFormer's Swin has one for each block."""
    return last_of(hidden_state[-1]) if isinstance(hidden_state, (list, tuple)) else hidden_state


def is_grid(height: int, width: int, size: tuple[int, int]) -> bool:
    """Whether a grid has the proportions of an image, up to a cell."""
    return abs(height * size[1] - width * size[0]) < max(size)


def is_channels_last(state: torch.Tensor, size: tuple[int, int]) -> bool:
    _, first, second, third = state.shape
    return is_grid(first, second, size) and not is_grid(second, third, size)


def level_of(index: int, state: torch.Tensor, pooling: Pooling, size: tuple[int, int], last: bool) -> Level:
    """
    The level of a hidden state.

    Raises:
        UnsupportedBackboneError: it is not a map of the image, with the same stride for rows and columns.
    """
    if state.ndim == 4:
        channels, *grid = state.permute(0, 3, 1, 2).shape[1:] if last else state.shape[1:]
        if is_grid(*grid, size):
            return Level(index, channels, (grid[0], grid[1]))
    elif state.ndim == 3:
        found = patch_grid(pooling.config, size)
        if found is not None and (prefix := state.shape[1] - pooling.num_suffix - math.prod(found)) >= 0:
            return Level(index, state.shape[2], found, prefix, pooling.num_suffix)
        # Some models have a CLS token in their last stage alone.
        for prefix, suffix in ((pooling.num_prefix, pooling.num_suffix), (0, 0)):
            found = grid_of(state.shape[1] - prefix - suffix, size)
            if found is not None:
                return Level(index, state.shape[2], found, prefix, suffix)
    raise pooling.error(
        f"its hidden state {index} of shape {tuple(state.shape[1:])} is not a map of images of {size[0]}×{size[1]}",
        ADVICE,
    )


def patch_grid(config: Any, size: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of a plain ViT; None for other models, whose `patch_size` need not be their stride."""
    if not is_plain_vit(config):
        return None
    rows, columns = (length // patch for length, patch in zip(size, to_pair(config.patch_size), strict=True))
    return rows, columns


def grid_of(num_tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of that many tokens with the proportions of an image; None if there is none."""
    if num_tokens < 1:
        return None
    height = max(round(math.sqrt(num_tokens * size[0] / size[1])), 1)
    width = num_tokens // height
    return (height, width) if height * width == num_tokens and is_grid(height, width, size) else None
