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
"""MoCo v3 pre-training: projector and predictor on the encoder, the momentum branch, and the symmetric loss."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple

from .batchnorm_mocov3 import MoCoV3BatchNorm1d, num_processes, use_global_statistics
from .configuration_mocov3 import MoCoV3Config
from .loss_mocov3 import contrastive_loss
from .modeling_mocov3 import MoCoV3Model, MoCoV3PreTrainedModel, is_initialized, report_all_unexpected_keys


# Legend of dimensions: B batch, C H W image, D width of the pooled vector, P width of the projections.


@dataclass
@auto_docstring(custom_intro="Output of [`MoCoV3ForPreTraining`]; direction 1 compares view 1 with keys of view 2.")
class MoCoV3ForPreTrainingOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `pixel_values_2` is given):
        Sum of the contrastive losses of both directions.
    prediction (`torch.FloatTensor` of shape `(B, P)`):
        Output of the predictor for view 1, not normalised.
    projection (`torch.FloatTensor` of shape `(B, P)`, *optional*, returned when `pixel_values_2` is given):
        Output of the momentum branch for view 2, the key of `prediction`, not normalised.
    pooler_output (`torch.FloatTensor` of shape `(B, D)`):
        Features of view 1: the pooled vector of the backbone.
    positive_similarity_1 (`torch.FloatTensor` of shape `()`, *optional*):
        Mean cosine similarity of the predictions of view 1 and their keys of view 2.
    positive_similarity_2 (`torch.FloatTensor` of shape `()`, *optional*):
        The same of view 2 and its keys of view 1.
    positive_top1_1 (`torch.FloatTensor` of shape `()`, *optional*):
        Fraction of the predictions of view 1 whose own key is the most similar among the keys of all processes.
    positive_top1_2 (`torch.FloatTensor` of shape `()`, *optional*):
        The same of view 2.
    hidden_states (`tuple(torch.FloatTensor)`, *optional*):
        Hidden states of the backbone for view 1.
    attentions (`tuple(torch.FloatTensor)`, *optional*):
        Attention weights of the backbone for view 1.
    """

    loss: torch.FloatTensor | None = None
    prediction: torch.FloatTensor | None = None
    projection: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    positive_similarity_1: torch.FloatTensor | None = None
    positive_similarity_2: torch.FloatTensor | None = None
    positive_top1_1: torch.FloatTensor | None = None
    positive_top1_2: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class MoCoV3MLPLayer(nn.Module):
    """Linear without bias, then batch normalisation and ReLU (hidden), or the former without affine, or neither."""

    def __init__(self, in_features: int, out_features: int, hidden: bool, norm: bool):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features, bias=False)
        self.norm = MoCoV3BatchNorm1d(out_features, affine=hidden) if norm else nn.Identity()
        self.activation_fn = nn.ReLU() if hidden else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation_fn(self.norm(self.dense(hidden_states)))


class MoCoV3MLP(nn.Module):
    """Projector or predictor, `(B, in_features)` to `(B, P)`: `num_layers - 1` hidden layers and the output layer."""

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
    if config.num_predictor_layers == 0:  # the paper's ablation of the predictor (§5.1)
        return nn.Identity()
    return MoCoV3MLP(
        config.projection_dim,
        config.head_hidden_size,
        config.projection_dim,
        config.num_predictor_layers,
        hidden_norm=config.head_batch_norm,
        final_norm=config.head_batch_norm and config.predictor_final_norm,
    )


class MoCoV3MomentumEncoder(nn.Module):
    """The branch that gives the keys: encoder and projector, averages of the trained ones, never a predictor."""

    def __init__(self, config: MoCoV3Config):
        super().__init__()
        self.encoder = MoCoV3Model(config)
        self.projector = build_projector(config, self.encoder.pooled_width)
        self.requires_grad_(False)


@torch.no_grad()
def ema_update_(averages: list[torch.Tensor], sources: list[torch.Tensor], momentum: float) -> None:
    """`average ← momentum · average + (1 - momentum) · source` for all tensors at once and in place."""
    torch._foreach_lerp_(averages, sources, 1.0 - momentum)


@auto_docstring(
    custom_intro="""
    MoCo v3 for pre-training (paper, algorithm 1). The forward pass is pure: call `update_momentum_encoder` once per
    optimizer step, before it.
    """
)
class MoCoV3ForPreTraining(MoCoV3PreTrainedModel):
    # How the features are computed, not what they are: no part of the configuration.
    pooled_query_only = True
    views_in_one_pass = False

    def __init__(self, config: MoCoV3Config):
        super().__init__(config)
        self.mocov3 = MoCoV3Model(config)
        self.projector = build_projector(config, self.mocov3.pooled_width)
        self.predictor = build_predictor(config)
        # One container, so that loading the base model out of this checkpoint finds exactly one encoder.
        self.momentum_encoder = MoCoV3MomentumEncoder(config)
        use_global_statistics(self)
        self.supports_gradient_checkpointing = self.mocov3.supports_gradient_checkpointing
        self.post_init()
        report_all_unexpected_keys(self)

    def initialize_weights(self):
        fresh = not is_initialized(self.momentum_encoder)
        super().initialize_weights()
        if fresh:
            for average, source in self.momentum_pairs(buffers=True):
                init.copy_(average, source)  # passes over what was loaded
        self.momentum_encoder.requires_grad_(False)

    def set_views_in_one_pass(self, enabled: bool) -> None:
        """
        Whether both views go through an encoder together, as one batch of twice the size. The numbers are the same;
        those that stochastic depth and dropout draw are others.

        Raises:
            ValueError: a backbone with batch normalisation, which must see the statistics of one view.
        """
        if enabled and has_batch_norm(self.mocov3):
            raise ValueError(
                "the views cannot go through this backbone in one pass: it has batch normalisation, which would mix"
                " the statistics of both"
            )
        self.views_in_one_pass = enabled

    def momentum_pairs(self, buffers: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of a tensor of the momentum branch and its source: all parameters and, on demand, all buffers."""
        branches = [
            (self.momentum_encoder.encoder, self.mocov3),
            (self.momentum_encoder.projector, self.projector),
        ]
        pairs = []
        for average, source in branches:
            pairs += zip(average.parameters(), source.parameters(), strict=True)
            if buffers:
                pairs += zip(average.buffers(), source.buffers(), strict=True)
        return pairs

    def update_momentum_encoder(self, momentum: float) -> None:
        """
        Move the momentum branch: `θk ← m·θk + (1 - m)·θq` for all parameters. Running statistics of batch
        normalisation are not averaged; each branch keeps its own, as in the official code.

        Args:
            momentum (`float`):
                `m`, between 0 and 1.

        Raises:
            ValueError: `m` outside of [0, 1].
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie between 0 and 1, got {momentum}")
        averages, sources = zip(*self.momentum_pairs(), strict=True)
        ema_update_(list(averages), list(sources), momentum)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_2: torch.Tensor | None = None,
        even_batches: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoCoV3ForPreTrainingOutput:
        r"""
        pixel_values_2 (`torch.FloatTensor` of shape `(B, C, H, W)`, *optional*):
            The second view of the same images. Without it the output holds features and prediction and no loss.
        even_batches (`bool`, *optional*, defaults to `False`):
            A promise that all processes hold equally many images, which saves an exchange of batch sizes.
        """
        check_batch(self, pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if pixel_values_2 is not None and not (output_hidden_states or output_attentions):
            views = (pixel_values, pixel_values_2)
            features = self.encode(self.mocov3, views, **kwargs)
            return self.contrast(*features, *self.momentum_features(views, **kwargs), even_batches)

        outputs = self.mocov3(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            pooled_query_only=self.pooled_query_only,
            **kwargs,
        )
        if pixel_values_2 is None:
            output = MoCoV3ForPreTrainingOutput(
                prediction=self.predictor(self.projector(outputs.pooler_output)), pooler_output=outputs.pooler_output
            )
        else:
            (features_2,) = self.encode(self.mocov3, (pixel_values_2,), **kwargs)
            keys = self.momentum_features((pixel_values, pixel_values_2), **kwargs)
            output = self.contrast(outputs.pooler_output, features_2, *keys, even_batches)
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        return output

    def encode(
        self, encoder: MoCoV3Model, views: tuple[torch.Tensor, ...], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, ...]:
        """Features `(B, D)` of every view `(B, C, H, W)`, each on its own unless `views_in_one_pass`."""
        kwargs = {
            "output_hidden_states": False,
            "output_attentions": False,
            "pooled_query_only": self.pooled_query_only,
            **kwargs,
        }
        if self.views_in_one_pass and len(views) > 1:
            return encoder(torch.cat(views), **kwargs).pooler_output.chunk(len(views))
        return tuple(encoder(pixel_values, **kwargs).pooler_output for pixel_values in views)

    @torch.no_grad()
    def momentum_features(
        self, views: tuple[torch.Tensor, ...], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, ...]:
        """The same by the momentum encoder."""
        return self.encode(self.momentum_encoder.encoder, views, **kwargs)

    def contrast(
        self,
        features_1: torch.Tensor,
        features_2: torch.Tensor,
        momentum_features_1: torch.Tensor,
        momentum_features_2: torch.Tensor,
        even_batches: bool = False,
    ) -> MoCoV3ForPreTrainingOutput:
        """
        Heads and symmetric loss on the features of the whole batch: the second half of the forward pass.

        Args:
            features_1, features_2 (`torch.Tensor` of shape `(B, D)`):
                Features of the encoder for both views.
            momentum_features_1, momentum_features_2 (`torch.Tensor` of shape `(B, D)`):
                Features of the momentum encoder.
            even_batches (`bool`, *optional*, defaults to `False`):
                As in the forward pass.
        """
        query_1 = self.predictor(self.projector(features_1))
        query_2 = self.predictor(self.projector(features_2))
        with torch.no_grad():
            key_1 = self.momentum_encoder.projector(momentum_features_1)
            key_2 = self.momentum_encoder.projector(momentum_features_2)

        direction_1 = contrastive_loss(query_1, key_2, self.config.temperature, even_batches)
        direction_2 = contrastive_loss(query_2, key_1, self.config.temperature, even_batches)
        return MoCoV3ForPreTrainingOutput(
            loss=direction_1.loss + direction_2.loss,
            prediction=query_1,
            projection=key_2,
            pooler_output=features_1,
            positive_similarity_1=direction_1.positive_similarity,
            positive_similarity_2=direction_2.positive_similarity,
            positive_top1_1=direction_1.positive_top1,
            positive_top1_2=direction_2.positive_top1,
        )


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def check_batch(model: MoCoV3ForPreTraining, pixel_values: torch.Tensor | None) -> None:
    """
    Raises:
        ValueError: no images, or a single one in training, which batch normalisation cannot normalise.
    """
    if pixel_values is None:
        raise ValueError("You have to specify pixel_values")
    if model.training and len(pixel_values) * num_processes() < 2:
        raise ValueError(
            "MoCo v3 cannot train on a batch of 1: its heads normalise over the batch, and one image has no negatives."
            " Use at least 2 images, and hundreds to learn well"
        )


__all__ = ["MoCoV3ForPreTraining", "MoCoV3ForPreTrainingOutput", "ema_update_"]
