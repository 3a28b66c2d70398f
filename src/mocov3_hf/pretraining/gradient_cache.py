"""Batches larger than memory: the backbone in chunks, heads and loss on the whole batch (Gao et al. 2021).

InfoNCE needs the features of all images at once, but a backbone without batch normalization processes each image by
itself. So features are computed chunk by chunk without keeping activations, the loss is computed on all of them, and
the gradient of each chunk's features is then propagated through the backbone. The result is that of the plain step on
the whole batch; the cost is one more forward pass of the backbone.
"""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining, MoCoV3ForPreTrainingOutput
from ..reporting import UsageError


def check_chunkable(model: MoCoV3ForPreTraining) -> None:
    """
    Raises:
        UsageError: a backbone with batch normalization, which would see other statistics in a chunk than in the batch.
    """
    kinds = batch_norms_of(model)
    if kinds:
        raise UsageError(
            f"--gradient_cache_chunk_size cannot be used with {', '.join(sorted(kinds))} in the backbone: it would"
            " normalize a chunk by its own statistics, not the batch's. Use a backbone with LayerNorm or a smaller"
            " batch"
        )


def batch_norms_of(model: MoCoV3ForPreTraining) -> set[str]:
    """Kinds of batch normalization in the backbone."""
    return {type(m).__name__ for m in model.mocov3.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def cached_backward(
    model: MoCoV3ForPreTraining,
    views: tuple[torch.Tensor, torch.Tensor],
    chunk_size: int,
    accelerator: Accelerator,
) -> MoCoV3ForPreTrainingOutput:
    """
    Loss of the whole batch and its gradient, averaged over the processes, with the activations of one chunk.

    Args:
        model: The model itself, not wrapped for distribution.
        views: Both views, each `(B, C, H, W)`.
        chunk_size: Images per pass of the backbone.
        accelerator: Precision and processes.

    Returns:
        The output of the plain forward pass, after the backward pass of its loss.
    """
    generator_states: list[list[dict]] = [[], []]
    with torch.no_grad(), accelerator.autocast():
        features = [
            torch.cat([encode(model, chunk, generator_states[view]) for chunk in pixels.split(chunk_size)])
            for view, pixels in enumerate(views)
        ]
        momentum_features = [
            torch.cat([model.momentum_features((chunk,))[0] for chunk in pixels.split(chunk_size)]) for pixels in views
        ]
    features = [feature.detach().requires_grad_() for feature in features]
    with accelerator.autocast():
        output = model.contrast(*features, *momentum_features)
    accelerator.backward(output.loss)

    for view, pixels in enumerate(views):
        gradients = features[view].grad.split(chunk_size)
        for chunk, gradient, state in zip(pixels.split(chunk_size), gradients, generator_states[view], strict=True):
            with Replayed(state), accelerator.autocast():
                (chunk_features,) = model.encode(model.mocov3, (chunk,))
            # The gradient includes the scale of fp16.
            torch.autograd.backward(chunk_features, gradient.to(chunk_features.dtype))
    average_gradients(model)
    return output


def encode(model: MoCoV3ForPreTraining, pixel_values: torch.Tensor, states: list[dict]) -> torch.Tensor:
    """Features of a chunk; the state of the random number generators before it is appended to `states`."""
    states.append(generator_state(pixel_values.device.type))
    return model.encode(model.mocov3, (pixel_values,))[0]


def generator_state(device_type: str) -> dict[str, torch.Tensor]:
    """States of the random number generators that a forward pass on a device draws from, by type of device."""
    return {name: generator_of(name).get_rng_state() for name in {"cpu", device_type}}


def generator_of(device_type: str) -> Any:
    """The module with `get_rng_state` and `set_rng_state` of a device."""
    return torch if device_type == "cpu" else torch.get_device_module(device_type)


class Replayed:
    """Draw the random numbers of an earlier pass again, and restore the generators afterwards."""

    def __init__(self, state: dict):
        self.state = state

    def __enter__(self) -> None:
        self.before = {name: generator_of(name).get_rng_state() for name in self.state}
        set_generator_state(self.state)

    def __exit__(self, *_) -> None:
        set_generator_state(self.before)


def set_generator_state(state: dict[str, torch.Tensor]) -> None:
    for name, values in state.items():
        generator_of(name).set_rng_state(values)


def average_gradients(model: nn.Module) -> None:
    """Mean of the gradients over all processes, in one all-reduce for all tensors of a dtype."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for dtype in {gradient.dtype for gradient in gradients}:
        group = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(group, flat.split([gradient.numel() for gradient in group]), strict=True):
            gradient.copy_(mean.view_as(gradient))
