"""Candidates for a faster step on a GPU: off in every run, until a measurement there keeps or removes each.

benchmarks/step_gpu.py sets them by their fields of `HardwareSettings`; tests/pretraining/test_step_candidates.py
compares each with the plain step. docs/LOG.md has the reasons for their form.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining


# An `attn_implementation`: SDPA, by the first of these that takes the tensors.
CUDNN_ATTENTION = "sdpa_cudnn"
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
Batch, Views = TypeVar("Batch"), tuple[torch.Tensor, torch.Tensor]


def cudnn_attention_forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    with sdpa_kernel(KERNELS, set_priority=True):
        return sdpa_attention_forward(*args, **kwargs)


def register_attention() -> None:
    AttentionInterface.register(CUDNN_ATTENTION, cudnn_attention_forward)


def copy_features(model: MoCoV3ForPreTraining) -> None:
    """Copy the encoders' outputs, in place: the next replay of a CUDA graph overwrites them."""
    encode = model.encode

    def copied(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(features.clone() for features in encode(*args, **kwargs))

    model.encode = copied


def change_momentum_forward(model: MoCoV3ForPreTraining, low_precision: bool, inference_mode: bool) -> None:
    """
    Change how the features of the momentum encoder are computed, in place; its weights stay as they are.

    Args:
        model: The model, after its encoders were compiled.
        low_precision: Whether to use copies of the weights in the dtype of autocast, which then has nothing to cast.
        inference_mode: Whether autograd does not track tensors at all. Its tensors cannot be saved for a backward
            pass; those that the loss uses come from the projector, which runs outside of it.
    """
    momentum_features = model.momentum_features
    weights = LowPrecisionWeights(model.momentum_encoder.encoder) if low_precision else None

    def changed(views: tuple[torch.Tensor, ...], **kwargs: Any) -> tuple[torch.Tensor, ...]:
        in_place = nullcontext() if weights is None else weights.in_place(views[0].device.type)
        with in_place, torch.inference_mode(inference_mode):
            return momentum_features(views, **kwargs)

    model.momentum_features = changed


class LowPrecisionWeights:
    """Copies of the weights that autocast casts, made again whenever the weights have changed."""

    def __init__(self, module: nn.Module):
        layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        self.places = [(layer, name) for layer in layers for name, _ in layer.named_parameters(recurse=False)]
        self.copies: list[nn.Parameter] = []
        self.versions: list[int] = []

    @contextmanager
    def in_place(self, device_type: str) -> Iterator[None]:
        """The copies in place of the weights; without autocast, the weights."""
        if not torch.is_autocast_enabled(device_type):
            yield
            return
        weights = [getattr(layer, name) for layer, name in self.places]
        self.refresh(weights, torch.get_autocast_dtype(device_type))
        self.put(self.copies)
        try:
            yield
        finally:
            self.put(weights)

    @torch.no_grad()
    def refresh(self, weights: list[nn.Parameter], dtype: torch.dtype) -> None:
        if not self.copies:
            self.copies = [nn.Parameter(weight.to(dtype), requires_grad=False) for weight in weights]
        versions = [weight._version for weight in weights]
        if versions != self.versions:
            torch._foreach_copy_(self.copies, weights)
            self.versions = versions

    def put(self, parameters: list[nn.Parameter]) -> None:
        for (layer, name), parameter in zip(self.places, parameters, strict=True):
            setattr(layer, name, parameter)


def one_batch_ahead(
    augment: Callable[[Batch], Views], batches: Iterable[Batch], device: torch.device
) -> Iterator[Views]:
    """
    Like `map(augment, batches)`, with the next batch taken and augmented before the current one is returned.

    On a GPU, loader, copy and augmentation of the next batch use a stream of their own beside the step of the current
    one: with pinned batches this is a double buffer. Elsewhere, they run at once. Order and values are those of `map`,
    and so is a resumed run: a batch that was taken in advance is made again.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))
    batches = iter(batches)

    def start() -> tuple[Views, torch.cuda.Event | None] | None:
        with torch.cuda.stream(side):  # no stream, no effect
            for batch in batches:
                return augment(batch), None if side is None else side.record_event()
        return None

    following = start()
    while following is not None:
        (views, ready), following = following, start()
        if ready is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            for view in views:
                view.record_stream(current)
        yield views
