"""Detectors of training that goes wrong silently, which is what the paper is about (§4).

Dips in accuracy are preceded by a spike of the gradient, in the first layer first and some tens of iterations later in
the last. The detectors compare every step with the steps before it and need no threshold per model.
"""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


# Distance of a spike above the median gradient norm, in robust standard deviations of the logarithm.
SPIKE_DEVIATIONS = 8.0
# Steps in the window, and steps needed before a step is judged.
SPIKE_WINDOW, SPIKE_MINIMUM = 200, 20
# Steps over which the loss is averaged, the gain over chance above which it is monitored, and the fraction of the best
# gain that it may lose.
LOSS_WINDOW, SMALLEST_GAIN, LARGEST_LOSS_OF_GAIN = 20, 0.05, 0.5


class SpikeDetector:
    """
    Finds values far above those before them, by median and median absolute deviation of their logarithms, which are
    robust against a few spikes. Runs on the device and never waits for it.

    Args:
        factor: Smallest ratio of a spike to the median: a smooth run has almost no spread.
        window: Values in the window.
        minimum: Values needed before anything is called a spike.
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
        # Ring buffer of logarithms; unused entries sort to the end.
        self.logarithms = torch.full((window,), torch.inf, dtype=torch.float64, device=device)
        self.num_seen = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, value: torch.Tensor) -> torch.Tensor:
        """
        Add a 0-dim value. Returns 0-dim float64: for a spike its ratio to the median, otherwise 0. Only positive
        finite numbers count.
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
        """The (lower) median of the used entries."""
        last = self.num_seen.clamp(1, len(values)) - 1
        return values.sort().values.gather(0, (last // 2).reshape(1)).squeeze(0)

    def state(self) -> dict:
        """Everything, in types of JSON; waits for the device."""
        filled = min(int(self.num_seen), len(self.logarithms))
        return {"num_seen": int(self.num_seen), "logarithms": self.logarithms[:filled].tolist()}

    def load_state(self, state: dict) -> None:
        self.logarithms.fill_(torch.inf)
        self.logarithms[: len(state["logarithms"])] = self.logarithms.new_tensor(state["logarithms"])
        self.num_seen.fill_(state["num_seen"])


class DivergenceDetector:
    """
    Finds a loss that has lost more than half of its gain over chance: a run that collapses or whose learning rate is
    too large, even with smooth gradients.

    Args:
        window: Steps over which the loss is averaged.
        history, best: State of an earlier detector.
    """

    def __init__(self, window: int = LOSS_WINDOW, history: Iterable[float] = (), best: float = 0.0):
        self.history = deque(history, maxlen=window)
        self.best = best

    def add(self, gain: float) -> bool:
        """Add a normalized loss (0 at chance, 1 at the floor). Returns whether the run has just diverged."""
        self.history.append(gain)
        if len(self.history) < self.history.maxlen:
            return False
        mean = statistics.fmean(self.history)
        if self.best > SMALLEST_GAIN and mean < (1 - LARGEST_LOSS_OF_GAIN) * self.best:
            self.best = 0.0  # reported once: from here on it is watched like a new run
            self.history.clear()
            return True
        self.best = max(self.best, mean)
        return False

    def state(self) -> dict:
        return {"history": list(self.history), "best": self.best}


@dataclass(frozen=True)
class Instability:
    """What went wrong, and at which step (from 1)."""

    step: int
    reason: str


def first_and_last_weight(backbone: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """
    The weights with a gradient nearest to the image and farthest from it; tokens and position embeddings do not count.

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
    (`encoder.layer.3`, `encoder.stages.0.layers.2`), or a part of it outside the layers (`embeddings`).
    """
    head, _, rest = name.partition(".")
    if head != "mocov3":
        return head
    parts = rest.removeprefix("backbone.").split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    # The second number, if there are two, is the block in its stage; a third one is inside the block.
    end = numbers[min(1, len(numbers) - 1)] + 1 if numbers else 1
    return ".".join(parts[:end])


@dataclass(frozen=True)
class GradientNorms:
    """Gradient norms of a step, on the device."""

    total: torch.Tensor  # L2 norm of the whole gradient, 0-dim
    blocks: torch.Tensor  # of each block, (blocks,)
    first_max: torch.Tensor  # largest component of the gradient of the first trained layer, 0-dim
    last_max: torch.Tensor  # and of the last
    times_usual: torch.Tensor  # for a spike, its ratio to the median norm; otherwise 0; 0-dim
    refused: torch.Tensor  # whether the step must change nothing, 0-dim


class GradientWatch:
    """
    Gradient norms of a model and of its blocks, compared with those of the steps before.

    Args:
        model: `MoCoV3ForPreTraining`, not wrapped, on its device.
        spike_factor: Spike threshold, as a multiple of the median gradient norm.
        refuse_spikes: Whether steps with a spike are refused, as steps are whose gradient is not finite.

    Attributes:
        names: the blocks, from the image to the loss.
    """

    def __init__(self, model: nn.Module, spike_factor: float = 2.0, refuse_spikes: bool = False):
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names = list(dict.fromkeys(block_of(name) for name in trained))
        self.parameters = list(trained.values())
        device = self.parameters[0].device
        blocks = torch.tensor([self.names.index(block_of(name)) for name in trained], device=device)
        # A row per block, with ones for its parameters.
        self.members = (blocks == torch.arange(len(self.names), device=device)[:, None]).double()
        self.zero = torch.zeros((), device=device)
        self.backbone = model.mocov3.backbone
        self.first_and_last: tuple[nn.Parameter, nn.Parameter] | None = None
        self.spikes = SpikeDetector(spike_factor, device=device)
        self.refuse_spikes = refuse_spikes

    @torch.no_grad()
    def look(self) -> GradientNorms:
        """Once per step, when the gradients are complete and before they are clipped."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        found = iter(torch._foreach_norm(gradients))
        norms = torch.stack([self.zero if parameter.grad is None else next(found) for parameter in self.parameters])
        if self.first_and_last is None:  # known once there are gradients
            self.first_and_last = first_and_last_weight(self.backbone)
        first_max, last_max = (weight.grad.abs().max() for weight in self.first_and_last)
        total = torch.linalg.vector_norm(norms)
        times_usual = self.spikes.add(total)
        # Gradients are averaged over the processes, so all of them skip the same steps.
        refused = ~total.isfinite()
        if self.refuse_spikes:
            refused = refused | (times_usual > 0)
        blocks = (self.members @ norms.double().square()).sqrt()
        return GradientNorms(total, blocks, first_max, last_max, times_usual, refused)
