"""What a recipe will cost, found without running it: parameters, multiply-adds, memory."""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..complexity import multiply_adds
from ..model.configuration_mocov3 import MoCoV3Config
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining


BYTES_FLOAT32 = 4
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

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


def estimate(config: MoCoV3Config, image_size: int, batch_size: int, optimizer: str, mixed_precision: str) -> Estimate:
    """
    Count parameters, multiply-adds and bytes of a training step on tensors without data.

    Memory is that of float32 weights, gradients, optimizer state and the activations that autograd saves for a batch
    of `batch_size` images (two views); allocator overhead and temporary buffers come on top.
    """
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # shapes only, but the operators of a real device
        views = [torch.zeros(batch_size, 3, image_size, image_size) for _ in range(2)]
        activation_bytes = saved_bytes(model, views, mixed_precision)
        macs = multiply_adds(model.mocov3, views[0][:1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in trained)
    return Estimate(
        num_parameters=num_parameters,
        num_trained_parameters=num_trained,
        num_backbone_parameters=sum(parameter.numel() for parameter in model.mocov3.parameters()),
        backbone_macs=macs,
        weight_bytes=BYTES_FLOAT32 * (num_parameters + num_trained * (1 + OPTIMIZER_STATES[optimizer])),
        activation_bytes=activation_bytes,
    )


def saved_bytes(model: MoCoV3ForPreTraining, views: list[torch.Tensor], mixed_precision: str) -> int:
    """Bytes of everything autograd keeps between forward and backward, weights apart; shared storage counts once."""
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
        output = model(pixel_values=views[0], pixel_values_2=views[1])
        del output
    return sum(size for _, size in kept.values())
