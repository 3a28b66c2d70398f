"""Alarms for what the paper is about (§4): training that goes wrong without a sound.

Dips in accuracy are preceded by a spike of the gradient, in the first layer first and some tens of iterations later in
the last. The detectors judge every step by the steps before it, so that they need no threshold for each model.
"""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from .sharding import is_sharded, own_part


# How many robust standard deviations of its logarithm a gradient norm may lie above the median of those before.
SPIKE_DEVIATIONS = 8.0
# Steps that are looked back at, and how many of them there must be before anything is judged.
SPIKE_WINDOW, SPIKE_MINIMUM = 200, 20
# Steps over which the loss is averaged, the gain over chance from which on it is watched, and the share of the best
# gain that it may lose.
LOSS_WINDOW, SMALLEST_GAIN, LARGEST_LOSS_OF_GAIN = 20, 0.05, 0.5


class SpikeDetector:
    """
    Finds values far above those before them: by median and median absolute deviation of their logarithms, which a few
    spikes do not move. Works on the device and never waits for it.

    Args:
        factor: How many times the usual value a spike is at least: a smooth run has almost no spread.
        window: Values that are looked back at.
        minimum: Values that must have been seen before anything is called a spike.
        device: Where the values are.
    """

    def __init__(
        self,
        factor: float = 2.0,
        window: int = SPIKE_WINDOW,
        minimum: int = SPIKE_MINIMUM,
        device: torch.device | str = "cpu",
    ):
        self.smallest = torch.tensor(factor, dtype=torch.float64, device=device).log()
        self.minimum = minimum
        # Logarithms of the newest values, by turns; what is not filled yet sorts to the end.
        self.logarithms = torch.full((window,), torch.inf, dtype=torch.float64, device=device)
        self.num_seen = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, value: torch.Tensor) -> torch.Tensor:
        """
        Take in a 0-dim value; for a spike, how many times the usual one it is, otherwise 0, as 0-dim float64. Only
        positive numbers count.
        """
        value = value.double()
        counts = value.isfinite() & (value > 0)
        logarithm = value.where(counts, 1.0).log()
        median = self.median(self.logarithms)
        deviation = 1.4826 * self.median((self.logarithms - median).abs())
        limit = median + torch.maximum(SPIKE_DEVIATIONS * deviation, self.smallest)
        is_spike = counts & (self.num_seen >= self.minimum) & (logarithm > limit)

        place = (self.num_seen % len(self.logarithms)).reshape(1)
        self.logarithms.scatter_(0, place, logarithm.where(counts, self.logarithms.gather(0, place)).reshape(1))
        self.num_seen += counts
        return (logarithm - median).exp().where(is_spike, 0.0)

    def median(self, values: torch.Tensor) -> torch.Tensor:
        """The (lower) median of what is filled."""
        last = self.num_seen.clamp(1, len(values)) - 1
        return values.sort().values.gather(0, (last // 2).reshape(1)).squeeze(0)

    def state(self) -> dict:
        """All of it, in types of JSON; reading it waits for the device."""
        filled = min(int(self.num_seen), len(self.logarithms))
        return {"num_seen": int(self.num_seen), "logarithms": self.logarithms[:filled].tolist()}

    def load_state(self, state: dict) -> None:
        self.logarithms.fill_(torch.inf)
        self.logarithms[: len(state["logarithms"])] = self.logarithms.new_tensor(state["logarithms"])
        self.num_seen.fill_(state["num_seen"])


class DivergenceDetector:
    """
    Finds a loss that gives up more than half of what it had gained over chance: what a run does that collapses or
    whose learning rate is too large, be its gradients as smooth as they may.

    Args:
        window: Steps over which the loss is averaged.
        history, best: Where an earlier one stopped.
    """

    def __init__(self, window: int = LOSS_WINDOW, history: Iterable[float] = (), best: float = 0.0):
        self.history = deque(history, maxlen=window)
        self.best = best

    def add(self, gain: float) -> bool:
        """Take in a normalised loss (0 at chance, 1 at the floor); whether the run has just diverged."""
        self.history.append(gain)
        if len(self.history) < self.history.maxlen:
            return False
        mean = statistics.fmean(self.history)
        if self.best > SMALLEST_GAIN and mean < (1 - LARGEST_LOSS_OF_GAIN) * self.best:
            self.best = 0.0  # told once: from here on it is watched as if it began
            self.history.clear()
            return True
        self.best = max(self.best, mean)
        return False

    def state(self) -> dict:
        return {"history": list(self.history), "best": self.best}


@dataclass(frozen=True)
class Instability:
    """What went wrong, and at which update (from 1)."""

    step: int
    reason: str


def first_and_last_weight(backbone: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """
    The weights with a gradient nearest to the image and farthest from it; tokens and position tables are no layers.

    Raises:
        ValueError: no weight of the backbone has a gradient.
    """
    weights = [
        parameter
        for name, parameter in backbone.named_parameters()
        if parameter.grad is not None and parameter.ndim > 1 and not name.endswith(("token", "embeddings"))
    ]
    if not weights:
        raise ValueError(f"no weight of {type(backbone).__name__} has a gradient: the whole backbone is frozen")
    return weights[0], weights[-1]


def block_of(name: str) -> str:
    """
    The block that a parameter of `MoCoV3ForPreTraining` belongs to: a head, a layer of the backbone
    (`encoder.layer.3`, `encoder.stages.0.layers.2`), or the part of it that is not in layers (`embeddings`).
    """
    head, _, rest = name.partition(".")
    if head != "mocov3":
        return head
    parts = rest.removeprefix("backbone.").split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    # The second number where there are two is the block in its stage; a third one is inside of the block.
    end = numbers[min(1, len(numbers) - 1)] + 1 if numbers else 1
    return ".".join(parts[:end])


@dataclass(frozen=True)
class GradientNorms:
    """What the watch says of the gradients of a step, on the device."""

    total: torch.Tensor  # L2 norm of all of them, 0-dim
    blocks: torch.Tensor  # and of each block, (blocks,)
    first_max: torch.Tensor  # largest component of the gradient of the first trained layer, 0-dim
    last_max: torch.Tensor  # and of the last
    times_usual: torch.Tensor  # for a spike, how many times the usual norm; otherwise 0; 0-dim
    refused: torch.Tensor  # whether the step must change nothing, 0-dim


class GradientWatch:
    """
    Gradient norms of a model and of its blocks, and whether they are what they were in the steps before.

    Args:
        model: `MoCoV3ForPreTraining`, not wrapped, on its device.
        spike_factor: How many times the usual norm a spike is at least.
        refuse_spikes: Whether steps with a spike are refused, as those always are whose gradient is not finite.

    Attributes:
        names: the blocks, from the image to the loss.
    """

    def __init__(self, model: nn.Module, spike_factor: float = 2.0, refuse_spikes: bool = False):
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names = list(dict.fromkeys(block_of(name) for name in trained))
        self.parameters = list(trained.values())
        device = self.parameters[0].device
        blocks = torch.tensor([self.names.index(block_of(name)) for name in trained], device=device)
        # A row for each block, with ones for its parameters.
        self.members = (blocks == torch.arange(len(self.names), device=device)[:, None]).double()
        self.zero = torch.zeros((), device=device)
        self.backbone = model.mocov3.backbone
        self.first_and_last: tuple[nn.Parameter, nn.Parameter] | None = None
        self.spikes = SpikeDetector(spike_factor, device=device)
        self.refuse_spikes = refuse_spikes
        self.is_sharded = is_sharded(model)

    @torch.no_grad()
    def look(self) -> GradientNorms:
        """Once a step, when the gradients are complete and before they are clipped."""
        gradients = [own_part(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        found = iter(torch._foreach_norm(gradients))
        norms = torch.stack([self.zero if parameter.grad is None else next(found) for parameter in self.parameters])
        if self.first_and_last is None:  # known once there are gradients
            self.first_and_last = first_and_last_weight(self.backbone)
        if self.is_sharded:
            norms, first_max, last_max = self.of_all_processes(norms)
        else:
            first_max, last_max = (weight.grad.abs().max() for weight in self.first_and_last)
        total = torch.linalg.vector_norm(norms)
        blocks = (self.members @ norms.double().square()).sqrt()
        times_usual = self.spikes.add(total)
        # Gradients are averaged over the processes: what one of them refuses, all refuse.
        refused = ~total.isfinite()
        if self.refuse_spikes:
            refused = refused | (times_usual > 0)
        return GradientNorms(total, blocks, first_max, last_max, times_usual, refused)

    def of_all_processes(self, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Norms of whole gradients from those of this process's parts of them, and the two largest components."""
        squares = norms.double().square()
        dist.all_reduce(squares)
        # A process may hold nothing of a gradient, and nothing has no largest component.
        parts = [own_part(weight.grad).abs().flatten() for weight in self.first_and_last]
        maxima = torch.stack([torch.cat([part, part.new_zeros(1)]).max() for part in parts])
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return squares.sqrt().to(norms.dtype), *maxima.unbind()
