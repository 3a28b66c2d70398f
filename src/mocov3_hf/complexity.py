"""Multiply-adds of a forward pass, counted as the published tables of MoCo v3's models count them."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


# Operations per element of a normalisation's input in the figures published with mmpretrain.
LAYER_NORM_OPERATIONS = 5
BATCH_NORM_OPERATIONS = 2


def multiply_adds(model: PreTrainedModel, pixel_values: torch.Tensor) -> int:
    """
    Multiply-adds of `model(pixel_values)`: linear layers, convolutions and attention, and the operations of norms.

    Works on tensors without data too (meta, fake). Leaves the model in evaluation mode with eager attention, whose
    matrix products are counted on every device.
    """
    model.eval().set_attn_implementation("eager")
    norms = 0

    def count_norm(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal norms
        operations = LAYER_NORM_OPERATIONS if isinstance(module, nn.LayerNorm) else BATCH_NORM_OPERATIONS
        norms += operations * inputs[0].numel()

    hooks = [
        module.register_forward_hook(count_norm)
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))
    ]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2 + norms
