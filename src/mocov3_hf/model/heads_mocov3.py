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
"""Projector and predictor of MoCo v3."""

import torch
from torch import nn

from .batchnorm_mocov3 import MoCoV3BatchNorm1d
from .configuration_mocov3 import MoCoV3Config


class MoCoV3MLPLayer(nn.Module):
    """Linear layer without bias, optional batch normalization and, in hidden layers, affine parameters and ReLU."""

    def __init__(self, in_features: int, out_features: int, hidden: bool, norm: bool):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features, bias=False)
        self.norm = MoCoV3BatchNorm1d(out_features, affine=hidden) if norm else nn.Identity()
        self.activation_fn = nn.ReLU() if hidden else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation_fn(self.norm(self.dense(hidden_states)))


class MoCoV3MLP(nn.Module):
    """Projector or predictor, `(B, in_features)` to `(B, P)`: `num_layers - 1` hidden layers and an output layer."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        num_layers: int,
        hidden_norm: bool,
        final_norm: bool,
    ):
        super().__init__()
        widths = [in_features, *[hidden_features] * (num_layers - 1), out_features]
        last = num_layers - 1
        self.layers = nn.ModuleList(
            MoCoV3MLPLayer(
                widths[index],
                widths[index + 1],
                hidden=index < last,
                norm=hidden_norm if index < last else final_norm,
            )
            for index in range(num_layers)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def build_projector(config: MoCoV3Config, in_features: int) -> MoCoV3MLP:
    return MoCoV3MLP(
        in_features,
        config.head_hidden_size,
        config.projection_dim,
        config.num_projector_layers,
        hidden_norm=config.head_batch_norm,
        final_norm=config.head_batch_norm,
    )


def build_predictor(config: MoCoV3Config) -> nn.Module:
    if config.num_predictor_layers == 0:  # ablation of the paper (§5.1)
        return nn.Identity()
    return MoCoV3MLP(
        config.projection_dim,
        config.head_hidden_size,
        config.projection_dim,
        config.num_predictor_layers,
        hidden_norm=config.head_batch_norm,
        final_norm=config.head_batch_norm and config.predictor_final_norm,
    )
