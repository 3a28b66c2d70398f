"""What a recipe will cost, found without running it: parameters, multiply-adds, memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..complexity import multiply_adds
from ..model.configuration_mocov3 import MoCoV3Config
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from .acceleration import Acceleration, accelerate_model
from .sharding import unit_parameters


BYTES_FLOAT32, BYTES_HALF = 4, 2
# Two AdamW moments, or one LARS momentum, per trained parameter.
OPTIMIZER_STATES = {"adamw": 2, "lars": 1}


@dataclass(frozen=True)
class Estimate:
    """Counts are of the whole pre-training model; `backbone_macs` are multiply-adds of one image's forward pass."""

    num_parameters: int
    num_trained_parameters: int
    num_backbone_parameters: int
    backbone_macs: int
    weight_bytes: int
    activation_bytes: int
    view_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.view_bytes


def estimate(
    config: MoCoV3Config,
    image_size: int,
    batch_size: int,
    optimizer: str,
    mixed_precision: str,
    chunk_size: int | None = None,
    acceleration: Acceleration | None = None,
    num_processes: int = 1,
) -> Estimate:
    """
    Count parameters, multiply-adds and bytes of a training step on tensors without data.

    With a `chunk_size` activations are those of one chunk in the backbone, or of the whole batch in the heads, the
    larger of the two. With an `acceleration` they are those of the model set up so, compilation apart.

    Weights, gradients and optimizer state that are spread over `num_processes` (the `acceleration` says so) count as
    this process's share, with two units gathered, one of them with its gradients.

    Memory is that of float32 weights, gradients, optimizer state, both views of `batch_size` images and the
    activations that autograd saves for them; allocator overhead and temporary buffers come on top.
    """
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(config)
    if acceleration is not None:
        accelerate_model(model, replace(acceleration, torch_compile=False))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # shapes only, but the operators of a real device
        views = [torch.zeros(batch_size, 3, image_size, image_size) for _ in range(2)]
        if chunk_size is None:
            activation_bytes = saved_bytes(lambda: model(*views), model, mixed_precision)
        else:
            chunk, features = views[0][:chunk_size], torch.zeros(batch_size, model.mocov3.pooled_width)
            leaf = features.clone().requires_grad_()
            activation_bytes = max(
                saved_bytes(lambda: model.encode(model.mocov3, (chunk,)), model, mixed_precision),
                saved_bytes(lambda: model.contrast(leaf, leaf, features, features), model, mixed_precision),
            )
        if acceleration is not None and acceleration.gradient_checkpointing and mixed_precision != "no":
            activation_bytes += cast_bytes(model.mocov3)
        macs = multiply_adds(model.mocov3, views[0][:1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in trained)
    num_states = num_parameters + num_trained * (1 + OPTIMIZER_STATES[optimizer])
    if acceleration is not None and acceleration.fsdp:
        num_states = math.ceil(num_states / num_processes) + 3 * largest_unit(model)
    return Estimate(
        num_parameters=num_parameters,
        num_trained_parameters=num_trained,
        num_backbone_parameters=sum(parameter.numel() for parameter in model.mocov3.parameters()),
        backbone_macs=macs,
        weight_bytes=BYTES_FLOAT32 * num_states,
        activation_bytes=activation_bytes,
        view_bytes=BYTES_FLOAT32 * 2 * views[0].numel(),
    )


def cast_bytes(encoder: nn.Module) -> int:
    """
    Copies of an encoder's trained matrices in half precision, which autocast keeps until the forward pass is over.
    Where nothing is recomputed, autograd keeps them anyway.
    """
    return BYTES_HALF * sum(p.numel() for p in encoder.parameters() if p.requires_grad and p.ndim > 1)


def largest_unit(model: MoCoV3ForPreTraining) -> int:
    """Parameters of the largest part that FSDP2 gathers at once."""
    return max(sum(parameter.numel() for parameter in parameters) for _, parameters in unit_parameters(model, model))


def saved_bytes(forward: Callable[[], object], model: MoCoV3ForPreTraining, mixed_precision: str) -> int:
    """Bytes of everything autograd keeps after `forward()`, weights apart; shared storage counts once."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage, storage.nbytes())  # holding the storage keeps its address taken
        return tensor

    # Half precision has the same width whichever it is; bfloat16 is the one that autocast offers on every device.
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed_precision != "no")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        forward()
    return sum(size for _, size in kept.values())
