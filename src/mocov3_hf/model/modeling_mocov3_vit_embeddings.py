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
"""Images to tokens in MoCo v3's ViT: patch projection or convolutional stem, CLS token and position embeddings."""

import itertools

import torch
from torch import nn

from .configuration_mocov3_vit import MoCoV3ViTConfig, to_pair


# Dimensions: B batch, C H W image, h w grid of patches, L = 1 + h·w tokens with the CLS token first, D hidden size.


def sincos_position_embedding(hidden_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """
    The fixed two-dimensional position embedding `(1, 1 + h·w, D)` in float32. It is zero for the CLS token.

    A patch has `sin(row·ω) cos(row·ω) sin(column·ω) cos(column·ω)`, each of size `D/4`, `ω_i = 10000^(-i / (D/4))`.
    """
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    rows, columns = torch.meshgrid(
        *(torch.arange(size, dtype=torch.float64, device="cpu") for size in grid), indexing="ij"
    )
    angles = [torch.outer(axis.flatten(), omega) for axis in (rows, columns)]
    patches = torch.cat([table for angle in angles for table in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([patches.new_zeros(1, hidden_size), patches])[None].float()


class MoCoV3ViTPatchProjection(nn.Conv2d):
    """A convolution whose stride equals its kernel size. On CUDA it is computed as a matrix product."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.multiply(pixel_values) if pixel_values.is_cuda else super().forward(pixel_values)

    def multiply(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The convolution as a matrix product. cuDNN's kernel is slow in half precision: 5 % of a ViT-B step."""
        height, width = self.kernel_size
        rows, columns = pixel_values.shape[2] // height, pixel_values.shape[3] // width
        patches = pixel_values[:, :, : rows * height, : columns * width]
        patches = patches.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # B C h p w q
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        projected = nn.functional.linear(patches, self.weight.flatten(1), self.bias)
        return projected.transpose(1, 2).unflatten(2, (rows, columns))


class MoCoV3ViTPatchEmbeddings(nn.Module):
    """Projects non-overlapping patches: `(B, C, H, W)` to `(B, D, h, w)`."""

    def __init__(self, config: MoCoV3ViTConfig):
        super().__init__()
        patch_size = to_pair(config.patch_size)
        self.projection = MoCoV3ViTPatchProjection(
            config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values.to(self.projection.weight.dtype))


class MoCoV3ViTConvLayer(nn.Module):
    """3x3 convolution of stride 2, batch normalization, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.normalization(self.convolution(hidden_states)).relu()


class MoCoV3ViTConvStem(nn.Module):
    """Convolutional stem (paper §4.2, after Xiao et al. 2021): `(B, C, H, W)` to `(B, D, H/16, W/16)`."""

    def __init__(self, config: MoCoV3ViTConfig):
        super().__init__()
        widths = [config.num_channels, *(config.hidden_size // divisor for divisor in (8, 4, 2, 1))]
        self.layers = nn.ModuleList(MoCoV3ViTConvLayer(*pair) for pair in itertools.pairwise(widths))
        self.projection = nn.Conv2d(config.hidden_size, config.hidden_size, kernel_size=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = pixel_values.to(self.projection.weight.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.projection(hidden_states)


class MoCoV3ViTEmbeddings(nn.Module):
    """CLS token, patch embeddings and position embeddings: `(B, C, H, W)` to `(B, L, D)`."""

    def __init__(self, config: MoCoV3ViTConfig):
        super().__init__()
        self.config = config
        image_size, self.patch_size = to_pair(config.image_size), to_pair(config.patch_size)
        self.image_size = image_size
        self.grid = (image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        # A parameter even when it is fixed: published parameter counts include it, both kinds share one key in
        # checkpoints, and it follows the dtype of the model.
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], config.hidden_size))
        self.patch_embeddings = (
            MoCoV3ViTConvStem(config) if config.stem == "conv" else MoCoV3ViTPatchEmbeddings(config)
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        _, channels, height, width = pixel_values.shape
        if channels != self.config.num_channels:
            raise ValueError(
                f"pixel_values must have {self.config.num_channels} channels (config.num_channels), got {channels}"
            )
        if not interpolate_pos_encoding and (height, width) != self.image_size:
            raise ValueError(
                f"pixel_values of size {height}×{width} do not match the model's {self.image_size[0]}×"
                f"{self.image_size[1]}: resize them, or pass interpolate_pos_encoding=True"
            )
        patches = self.patch_embeddings(pixel_values)
        grid = tuple(patches.shape[-2:])
        hidden_states = torch.cat(
            [self.cls_token.expand(patches.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        positions = self.interpolated_positions(grid) if interpolate_pos_encoding else self.position_embeddings
        return self.dropout(hidden_states + positions)

    def interpolated_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings `(1, 1 + h·w, D)` for another grid, by bicubic interpolation in float32."""
        if grid == self.grid:
            return self.position_embeddings
        cls_position, table = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        table = table.unflatten(1, self.grid).permute(0, 3, 1, 2).float()
        table = nn.functional.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        table = table.to(cls_position.dtype).flatten(2).transpose(1, 2)
        return torch.cat([cls_position, table], dim=1)


def freeze_fixed_parameters(module: nn.Module) -> None:
    """Freeze the sine-cosine table and the fixed patch projection of every MoCo v3 ViT inside `module`."""
    for embeddings in module.modules():
        if isinstance(embeddings, MoCoV3ViTEmbeddings):
            config = embeddings.config
            if config.position_embedding == "sincos2d":
                embeddings.position_embeddings.requires_grad_(False)
            if config.stem == "patch" and config.freeze_patch_projection:
                embeddings.patch_embeddings.requires_grad_(False)
