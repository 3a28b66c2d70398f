"""What a recipe costs, without running it: parameters, multiply-adds, memory, and communication between processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..model.batchnorm_mocov3 import GlobalBatchNorm
from ..model.configuration_mocov3 import MoCoV3Config
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from .hardware import HardwareSettings, set_up_model


BYTES_FLOAT32, BYTES_HALF = 4, 2
# Two AdamW moments, or one LARS momentum, per trained parameter.
OPTIMIZER_STATES = {"adamw": 2, "lars": 1}
# Operations per element of a normalization's input in the numbers published with mmpretrain.
LAYER_NORM_OPERATIONS, BATCH_NORM_OPERATIONS = 5, 2
NUM_VIEWS = 2


@dataclass(frozen=True)
class Estimate:
    """Counts of the whole pre-training model; `backbone_macs` are multiply-adds of a forward pass of one image."""

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
    settings: HardwareSettings | None = None,
) -> Estimate:
    """
    Count parameters, multiply-adds and bytes of a training step on tensors without data.

    Memory is that of float32 weights, gradients and optimizer state, both views of `batch_size` images, and the
    activations that autograd saves for them; allocator overhead and temporary buffers come on top. With a `chunk_size`
    activations are those of one chunk in the backbone or of the whole batch in the heads, whichever is larger. With
    `settings` they are those of the model set up that way, compilation apart.
    """
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(config)
    if settings is not None:
        set_up_model(model, replace(settings, torch_compile=False))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # shapes only, but the operators of a real device
        channels = config.num_channels or 3
        views = [torch.zeros(batch_size, channels, image_size, image_size) for _ in range(NUM_VIEWS)]
        if chunk_size is None:
            activation_bytes = saved_bytes(lambda: model(*views), model, mixed_precision)
        else:
            chunk, features = views[0][:chunk_size], torch.zeros(batch_size, model.mocov3.pooled_width)
            leaf = features.clone().requires_grad_()
            activation_bytes = max(
                saved_bytes(lambda: model.encode(model.mocov3, (chunk,)), model, mixed_precision),
                saved_bytes(lambda: model.contrast(leaf, leaf, features, features), model, mixed_precision),
            )
        if settings is not None and settings.gradient_checkpointing and mixed_precision != "no":
            activation_bytes += cast_bytes(model.mocov3)
        macs = multiply_adds(model.mocov3, views[0][:1])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Estimate(
        num_parameters=num_parameters,
        num_trained_parameters=num_trained,
        num_backbone_parameters=sum(parameter.numel() for parameter in model.mocov3.parameters()),
        backbone_macs=macs,
        weight_bytes=BYTES_FLOAT32 * (num_parameters + num_trained * (1 + OPTIMIZER_STATES[optimizer])),
        activation_bytes=activation_bytes,
        view_bytes=BYTES_FLOAT32 * NUM_VIEWS * views[0].numel(),
    )


def cast_bytes(encoder: nn.Module) -> int:
    """
    Half-precision copies of an encoder's trained matrices, which autocast keeps until the forward pass is over.
    Without gradient checkpointing autograd keeps them anyway.
    """
    return BYTES_HALF * sum(p.numel() for p in encoder.parameters() if p.requires_grad and p.ndim > 1)


def saved_bytes(forward: Callable[[], object], model: MoCoV3ForPreTraining, mixed_precision: str) -> int:
    """Bytes of everything that autograd keeps after `forward()`, except weights; shared storage counts once."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage, storage.nbytes())  # holding the storage keeps its address in use
        return tensor

    # fp16 has the same width; autocast supports bfloat16 on every device.
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed_precision != "no")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        forward()
    return sum(size for _, size in kept.values())


def multiply_adds(model: PreTrainedModel, pixel_values: torch.Tensor) -> int:
    """
    Multiply-adds of `model(pixel_values)` as in the published tables of MoCo v3's models: linear layers, convolutions
    and attention, and the operations of norms.

    Works on tensors without data (meta, fake). Leaves the model in evaluation mode with eager attention, whose matrix
    products are counted on every device.
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


# Communication


@dataclass(frozen=True)
class Exchange:
    """
    One kind of collective operation in a step.

    Args:
        name: What is communicated.
        kind: `all-reduce`, where each process holds and gets all `num_bytes`, or `all-gather`, where each contributes
            its share of them.
        count: Operations in a step. DDP sends gradients in buckets of about 25 MB, which are not counted: 1.
        num_bytes: Of the results of all these operations together.
    """

    name: str
    kind: str
    count: int
    num_bytes: int

    def sent_bytes(self, num_processes: int) -> float:
        """What each process sends, and receives, in a ring algorithm (Patarasuk and Yuan 2009)."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.num_bytes * (num_processes - 1) / num_processes


def exchanges(model: MoCoV3ForPreTraining, batch_size: int, num_processes: int, on_gpu: bool = True) -> list[Exchange]:
    """
    All communication in a step of `train_step` with AdamW; also for a model without data.

    Log lines (one reduction of a few numbers and the projections of one view, every `logging_steps`) and checkpoints
    (a flag) are not included.

    Args:
        model: With the parameters frozen that are not trained.
        batch_size: Images per process.
        num_processes: Number of processes.
        on_gpu: Statistics of batch normalization are gathered on GPUs and summed twice on CPUs.
    """
    size = max(BYTES_FLOAT32, next(model.projector.parameters()).element_size())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    layers = [*batch_norms(model.mocov3, model.projector, model.predictor)]
    forward = [layer.num_features for layer, _ in [*layers, *batch_norms(model.momentum_encoder)]]
    backward = [layer.num_features for layer, has_gradient in layers if has_gradient]
    # Mean, spread and count of each channel; or, on CPUs, sum and count, and then the centered squares.
    statistics = NUM_VIEWS * size * sum(2 * width + 1 for width in forward)
    if on_gpu:
        statistics_forward = ("all-gather", NUM_VIEWS * len(forward), num_processes * statistics)
    else:
        statistics_forward = ("all-reduce", 2 * NUM_VIEWS * len(forward), statistics)
    keys = num_processes * batch_size * model.config.projection_dim
    return [
        Exchange("gradients", "all-reduce", 1, trained),
        Exchange("keys", "all-gather", NUM_VIEWS, NUM_VIEWS * keys * size),
        Exchange("batch statistics, forward", *statistics_forward),
        Exchange(
            "batch statistics, backward",
            "all-reduce",
            NUM_VIEWS * len(backward),
            NUM_VIEWS * size * sum(2 * width for width in backward),
        ),
        # `StopRequest` asks after every step whether a process has received a signal.
        Exchange("request to stop", "all-reduce", 1, BYTES_FLOAT32),
    ]


def batch_norms(*modules: nn.Module) -> Iterator[tuple[GlobalBatchNorm, bool]]:
    """Layers with statistics over all processes, and whether a gradient passes through each."""
    has_gradient = False
    for module in modules:
        for layer in module.modules():
            has_gradient = has_gradient or any(p.requires_grad for p in layer.parameters(recurse=False))
            if isinstance(layer, GlobalBatchNorm):
                yield layer, has_gradient


def describe_exchanges(exchanged: list[Exchange], num_processes: int) -> str:
    """One line: `463.1 MB (432.6 gradients, 8.4 keys, 22.0 batch statistics as on GPUs); 881.8 MB sent in a ring`."""
    total = sum(exchange.num_bytes for exchange in exchanged)
    sent = sum(exchange.sent_bytes(num_processes) for exchange in exchanged)
    parts = {
        name: sum(exchange.num_bytes for exchange in exchanged if exchange.name.startswith(name))
        for name in ("gradients", "keys", "batch statistics")
    }
    is_gathered = any(e.name == "batch statistics, forward" and e.kind == "all-gather" for e in exchanged)
    named = ", ".join(f"{num_bytes / 1e6:.1f} {name}" for name, num_bytes in parts.items() if num_bytes)
    form = "GPUs" if is_gathered else "CPUs"
    return f"{total / 1e6:.1f} MB ({named} as on {form}); {sent / 1e6:.1f} MB sent in a ring"
