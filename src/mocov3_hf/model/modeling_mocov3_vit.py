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
"""The Vision Transformer of MoCo v3: fixed sine-cosine positions, and a frozen patch projection or a conv stem."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .batchnorm_mocov3 import MoCoV3TokenBatchNorm
from .configuration_mocov3_vit import MoCoV3ViTConfig
from .modeling_mocov3_vit_embeddings import MoCoV3ViTEmbeddings, freeze_fixed_parameters, sincos_position_embedding


# Dimensions: B batch, L tokens with the CLS token first, D hidden size.


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention as matrix products, with the softmax in float32 or, for float64 inputs, in float64.

    Args:
        module (`nn.Module`):
            The attention module. Dropout is active if it is in training mode.
        query (`torch.Tensor` of shape `(B, heads, queries, D / heads)`):
            Queries.
        key, value (`torch.Tensor` of shape `(B, heads, L, D / heads)`):
            Keys and values.
        attention_mask (`torch.Tensor`, *optional*):
            Added to the scores.
        scaling (`float`, *optional*, defaults to `(D / heads) ** -0.5`):
            Factor of the scores.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout rate of the attention weights.

    Returns:
        The output `(B, queries, heads, D / heads)` and the attention weights `(B, heads, queries, L)`.
    """
    if scaling is None:
        scaling = query.size(-1) ** -0.5
    # Scaling the queries is cheaper than scaling the scores.
    attn_weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    softmax_dtype = torch.promote_types(attn_weights.dtype, torch.float32)
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=softmax_dtype).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value)
    return attn_output.transpose(1, 2).contiguous(), attn_weights


def first_tokens(hidden_states: torch.Tensor, number: int | None) -> torch.Tensor:
    """The first `number` tokens of `(B, L, D)`, or all if it is `None`."""
    return hidden_states if number is None else hidden_states[:, :number]


class MoCoV3ViTAttention(nn.Module):
    """
    Multi-head self-attention, `(B, L, D)` to `(B, L, D)`. With `num_queries`, only the first `num_queries` tokens
    attend to all tokens, and the output is `(B, num_queries, D)`.
    """

    def __init__(self, config: MoCoV3ViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        queries = first_tokens(hidden_states, num_queries)
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, tokens in (
                (self.q_proj, queries),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(attn_output.flatten(-2)), attn_weights


class MoCoV3ViTMLP(nn.Module):
    def __init__(self, config: MoCoV3ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.activation_fn(self.fc1(hidden_states))))


class MoCoV3ViTDropPath(nn.Module):
    """Stochastic depth per image (Huang et al. 2016): drops residual branches and rescales the remaining ones."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        kept = hidden_states.new_empty(len(hidden_states), 1, 1).bernoulli_(1 - self.rate)
        return hidden_states * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def build_mlp_norm(config: MoCoV3ViTConfig) -> nn.Module:
    """The normalization before an MLP; eps and momentum of batch normalization are torch's, as in the heads."""
    if config.mlp_norm == "batch_norm":
        return MoCoV3TokenBatchNorm(config.hidden_size)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class MoCoV3ViTLayer(GradientCheckpointingLayer):
    """
    A pre-norm transformer block, `(B, L, D)` to `(B, L, D)`. With `num_queries`, it returns only the first
    `num_queries` tokens, `(B, num_queries, D)`, with the same values.
    """

    def __init__(self, config: MoCoV3ViTConfig, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = MoCoV3ViTAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm2 = build_mlp_norm(config)
        self.mlp = MoCoV3ViTMLP(config)
        self.drop_path = MoCoV3ViTDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        # In training, the statistics of batch normalization need all tokens, and only the MLP can leave some out.
        needs_all = self.norm2.training and isinstance(self.norm2, MoCoV3TokenBatchNorm)
        num_attending = None if needs_all else num_queries
        attended, _ = self.attention(self.norm1(hidden_states), num_queries=num_attending, **kwargs)
        hidden_states = first_tokens(hidden_states, num_attending) + self.drop_path(self.dropout(attended))
        normalized = first_tokens(self.norm2(hidden_states), num_queries)
        return first_tokens(hidden_states, num_queries) + self.drop_path(self.mlp(normalized))


@auto_docstring
class MoCoV3ViTPreTrainedModel(PreTrainedModel):
    config: MoCoV3ViTConfig
    base_model_prefix = "mocov3_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoCoV3ViTEmbeddings", "MoCoV3ViTLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MoCoV3ViTLayer, "attentions": MoCoV3ViTAttention}  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialization of the official code (`vits.py`). The convolutional stem keeps torch's defaults."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init_torch_default(module)
        elif isinstance(module, MoCoV3ViTEmbeddings):
            init.normal_(module.cls_token, std=1e-6)
            if self.config.position_embedding == "sincos2d":
                table = sincos_position_embedding(self.config.hidden_size, module.grid)
                init.copy_(module.position_embeddings, table.to(module.position_embeddings))
            else:
                init.normal_(module.position_embeddings, std=0.02)
            if self.config.stem == "patch":
                projection = module.patch_embeddings.projection
                fan_in = projection.weight[0].numel()
                bound = math.sqrt(6.0 / (fan_in + self.config.hidden_size))
                init.uniform_(projection.weight, -bound, bound)
                init.zeros_(projection.bias)
        else:
            super()._init_weights(module)

    def initialize_weights(self):
        # Runs at construction and after every `from_pretrained`, which sets `requires_grad` on all loaded tensors.
        super().initialize_weights()
        freeze_fixed_parameters(self)


def init_torch_default(layer: nn.Linear | nn.Conv2d) -> None:
    """Initialize the parameters that were not loaded as torch initializes the layer."""
    init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        init.uniform_(layer.bias, -bound, bound)


class MoCoV3ViTEncoder(MoCoV3ViTPreTrainedModel):
    def __init__(self, config: MoCoV3ViTConfig):
        super().__init__(config)
        steps = max(config.num_hidden_layers - 1, 1)
        rates = [config.drop_path_rate * index / steps for index in range(config.num_hidden_layers)]
        self.layer = nn.ModuleList(MoCoV3ViTLayer(config, rate) for rate in rates)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        r"""
        num_queries (`int`, *optional*):
            Number of tokens that the last layer returns, counted from the first. By default all.
        """
        last = len(self.layer) - 1
        for index, layer in enumerate(self.layer):
            hidden_states = layer(hidden_states, num_queries=num_queries if index == last else None, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


def asks_for_more(config: MoCoV3ViTConfig, kwargs: dict) -> bool:
    """Whether the arguments, or by default the configuration, request hidden states or attention weights."""
    return any(
        getattr(config, name) if kwargs.get(name) is None else kwargs[name]
        for name in ("output_hidden_states", "output_attentions")
    )


@auto_docstring(custom_intro="The bare ViT of MoCo v3. Its pooled output is the CLS token after the final LayerNorm.")
class MoCoV3ViTModel(MoCoV3ViTPreTrainedModel):
    # Set this to `True` to speed up code that reads `pooler_output` only: the last layer then computes the CLS token
    # alone (7 % fewer multiply-adds for ViT-S), `pooler_output` keeps its value, and `last_hidden_state` is `None`. It
    # has no effect on calls that request hidden states or attention weights.
    pooled_query_only = False

    def __init__(self, config: MoCoV3ViTConfig):
        super().__init__(config)
        self.embeddings = MoCoV3ViTEmbeddings(config)
        self.encoder = MoCoV3ViTEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        freeze_fixed_parameters(self)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.patch_embeddings = value

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from mocov3_hf import MoCoV3ViTConfig, MoCoV3ViTModel

        >>> config = MoCoV3ViTConfig(
        ...     image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model = MoCoV3ViTModel(config).eval()
        >>> outputs = model(torch.randn(2, 3, 32, 32))
        >>> list(outputs.last_hidden_state.shape)  # the CLS token and 4 x 4 patches
        [2, 17, 32]
        >>> list(outputs.pooler_output.shape)
        [2, 32]
        ```
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        pooled_query_only = self.pooled_query_only and not asks_for_more(self.config, kwargs)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        encoded: BaseModelOutput = self.encoder(hidden_states, num_queries=1 if pooled_query_only else None, **kwargs)
        last_hidden_state = self.layernorm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_query_only else last_hidden_state,
            pooler_output=last_hidden_state[:, 0],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


__all__ = ["MoCoV3ViTModel", "MoCoV3ViTPreTrainedModel"]
