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
"""The encoder of MoCo v3 around a vision backbone, as a feature extractor and an image classifier."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple

from .backbone_mocov3 import Pooling, backbone_class, build_backbone, masking_options
from .configuration_mocov3 import MoCoV3Config
from .modeling_mocov3_vit import MoCoV3ViTModel, freeze_fixed_parameters, init_torch_default


# Dimensions: B batch, C H W image, h w grid, L tokens, D size of the pooled output.


def zero_init_residual_norms(backbone: PreTrainedModel) -> None:
    """Initialize every residual block of a ResNet as the identity: the last normalization gets weight zero."""
    if backbone.config.model_type == "resnet":
        for stage in backbone.encoder.stages:
            for block in stage.layers:
                init.zeros_(block.layer[-1].normalization.weight)


def freeze_unused_parameters(model: nn.Module) -> None:
    """
    Freeze mask tokens and what else of a backbone does not contribute to the pooled output, such as a pooler that is
    not used. These parameters get no gradient, which is an error under DDP.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, MoCoV3Model):
            for name, parameter in module.backbone.named_parameters():
                if name in module.pooling.unused:
                    parameter.requires_grad_(False)


class BackboneFlag:
    """
    A class attribute of the backbone, such as `_supports_sdpa`, as an attribute of the models that contain it.

    The class itself has no backbone and returns the flag of MoCo v3's ViT.
    """

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, model: PreTrainedModel | None, owner: type) -> bool:
        backbone = MoCoV3ViTModel if model is None else backbone_class(model.config.backbone_config)
        return getattr(backbone, self.name)


@auto_docstring
class MoCoV3PreTrainedModel(PreTrainedModel):
    config: MoCoV3Config
    base_model_prefix = "mocov3"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False  # instances have the value of their backbone
    _no_split_modules = []  # noqa: RUF012 - those of the backbone are added at construction
    _supports_sdpa = BackboneFlag()
    _supports_flash_attn = BackboneFlag()
    _supports_flex_attn = BackboneFlag()
    _supports_attention_backend = BackboneFlag()

    def post_init(self):
        self.supports_gradient_checkpointing = self.base_model.backbone.supports_gradient_checkpointing
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Projector and predictor keep torch's initialization, as in the official code. Backbones have their own.
        if module is getattr(self, "classifier", None):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init_torch_default(module)
        else:
            super()._init_weights(module)

    def initialize_weights(self):
        # Runs at construction and after every `from_pretrained`, which sets `requires_grad` on all loaded tensors.
        # Loaded weights, and those that an inner model has initialized already, keep their values.
        fresh = [module for module in self.modules() if isinstance(module, MoCoV3Model) and not is_initialized(module)]
        super().initialize_weights()
        for module in fresh:
            if self.config.zero_init_residual:
                zero_init_residual_norms(module.backbone)
        for module in self.modules():
            if isinstance(module, MoCoV3Model):
                for name, parameter in module.backbone.named_parameters():
                    if name in module.fixed_parameters:
                        parameter.requires_grad_(False)
        freeze_unused_parameters(self)
        freeze_fixed_parameters(self)

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        backbone = self.base_model.backbone
        if getattr(backbone, "timm_model", None) is None:
            super()._set_gradient_checkpointing(enable, *args, **kwargs)
        else:  # timm has a switch of its own
            backbone._set_gradient_checkpointing(enable, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.input_embeddings_owner().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.input_embeddings_owner().set_input_embeddings(value)

    def input_embeddings_owner(self) -> "PreTrainedModel | FirstChildEmbeddings":
        """The backbone if it has accessors of its own. Convolutional backbones often have none."""
        backbone = self.base_model.backbone
        try:
            backbone.get_input_embeddings()
        except NotImplementedError:
            return FirstChildEmbeddings(backbone)
        return backbone


class FirstChildEmbeddings:
    """Accessors of input embeddings for a backbone without any: its first child, which is the stem."""

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
    The encoder of MoCo v3 without projector and predictor: a vision backbone. Its pooled output is the
    representation that MoCo v3 learns.
    """
)
class MoCoV3Model(MoCoV3PreTrainedModel):
    # Checkpoints of pre-training and of classifiers contain more than the encoder.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^projector\.",
        r"^predictor\.",
        r"^momentum_encoder\.",
        r"^classifier\.",
    ]

    def __init__(self, config: MoCoV3Config):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.pooling = Pooling(self.backbone, config.pooling)
        self.pooling.measure(self.backbone)
        # What the backbone itself keeps fixed, such as the position embeddings of ViT-MAE.
        self.fixed_parameters = frozenset(n for n, p in self.backbone.named_parameters() if not p.requires_grad)
        config.set_pooled_width(self.pooling.width)
        freeze_unused_parameters(self)  # on the meta device, `post_init` does not
        self.post_init()

    @property
    def pooled_width(self) -> int:
        """Size `D` of the pooled output."""
        return self.pooling.width

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Returns `last_hidden_state` in the layout of the backbone, `(B, L, D)` or `(B, D, h, w)`, and `pooler_output`
        `(B, D)`.

        Example:

        ```python
        >>> import torch
        >>> from mocov3_hf import MoCoV3Config, MoCoV3Model

        >>> backbone = {"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
        >>> model = MoCoV3Model(MoCoV3Config(backbone_config=backbone)).eval()
        >>> outputs = model(torch.randn(2, 3, 32, 32))
        >>> list(outputs.pooler_output.shape)
        [2, 16]
        ```
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:  # convolutional backbones do not have the argument
            kwargs["output_attentions"] = True
        kwargs.pop("return_dict", None)
        kwargs |= masking_options(self.backbone, pixel_values)
        outputs = self.backbone(pixel_values, output_hidden_states=output_hidden_states, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.get("last_hidden_state"),
            pooler_output=self.pooling(outputs),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


@auto_docstring(
    custom_intro="""
    The encoder of MoCo v3 with a linear classifier on its pooled output, for linear evaluation and fine-tuning.
    """
)
class MoCoV3ForImageClassification(MoCoV3PreTrainedModel):
    # A classifier starts from the encoder of a pre-training checkpoint and does not need the rest.
    _keys_to_ignore_on_load_unexpected = [r"^projector\.", r"^predictor\.", r"^momentum_encoder\."]  # noqa: RUF012

    def __init__(self, config: MoCoV3Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mocov3 = MoCoV3Model(config)
        self.classifier = nn.Linear(self.mocov3.pooled_width, config.num_labels)
        self.post_init()
        ignore_own_keys_only(self)

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

        Example:

        ```python
        >>> import torch
        >>> from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification

        >>> backbone = {"model_type": "mocov3_vit", "image_size": 32, "patch_size": 8, "hidden_size": 48}
        >>> model = MoCoV3ForImageClassification(MoCoV3Config(backbone_config=backbone, num_labels=10))
        >>> outputs = model(torch.randn(2, 3, 32, 32), labels=torch.tensor([3, 7]))
        >>> list(outputs.logits.shape)
        [2, 10]
        >>> outputs.loss.backward()
        ```
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


def ignore_own_keys_only(model: PreTrainedModel) -> None:
    """
    Undo that `post_init` copies the ignored keys of the inner encoder: what the encoder can ignore may be a weight of
    the whole model.
    """
    model._keys_to_ignore_on_load_unexpected = set(type(model)._keys_to_ignore_on_load_unexpected or ())


__all__ = ["MoCoV3ForImageClassification", "MoCoV3Model", "MoCoV3PreTrainedModel"]
