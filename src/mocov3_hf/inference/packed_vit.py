"""MoCo v3's ViT in bfloat16 on a CPU: packed weights, GELU inside the product, a softmax in one pass."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..model.modeling_mocov3_vit import MoCoV3ViTAttention, MoCoV3ViTMLP


# Legend of dimensions: B batch, L tokens, D width, M rows of a matrix product.

ATTENTION = "mocov3_one_pass"


class PackedLinear(nn.Module):
    """
    `nn.Linear` for inference with its weight in the order in which oneDNN reads it.

    Args:
        linear: on the CPU, in bfloat16.
        gelu: apply the exact GELU to the result.
        rows: M, the usual one; others work as well.
    """

    def __init__(self, linear: nn.Linear, rows: int, gelu: bool = False):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.activation = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.weight, self.bias, *self.activation)


def one_pass_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention of (B, heads, L, D / heads) to (B, L, heads, D / heads) with the softmax as exponential and quotient.

    The sum under the fraction is a column of ones beside the values. No maximum is subtracted: scores beyond ±88,
    which no trained model comes near, give NaN, which `Predictor` looks for.
    """
    weights = torch.matmul(query * scaling, key.transpose(2, 3)).exp_()
    summed = torch.matmul(weights, nn.functional.pad(value, (0, 1), value=1.0))
    context = summed[..., :-1] / summed[..., -1:]
    return context.transpose(1, 2), None


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's linear layers, which it uses itself for compiled models."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def pack(model: PreTrainedModel, batch_size: int) -> None:
    """
    Set up every block of a MoCo v3 ViT in eval mode, in bfloat16 on the CPU, in place.

    Args:
        model: with the ViT somewhere inside.
        batch_size: the usual one; others work as well.
    """
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, one_pass_attention)
    positions = next(weight for name, weight in model.named_parameters() if name.endswith("position_embeddings"))
    rows = batch_size * positions.shape[1]
    for layer in list(model.modules()):
        if isinstance(layer, MoCoV3ViTAttention):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer, name, PackedLinear(getattr(layer, name), rows))
        elif isinstance(layer, MoCoV3ViTMLP):
            gelu = is_exact_gelu(layer.activation_fn)
            layer.fc1, layer.fc2 = PackedLinear(layer.fc1, rows, gelu=gelu), PackedLinear(layer.fc2, rows)
            if gelu:
                layer.activation_fn = nn.Identity()
    model.set_attn_implementation(ATTENTION)


def is_exact_gelu(activation: nn.Module) -> bool:
    """Whether an activation is the GELU of the error function."""
    probe = torch.linspace(-4, 4, 33)
    return torch.equal(activation(probe), nn.functional.gelu(probe))
