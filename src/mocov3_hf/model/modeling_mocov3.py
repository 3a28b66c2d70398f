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
"""MoCo v3's encoder on any vision backbone, as a feature extractor, a multi-scale backbone and a classifier."""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple

from .configuration_mocov3 import MoCoV3Config, MoCoV3ViTConfig, to_pair
from .modeling_mocov3_vit import MoCoV3ViTModel, freeze_fixed_parameters, init_torch_default


# Legend of dimensions: B batch, C H W image, h w grid, L tokens, D width of the pooled vector.


def build_backbone(config: MoCoV3Config) -> PreTrainedModel:
    """The model of `config.backbone_config`, with fresh weights."""
    # By name: as remote code the file of the configuration can be loaded twice, and its classes then differ.
    if config.backbone_config.model_type == MoCoV3ViTConfig.model_type:
        return MoCoV3ViTModel(config.backbone_config)
    return AutoModel.from_config(config.backbone_config)


def pooled_width(backbone: PreTrainedModel) -> int:
    """
    Width of the pooled vector of a built backbone.

    Raises:
        ValueError: the backbone tells no width.
    """
    timm_model = getattr(backbone, "timm_model", None)
    if timm_model is not None:
        return timm_model.num_features
    config = backbone.config
    hidden_sizes = getattr(config, "hidden_sizes", None)
    width = hidden_sizes[-1] if hidden_sizes else getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(
            f"a backbone of model type {config.model_type!r} tells neither hidden_size nor hidden_sizes: its pooled"
            " vector has an unknown width"
        )
    return width


def zero_init_residual_norms(backbone: PreTrainedModel) -> None:
    """Start every residual block of a ResNet as the identity: the weight of its last normalisation is zero."""
    if backbone.config.model_type == "resnet":
        for stage in backbone.encoder.stages:
            for block in stage.layers:
                init.zeros_(block.layer[-1].normalization.weight)


def freeze_unused_parameters(backbone: PreTrainedModel) -> None:
    """Take the gradient off a mask token: without masks it gets none, which DDP refuses."""
    for name, parameter in backbone.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)


@auto_docstring
class MoCoV3PreTrainedModel(PreTrainedModel):
    config: MoCoV3Config
    base_model_prefix = "mocov3"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # An instance has its backbone's value: whether it can recompute activations is not known from the class.
    supports_gradient_checkpointing = False
    _no_split_modules = []  # noqa: RUF012 - the backbone's are added at construction
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        # The layers of projector and predictor start as torch starts them (official code), the backbone as it likes.
        if module is getattr(self, "classifier", None):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init_torch_default(module)
        else:
            super()._init_weights(module)

    def initialize_weights(self):
        # Runs at construction and after every load, which makes all it loads trainable. What a load has filled in
        # keeps its values; so does what an inner model has initialised already.
        fresh = [module for module in self.modules() if isinstance(module, MoCoV3Model) and not is_initialized(module)]
        super().initialize_weights()
        for module in fresh:
            if self.config.zero_init_residual:
                zero_init_residual_norms(module.backbone)
        for module in self.modules():
            if isinstance(module, MoCoV3Model):
                freeze_unused_parameters(module.backbone)
        freeze_fixed_parameters(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.input_embeddings_owner().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.input_embeddings_owner().set_input_embeddings(value)

    def input_embeddings_owner(self) -> "PreTrainedModel | FirstChildEmbeddings":
        """The backbone where it has accessors of its own; a convolutional one often has none."""
        backbone = self.base_model.backbone
        try:
            backbone.get_input_embeddings()
        except NotImplementedError:
            return FirstChildEmbeddings(backbone)
        return backbone

    def get_output_embeddings(self) -> None:
        return None


class FirstChildEmbeddings:
    """Accessors of input embeddings for a backbone without: its first child, which is the stem everywhere."""

    def __init__(self, backbone: PreTrainedModel):
        self.backbone = backbone
        self.name = next(name for name, _ in backbone.named_children())

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.backbone, self.name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.backbone, self.name, value)


def is_initialized(module: nn.Module) -> bool:
    return getattr(module, "_is_hf_initialized", False)


@auto_docstring(
    custom_intro="""
    The encoder of MoCo v3 without heads: any vision backbone, whose pooled vector is the feature that MoCo v3 trains.
    """
)
class MoCoV3Model(MoCoV3PreTrainedModel):
    # Checkpoints of pre-training and of classifiers hold more than the encoder.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^projector\.",
        r"^predictor\.",
        r"^momentum_encoder\.",
        r"^classifier\.",
    ]

    def __init__(self, config: MoCoV3Config):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        freeze_unused_parameters(self.backbone)
        self.post_init()

    @property
    def pooled_width(self) -> int:
        """Width `D` of the pooled vector."""
        return pooled_width(self.backbone)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        pooled_query_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        pooled_query_only (`bool`, *optional*, defaults to `False`):
            A promise that only `pooler_output` is read. MoCo v3's own ViT then computes its last block for the CLS
            token alone and gives no `last_hidden_state`; other backbones take no notice.

        Returns `last_hidden_state` as the backbone gives it, `(B, L, D)` or `(B, D, h, w)`, and `pooler_output`
        `(B, D)`.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:  # a convolutional backbone does not know the argument
            kwargs["output_attentions"] = True
        if pooled_query_only and self.backbone.config.model_type == MoCoV3ViTConfig.model_type:
            kwargs["pooled_query_only"] = True
        kwargs.pop("return_dict", None)
        outputs = self.backbone(pixel_values, output_hidden_states=output_hidden_states, return_dict=True, **kwargs)
        pooled = outputs.get("pooler_output")
        if pooled is None:
            raise ValueError(
                f"a backbone of model type {self.backbone.config.model_type!r} gives no pooled vector (pooler_output)"
            )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.get("last_hidden_state"),
            pooler_output=pooled.flatten(1),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


@auto_docstring(
    custom_intro="""
    The encoder of MoCo v3 with a linear classification head on its pooled vector, for linear evaluation and
    fine-tuning.
    """
)
class MoCoV3ForImageClassification(MoCoV3PreTrainedModel):
    def __init__(self, config: MoCoV3Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mocov3 = MoCoV3Model(config)
        self.supports_gradient_checkpointing = self.mocov3.supports_gradient_checkpointing
        self.classifier = nn.Linear(self.mocov3.pooled_width, config.num_labels)
        self.post_init()
        report_all_unexpected_keys(self)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(B,)`, *optional*):
            Classes in `[0, config.num_labels - 1]`, for the loss.
        """
        outputs = self.mocov3(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def report_all_unexpected_keys(model: PreTrainedModel) -> None:
    """Undo what `post_init` takes over from the inner encoder: a whole model has no keys to pass over in silence."""
    model._keys_to_ignore_on_load_unexpected = set(type(model)._keys_to_ignore_on_load_unexpected or ())


@auto_docstring(
    custom_intro="""
    The encoder of MoCo v3 as a backbone of detection and segmentation models: feature maps of the stages in
    `config.out_features`.
    """
)
class MoCoV3Backbone(BackboneMixin, MoCoV3PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = MoCoV3Model._keys_to_ignore_on_load_unexpected

    def __init__(self, config: MoCoV3Config):
        super().__init__(config)
        self.mocov3 = MoCoV3Model(config)
        self.supports_gradient_checkpointing = self.mocov3.supports_gradient_checkpointing
        self.num_features = stage_widths(self.mocov3.backbone, len(self.stage_names))
        self.post_init()

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
        Returns `feature_maps`, one `(B, width, h, w)` for each of `config.out_features`. Those of MoCo v3's ViT pass
        through its final norm.
        """
        outputs = self.mocov3(pixel_values, output_hidden_states=True, output_attentions=output_attentions, **kwargs)
        feature_maps = tuple(
            self.feature_map(hidden_state, pixel_values)
            for stage, hidden_state in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def feature_map(self, hidden_state: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, width, h, w)` from a hidden state that is already so, or from tokens `(B, L, width)`."""
        if hidden_state.dim() == 4:
            return hidden_state
        layernorm = getattr(self.mocov3.backbone, "layernorm", None)
        if layernorm is not None and not hasattr(self.config.backbone_config, "depths"):
            hidden_state = layernorm(hidden_state)
        grid = token_grid(hidden_state, pixel_values, self.config.backbone_config)
        patches = hidden_state[:, hidden_state.shape[1] - grid[0] * grid[1] :]
        return patches.transpose(1, 2).unflatten(2, grid).contiguous()


def token_grid(hidden_state: torch.Tensor, pixel_values: torch.Tensor, config: MoCoV3Config) -> tuple[int, int]:
    """Grid `(h, w)` of the patch tokens: a columnar model keeps the first, a staged one halves it."""
    height, width = (
        size // patch for size, patch in zip(pixel_values.shape[-2:], to_pair(config.patch_size), strict=True)
    )
    while height * width > hidden_state.shape[1]:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def stage_widths(backbone: PreTrainedModel, num_stages: int) -> list[int]:
    """Width of every hidden state, the stem's first."""
    config = backbone.config
    if (embed_dim := getattr(config, "embed_dim", None)) is not None:  # Swin: its hidden states follow the merging
        widths = [embed_dim * 2**index for index in range(num_stages - 1)]
        return [widths[0], *widths[1:], widths[-1]]
    if (hidden_sizes := getattr(config, "hidden_sizes", None)) is not None:
        return [getattr(config, "embedding_size", hidden_sizes[0]), *hidden_sizes]
    return [pooled_width(backbone)] * num_stages


__all__ = ["MoCoV3Backbone", "MoCoV3ForImageClassification", "MoCoV3Model", "MoCoV3PreTrainedModel"]
