"""One update of MoCo v3 (paper, algorithm 1)."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTrainingOutput
from ..optim import LARS
from .gradient_cache import cached_backward
from .instability import first_and_last_weight


# Distance of the seeds of neighbouring steps: more processes than a run will have.
MAX_PROCESSES = 1 << 20


@dataclass
class StepOutput:
    """What a step leaves for the monitors, all 0-dim tensors on the device: reading them waits for the device."""

    loss: torch.Tensor
    positive_top1: torch.Tensor
    grad_norm: torch.Tensor
    first_layer_grad_max: torch.Tensor  # largest component of the gradient of the first trained layer
    last_layer_grad_max: torch.Tensor
    skipped: torch.Tensor  # whether the step changed nothing, since its gradient was not finite
    projection: torch.Tensor  # (B, P) of the momentum branch, not 0-dim: for signs of collapse


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    views: tuple[torch.Tensor, torch.Tensor],
    *,
    learning_rate: float,
    momentum: float,
    max_grad_norm: float | None,
    accelerator: Accelerator,
    gradient_cache_chunk_size: int | None = None,
) -> StepOutput:
    """
    One update.

    Args:
        model: `MoCoV3ForPreTraining` as `accelerator.prepare` gives it.
        optimizer: Optimizer as `accelerator.prepare` gives it.
        views: The two views of this process's images, each `(B, C, H, W)`, normalised.
        learning_rate: Of this step.
        momentum: `m` of this step.
        max_grad_norm: Largest L2 norm of all gradients together, `None` for no limit.
        accelerator: Precision and processes.
        gradient_cache_chunk_size: Images per pass of the backbone, for batches larger than memory; `None` for all.
    """
    statistics = RunningStatistics(model)
    # θk ← m·θk + (1 - m)·θq; before the forward, as base weights do not move in between.
    accelerator.unwrap_model(model).update_momentum_encoder(momentum)

    if gradient_cache_chunk_size is None:
        output: MoCoV3ForPreTrainingOutput = model(pixel_values=views[0], pixel_values_2=views[1], even_batches=True)
        accelerator.backward(output.loss)
    else:
        output = cached_backward(accelerator.unwrap_model(model), views, gradient_cache_chunk_size, accelerator)

    grad_norm = clip_gradients(model, optimizer, max_grad_norm, accelerator)
    first, last = (
        weight.grad.abs().max() for weight in first_and_last_weight(accelerator.unwrap_model(model).mocov3.backbone)
    )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # Gradients are averaged over the processes: if one has a NaN, all have, and all skip together.
    skipped = ~grad_norm.isfinite()
    update_unless(skipped, optimizer, accelerator)
    optimizer.zero_grad()
    statistics.restore_where(skipped)

    positive_top1 = (output.positive_top1_1 + output.positive_top1_2) / 2
    return StepOutput(output.loss.detach(), positive_top1, grad_norm, first, last, skipped, output.projection)


def clip_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, accelerator: Accelerator
) -> torch.Tensor:
    """The L2 norm of all gradients, which are scaled down where it exceeds `max_grad_norm`."""
    accelerator.unscale_gradients(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    return grad_norm


def update_unless(skipped: torch.Tensor, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """`optimizer.step()`, which changes nothing if `skipped`: decided on the device where the optimizer can."""
    plain = getattr(optimizer, "optimizer", optimizer)
    if accelerator.scaler is not None:  # fp16: the gradient scaler sees to it
        optimizer.step()
    elif plain.defaults.get("fused") or isinstance(plain, LARS):
        plain.found_inf = skipped.to(torch.float32)
        optimizer.step()
    elif not skipped:
        optimizer.step()


class RunningStatistics:
    """The running statistics of a model's batch normalisation before a step, to go back to after a bad one."""

    def __init__(self, model: nn.Module):
        self.buffers = list(model.buffers())
        self.before = [buffer.clone() for buffer in self.buffers]

    def restore_where(self, bad: torch.Tensor) -> None:
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(torch.where(bad, before, buffer))


def seed_step(seed: int, step: int, process_index: int) -> None:
    """Make the random numbers of dropout and stochastic depth a function of the step: a run can resume at any."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * MAX_PROCESSES + process_index) % (1 << 63))
