"""What the processes of a run tell each other in every step, counted from the model."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..model.batchnorm_mocov3 import GlobalBatchNorm
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining


NUM_VIEWS = 2
BYTES_FLOAT32 = 4


@dataclass(frozen=True)
class Exchange:
    """
    One kind of collective operation in a step.

    Args:
        name: What is exchanged.
        kind: `all-reduce`, where each process holds and gets all `num_bytes`, or `all-gather`, where each brings its
            share of them.
        count: Operations in a step. DDP sends gradients in buckets of about 25 MB, which are not counted: 1.
        num_bytes: Of the results of all these operations together.
    """

    name: str
    kind: str
    count: int
    num_bytes: int

    def sent_bytes(self, num_processes: int) -> float:
        """What each process sends, and receives, where the operation goes round a ring (Patarasuk and Yuan 2009)."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.num_bytes * (num_processes - 1) / num_processes


def exchanges(model: MoCoV3ForPreTraining, batch_size: int, num_processes: int, on_gpu: bool = True) -> list[Exchange]:
    """
    All exchanges of a step of `train_step` under DDP, on any device, so also on tensors without data.

    Lines of the log (one reduction of a few numbers and the projections of one view, every `logging_steps`) and
    checkpoints (a flag) are not in it.

    Args:
        model: With the parameters frozen that do not train.
        batch_size: Images per process.
        num_processes: Number of processes.
        on_gpu: Statistics of batch normalisation are gathered on GPUs and summed twice on CPUs.
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
        # `StopRequest` asks after every step whether a process has been told to stop.
        Exchange("request to stop", "all-reduce", 1, BYTES_FLOAT32),
    ]


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
        "gradients": sum(e.num_bytes for e in exchanged if e.name == "gradients"),
        "keys": sum(e.num_bytes for e in exchanged if e.name == "keys"),
        "batch statistics": sum(e.num_bytes for e in exchanged if e.name.startswith("batch statistics")),
    }
    is_gathered = any(e.name == "batch statistics, forward" and e.kind == "all-gather" for e in exchanged)
    named = ", ".join(f"{num_bytes / 1e6:.1f} {name}" for name, num_bytes in parts.items())
    form = "GPUs" if is_gathered else "CPUs"
    return f"{total / 1e6:.1f} MB ({named} as on {form}); {sent / 1e6:.1f} MB sent where they form a ring"
