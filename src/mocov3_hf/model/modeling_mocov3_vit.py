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

import itertools
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

from .configuration_mocov3 import MoCoV3ViTConfig, to_pair


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
        queries = hidden_states if num_queries is None else hidden_states[:, :num_queries]
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
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MoCoV3ViTMLP(config)
        self.drop_path = MoCoV3ViTDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        attended, _ = self.attention(self.norm1(hidden_states), num_queries=num_queries, **kwargs)
        if num_queries is not None:
            hidden_states = hidden_states[:, :num_queries]
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))


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


def freeze_fixed_parameters(module: nn.Module) -> None:
    """Freeze the sine-cosine table and the fixed patch projection of every MoCo v3 ViT inside `module`."""
    for embeddings in module.modules():
        if isinstance(embeddings, MoCoV3ViTEmbeddings):
            config = embeddings.config
            if config.position_embedding == "sincos2d":
                embeddings.position_embeddings.requires_grad_(False)
            if config.stem == "patch" and config.freeze_patch_projection:
                embeddings.patch_embeddings.requires_grad_(False)


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
