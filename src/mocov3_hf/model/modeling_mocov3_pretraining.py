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
"""MoCo v3 pre-training: the trained encoder, the momentum encoder, and the symmetric InfoNCE loss."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, logging
from transformers.utils.generic import can_return_tuple

from .batchnorm_mocov3 import num_processes, use_global_statistics
from .configuration_mocov3 import MoCoV3Config
from .heads_mocov3 import build_predictor, build_projector
from .loss_mocov3 import contrastive_loss
from .modeling_mocov3 import MoCoV3Model, MoCoV3PreTrainedModel, ignore_own_keys_only, is_initialized


logger = logging.get_logger(__name__)

# Dimensions: B batch, C H W image, D size of the pooled output, P size of the projections.


@dataclass
@auto_docstring(
    custom_intro="Output of [`MoCoV3ForPreTraining`]; direction 1 has queries of view 1 and keys of view 2."
)
class MoCoV3ForPreTrainingOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `pixel_values_2` is given):
        Sum of the InfoNCE losses of both directions.
    prediction (`torch.FloatTensor` of shape `(B, P)`):
        Queries of view 1: the output of the predictor, not normalized.
    projection (`torch.FloatTensor` of shape `(B, P)`, *optional*, returned when `pixel_values_2` is given):
        Keys of view 2, the positives of `prediction`: the output of the momentum encoder, not normalized.
    pooler_output (`torch.FloatTensor` of shape `(B, D)`):
        Representations of view 1: the pooled output of the backbone.
    positive_similarity_1 (`torch.FloatTensor` of shape `()`, *optional*):
        Mean cosine similarity of the queries of view 1 and their keys of view 2.
    positive_similarity_2 (`torch.FloatTensor` of shape `()`, *optional*):
        Mean cosine similarity of the queries of view 2 and their keys of view 1.
    positive_top1_1 (`torch.FloatTensor` of shape `()`, *optional*):
        Fraction of the queries of view 1 whose positive is the most similar among the keys of all processes.
    positive_top1_2 (`torch.FloatTensor` of shape `()`, *optional*):
        Fraction of the queries of view 2 whose positive is the most similar among the keys of all processes.
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


class MoCoV3MomentumEncoder(nn.Module):
    """The encoder and projector that compute the keys: an EMA of the trained ones. It has no predictor."""

    def __init__(self, config: MoCoV3Config):
        super().__init__()
        self.encoder = MoCoV3Model(config)
        self.projector = build_projector(config, self.encoder.pooled_width)
        self.requires_grad_(False)


@torch.no_grad()
def ema_update_(averages: list[torch.Tensor], sources: list[torch.Tensor], ema_decay: float) -> None:
    """`average ← ema_decay · average + (1 - ema_decay) · source` in place, for all tensors at once."""
    torch._foreach_lerp_(averages, sources, 1.0 - ema_decay)


@contextmanager
def pooled_query_only(encoder: MoCoV3Model, enabled: bool) -> Iterator[None]:
    """
    Let MoCo v3's ViT in `encoder` compute its CLS token only, unless the mean of the patches is the pooled output.
    Other backbones ignore it.
    """
    before = getattr(encoder.backbone, "pooled_query_only", False)
    encoder.backbone.pooled_query_only = enabled and encoder.config.pooling != "mean"
    try:
        yield
    finally:
        encoder.backbone.pooled_query_only = before


@auto_docstring(
    custom_intro="""
    MoCo v3 for pre-training (paper, algorithm 1).

    The forward pass does not update the momentum encoder. Call `update_momentum_encoder` once per optimizer step. With
    [`Trainer`], use a callback:

    ```python
    >>> from transformers import TrainerCallback

    >>> class UpdateMomentumEncoder(TrainerCallback):
    ...     def on_optimizer_step(self, args, state, control, model, **kwargs):
    ...         model.update_momentum_encoder(0.99)
    ```
    """
)
class MoCoV3ForPreTraining(MoCoV3PreTrainedModel):
    # Implementation choices that do not change the results. They are not part of the configuration.
    pooled_query_only = True  # as in `MoCoV3ViTModel`
    even_batches = False  # set to `True` if all processes have equally many images: saves an exchange of batch sizes

    accepts_loss_kwargs = False  # `Trainer` divides the loss by the number of accumulation steps itself
    _trained_values = None  # of the last training forward, if the momentum encoder was not updated since

    def __init__(self, config: MoCoV3Config):
        super().__init__(config)
        self.mocov3 = MoCoV3Model(config)
        self.projector = build_projector(config, self.mocov3.pooled_width)
        self.predictor = build_predictor(config)
        # In one container, so that loading a `MoCoV3Model` from a checkpoint of this class finds a single encoder.
        self.momentum_encoder = MoCoV3MomentumEncoder(config)
        use_global_statistics(self)
        self.post_init()
        ignore_own_keys_only(self)

    def initialize_weights(self):
        fresh = not is_initialized(self.momentum_encoder)
        super().initialize_weights()
        if fresh:
            for average, source in self.momentum_pairs(buffers=True):
                init.copy_(average, source)  # skips loaded tensors
        self.momentum_encoder.requires_grad_(False)

    def momentum_pairs(self, buffers: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of a parameter of the momentum encoder and its source, optionally with pairs of buffers."""
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

    def update_momentum_encoder(self, ema_decay: float | None = None, *, momentum: float | None = None) -> None:
        """
        Update the momentum encoder: `θk ← m·θk + (1 - m)·θq` for all parameters. Each encoder keeps its own running
        statistics of batch normalization, as in the official code.

        Args:
            ema_decay (`float`):
                `m`, between 0 and 1.
            momentum (`float`, *optional*):
                Deprecated name of `ema_decay`.

        Raises:
            ValueError: `ema_decay` is not in [0, 1].

        Example:

        ```python
        >>> import torch
        >>> from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining

        >>> backbone = {"model_type": "mocov3_vit", "image_size": 32, "patch_size": 8, "hidden_size": 48}
        >>> model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone, head_hidden_size=64))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> for step in range(2):
        ...     model.update_momentum_encoder(0.99)
        ...     loss = model(pixel_values=torch.randn(4, 3, 32, 32), pixel_values_2=torch.randn(4, 3, 32, 32)).loss
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ```
        """
        if momentum is not None:
            warnings.warn(
                "update_momentum_encoder: `momentum` is deprecated, use `ema_decay`", FutureWarning, stacklevel=2
            )
            ema_decay = momentum
        if ema_decay is None or not 0.0 <= ema_decay <= 1.0:
            raise ValueError(f"ema_decay must be between 0 and 1, got {ema_decay}")
        averages, sources = zip(*self.momentum_pairs(), strict=True)
        ema_update_(list(averages), list(sources), ema_decay)
        self._trained_values = None

    def warn_without_momentum_updates(self) -> None:
        """Warn, once per process, if weights are trained between forward passes and the momentum encoder is not."""
        weight = self.projector.layers[-1].dense.weight
        is_training = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not is_training or type(weight) is not nn.Parameter or weight.is_meta:
            return
        # A few values, since fused optimizers do not change `_version`. They stay the same within a step.
        values = weight.detach()[0, :256].clone()
        before, self._trained_values = self._trained_values, values
        if before is None or (before.device, before.dtype) != (values.device, values.dtype):
            return
        if not torch.equal(before, values):
            logger.warning_once(
                "The weights changed since the last forward pass, but the momentum encoder did not: call"
                " model.update_momentum_encoder(ema_decay) once per optimizer step. With Trainer, use the callback in"
                " the docstring of MoCoV3ForPreTraining."
            )

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_2: torch.Tensor | None = None,
        return_loss: bool | None = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoCoV3ForPreTrainingOutput:
        r"""
        pixel_values_2 (`torch.FloatTensor` of shape `(B, C, H, W)`, *optional*):
            The second view of the same images. Without it, the output contains representations and predictions but no
            loss.
        return_loss (`bool`, *optional*, defaults to `True`):
            Whether to compute the loss. If `False`, `pixel_values_2` is not used.

        Example:

        ```python
        >>> import torch
        >>> from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining

        >>> backbone = {"model_type": "mocov3_vit", "image_size": 32, "patch_size": 8, "hidden_size": 48}
        >>> model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone, head_hidden_size=64))
        >>> outputs = model(pixel_values=torch.randn(4, 3, 32, 32), pixel_values_2=torch.randn(4, 3, 32, 32))
        >>> list(outputs.prediction.shape)
        [4, 256]
        >>> outputs.loss.backward()
        ```
        """
        check_batch(self, pixel_values)
        if not return_loss:
            pixel_values_2 = None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if pixel_values_2 is not None and not (output_hidden_states or output_attentions):
            views = (pixel_values, pixel_values_2)
            features = self.encode(self.mocov3, views, **kwargs)
            return self.contrast(*features, *self.momentum_features(views, **kwargs))

        kwargs_1 = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions, **kwargs}
        with pooled_query_only(self.mocov3, self.pooled_query_only):
            outputs = self.mocov3(pixel_values, **kwargs_1)
        if pixel_values_2 is None:
            output = MoCoV3ForPreTrainingOutput(
                prediction=self.predictor(self.projector(outputs.pooler_output)), pooler_output=outputs.pooler_output
            )
        else:
            (features_2,) = self.encode(self.mocov3, (pixel_values_2,), **kwargs)
            keys = self.momentum_features((pixel_values, pixel_values_2), **kwargs)
            output = self.contrast(outputs.pooler_output, features_2, *keys)
        output.hidden_states, output.attentions = outputs.hidden_states, outputs.attentions
        return output

    def encode(
        self, encoder: MoCoV3Model, views: tuple[torch.Tensor, ...], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, ...]:
        """Representations `(B, D)` of every view `(B, C, H, W)`, one view after the other."""
        kwargs = {"output_hidden_states": False, "output_attentions": False, **kwargs}
        with pooled_query_only(encoder, self.pooled_query_only):
            return tuple(encoder(pixel_values, **kwargs).pooler_output for pixel_values in views)

    @torch.no_grad()
    def momentum_features(
        self, views: tuple[torch.Tensor, ...], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, ...]:
        """Representations of the momentum encoder, without gradient."""
        return self.encode(self.momentum_encoder.encoder, views, **kwargs)

    def contrast(
        self,
        features_1: torch.Tensor,
        features_2: torch.Tensor,
        momentum_features_1: torch.Tensor,
        momentum_features_2: torch.Tensor,
    ) -> MoCoV3ForPreTrainingOutput:
        """
        Projector, predictor and symmetric loss for the whole batch: the second half of the forward pass.

        Args:
            features_1, features_2 (`torch.Tensor` of shape `(B, D)`):
                Representations of both views from the trained encoder.
            momentum_features_1, momentum_features_2 (`torch.Tensor` of shape `(B, D)`):
                Representations of both views from the momentum encoder.
        """
        self.warn_without_momentum_updates()
        query_1 = self.predictor(self.projector(features_1))
        query_2 = self.predictor(self.projector(features_2))
        with torch.no_grad():
            key_1 = self.momentum_encoder.projector(momentum_features_1)
            key_2 = self.momentum_encoder.projector(momentum_features_2)

        direction_1 = contrastive_loss(query_1, key_2, self.config.temperature, self.even_batches)
        direction_2 = contrastive_loss(query_2, key_1, self.config.temperature, self.even_batches)
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


def check_batch(model: MoCoV3ForPreTraining, pixel_values: torch.Tensor | None) -> None:
    """
    Raises:
        ValueError: there are no images, or a single image in training, which batch normalization cannot handle.
    """
    if pixel_values is None:
        raise ValueError("You have to specify pixel_values")
    if model.training and len(pixel_values) * num_processes() < 2:
        raise ValueError(
            "MoCo v3 cannot train on a batch of 1: its batch normalization and its negatives need other images. Use a"
            " batch of at least 2, and of hundreds for useful representations"
        )


__all__ = ["MoCoV3ForPreTraining", "MoCoV3ForPreTrainingOutput", "ema_update_"]
