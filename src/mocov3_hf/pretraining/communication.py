"""What the processes of a run tell each other in every step, counted from the model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from ..model.batchnorm_mocov3 import GlobalBatchNorm
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from .sharding import unit_parameters


NUM_VIEWS = 2
BYTES_FLOAT32 = 4
BYTES_FLOAT64 = 8


@dataclass(frozen=True)
class Exchange:
    """
    One kind of collective operation in a step.

    Args:
        name: What is exchanged.
        kind: `all-reduce`, where each process holds and gets all `num_bytes`; `all-gather`, where each brings its
            share of them; or `reduce-scatter`, where each holds them all and gets its share of the sum.
        count: Operations in a step. DDP sends gradients in buckets of about 25 MB, which are not counted: 1.
        num_bytes: Of the results of all these operations together.
    """

    name: str
    kind: str
    count: int
    num_bytes: int

    def plus(self, count: int, num_bytes: int) -> "Exchange":
        """With so many more operations of so many bytes each."""
        return replace(self, count=self.count + count, num_bytes=self.num_bytes + count * num_bytes)

    def sent_bytes(self, num_processes: int) -> float:
        """What each process sends, and receives, where the operation goes round a ring (Patarasuk and Yuan 2009)."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.num_bytes * (num_processes - 1) / num_processes


def exchanges(
    model: MoCoV3ForPreTraining,
    batch_size: int,
    num_processes: int,
    on_gpu: bool = True,
    fsdp: bool = False,
    chunk_size: int | None = None,
) -> list[Exchange]:
    """
    All exchanges of a step of `train_step` with AdamW, on any device, so also on tensors without data.

    Lines of the log (one reduction of a few numbers and the projections of one view, every `logging_steps`) and
    checkpoints (a flag) are not in it.

    Args:
        model: With the parameters frozen that do not train.
        batch_size: Images per process.
        num_processes: Number of processes.
        on_gpu: Statistics of batch normalisation are gathered on GPUs and summed twice on CPUs.
        fsdp: Weights are spread over the processes, instead of copies under DDP.
        chunk_size: Of the gradient cache, which exchanges more with `fsdp`.
    """
    size = max(BYTES_FLOAT32, next(model.projector.parameters()).element_size())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    layers = [*batch_norms(model.mocov3, model.projector, model.predictor)]
    forward = [layer.num_features for layer, _ in [*layers, *batch_norms(model.momentum_encoder)]]
    backward = [layer.num_features for layer, has_gradient in layers if has_gradient]
    # Mean, spread and count of each channel; or, on CPUs, sum and count, and then the centred squares.
    statistics = NUM_VIEWS * size * sum(2 * width + 1 for width in forward)
    if on_gpu:
        statistics_forward = ("all-gather", NUM_VIEWS * len(forward), num_processes * statistics)
    else:
        statistics_forward = ("all-reduce", 2 * NUM_VIEWS * len(forward), statistics)
    keys = num_processes * batch_size * model.config.projection_dim
    if fsdp:
        weights_and_gradients = sharded_exchanges(model, batch_size, num_processes, chunk_size)
    else:
        weights_and_gradients = [Exchange("gradients", "all-reduce", 1, trained)]
    return [
        *weights_and_gradients,
        Exchange("keys", "all-gather", NUM_VIEWS, NUM_VIEWS * keys * size),
        Exchange("batch statistics, forward", *statistics_forward),
        Exchange(
            "batch statistics, backward",
            "all-reduce",
            NUM_VIEWS * len(backward),
            NUM_VIEWS * size * sum(2 * width for width in backward),
        ),
        # `StopRequest` asks after every step whether a process has been told to stop.
        Exchange("request to stop", "all-reduce", 1, BYTES_FLOAT32),
    ]


def sharded_exchanges(
    model: MoCoV3ForPreTraining, batch_size: int, num_processes: int, chunk_size: int | None
) -> list[Exchange]:
    """
    Weights are gathered for every pass through a unit, forward and backward, and gradients summed once in each call of
    `backward()`, of which the gradient cache has one for every chunk.
    """
    passes = 1 if model.views_in_one_pass else NUM_VIEWS
    forward, backward_calls = passes, 1
    if chunk_size is not None:
        passes = backward_calls = NUM_VIEWS * math.ceil(batch_size / chunk_size)
        forward = 2 * passes  # without a gradient, and again with one
    momentum = model.momentum_encoder
    # Each with its passes forward and backward, and how many calls of `backward()` these are.
    parts = [
        (model.mocov3, forward, passes, backward_calls),
        (model.projector, NUM_VIEWS, NUM_VIEWS, 1),
        (model.predictor, NUM_VIEWS, NUM_VIEWS, 1),
        (momentum.encoder, passes, 0, 0),
        (momentum.projector, NUM_VIEWS, 0, 0),
    ]
    weights, gradients = Exchange("weights", "all-gather", 0, 0), Exchange("gradients", "reduce-scatter", 0, 0)
    image = next(model.mocov3.parameters())
    for part, forward, backward, calls in parts:
        for unit, parameters in unit_parameters(model, part):
            weights = weights.plus(forward, padded_bytes(parameters, num_processes))
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            if trained:
                # What takes the images has no gradient to hand on, and is let go of at the end of a call.
                takes_images = unit is model.mocov3 or any(parameter is image for parameter in parameters)
                weights = weights.plus(calls if takes_images else backward, padded_bytes(parameters, num_processes))
                gradients = gradients.plus(calls, padded_bytes(trained, num_processes))
    num_trained = sum(parameter.requires_grad for parameter in model.parameters())
    size = max(BYTES_FLOAT32, next(model.projector.parameters()).element_size())
    # The norm of every gradient in float64, and the largest components in the first and the last layer.
    norms = Exchange("gradient norms", "all-reduce", 2, BYTES_FLOAT64 * num_trained + 2 * size)
    return [weights, gradients, norms]


def padded_bytes(parameters: list[nn.Parameter], num_processes: int) -> int:
    """Of whole parameters, each cut along its first dimension into shares of the same size."""
    return sum(
        p.element_size() * num_processes * math.ceil(len(p) / num_processes) * (p.numel() // len(p))
        for p in parameters
    )


def batch_norms(*modules: nn.Module) -> Iterator[tuple[GlobalBatchNorm, bool]]:
    """Layers with statistics over all processes, and whether a gradient goes back through each."""
    has_gradient = False
    for module in modules:
        for layer in module.modules():
            has_gradient = has_gradient or any(p.requires_grad for p in layer.parameters(recurse=False))
            if isinstance(layer, GlobalBatchNorm):
                yield layer, has_gradient


def describe(exchanged: list[Exchange], num_processes: int) -> str:
    """
    One line: `463.1 MB (432.6 gradients, 8.4 keys, 22.0 batch statistics as on GPUs); 881.8 MB sent where they ...`.
    """
    total = sum(exchange.num_bytes for exchange in exchanged)
    sent = sum(exchange.sent_bytes(num_processes) for exchange in exchanged)
    parts = {
        "weights": sum(e.num_bytes for e in exchanged if e.name == "weights"),
        "gradients": sum(e.num_bytes for e in exchanged if e.name == "gradients"),
        "keys": sum(e.num_bytes for e in exchanged if e.name == "keys"),
        "batch statistics": sum(e.num_bytes for e in exchanged if e.name.startswith("batch statistics")),
    }
    is_gathered = any(e.name == "batch statistics, forward" and e.kind == "all-gather" for e in exchanged)
    named = ", ".join(f"{num_bytes / 1e6:.1f} {name}" for name, num_bytes in parts.items() if num_bytes)
    form = "GPUs" if is_gathered else "CPUs"
    return f"{total / 1e6:.1f} MB ({named} as on {form}); {sent / 1e6:.1f} MB sent where they form a ring"
