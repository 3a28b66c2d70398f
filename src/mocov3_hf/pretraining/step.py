"""One training step of MoCo v3 (paper, algorithm 1)."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining, MoCoV3ForPreTrainingOutput
from ..optim import LARS
from ..optim.seeding import step_seed
from .gradient_cache import cached_backward
from .instability import GradientWatch


# Distance of the seeds of neighboring steps: more processes than a run has.
MAX_PROCESSES = 1 << 20


@dataclass
class StepOutput:
    """What a step computes for monitoring, 0-dim unless noted; reading a value waits for the device."""

    loss: torch.Tensor
    positive_top1: torch.Tensor
    grad_norm: torch.Tensor
    first_layer_grad_max: torch.Tensor  # largest component of the gradient of the first trained layer
    last_layer_grad_max: torch.Tensor
    times_usual: torch.Tensor  # of a spike of the gradient norm: its ratio to the median; otherwise 0
    skipped: torch.Tensor  # whether the step changed nothing: its gradient was not finite, or refused as a spike
    block_grad_norms: torch.Tensor  # (blocks,), in the order of `GradientWatch.names`
    projection: torch.Tensor  # (B, P), keys of the momentum encoder


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    views: tuple[torch.Tensor, torch.Tensor],
    *,
    learning_rate: float,
    ema_decay: float,
    max_grad_norm: float | None,
    accelerator: Accelerator,
    gradient_cache_chunk_size: int | None = None,
    watch: GradientWatch | None = None,
) -> StepOutput:
    """
    One training step.

    Args:
        model: `MoCoV3ForPreTraining` as `accelerator.prepare` returns it.
        optimizer: Optimizer as `accelerator.prepare` returns it.
        views: Both views of this process's images, each `(B, C, H, W)`, normalized.
        learning_rate: Of this step.
        ema_decay: `m` of this step.
        max_grad_norm: The L2 norm of the gradient is clipped to it; None for no limit.
        accelerator: Precision and processes.
        gradient_cache_chunk_size: Images per pass of the backbone, for batches larger than memory; None for all.
        watch: Gradient norms of the steps before; None for a new one.
    """
    unwrapped = unwrap(model)
    watch = watch or GradientWatch(unwrapped)
    statistics = RunningStatistics(model)

    # Momentum encoder: θk ← m·θk + (1 - m)·θq. Before the forward pass, as θq does not change in between.
    unwrapped.update_momentum_encoder(ema_decay)
    # q1, q2 = predictor(encoder(x1)), predictor(encoder(x2));  k1, k2 = momentum_encoder(x1), momentum_encoder(x2)
    # loss = InfoNCE(q1, k2) + InfoNCE(q2, k1);  loss.backward()
    unwrapped.even_batches = True  # all processes have equally many images
    if gradient_cache_chunk_size is None:
        output: MoCoV3ForPreTrainingOutput = model(pixel_values=views[0], pixel_values_2=views[1])
        accelerator.backward(output.loss)
    else:
        output = cached_backward(unwrapped, views, gradient_cache_chunk_size, accelerator)

    accelerator.unscale_gradients(optimizer)
    norms = watch.look()
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norms.total)
    # θq ← optimizer(θq, gradient), unless the gradient is refused
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    step_unless(norms.refused, optimizer, accelerator)
    optimizer.zero_grad()
    statistics.restore_where(norms.refused)

    return StepOutput(
        loss=output.loss.detach(),
        positive_top1=(output.positive_top1_1 + output.positive_top1_2) / 2,
        grad_norm=norms.total,
        first_layer_grad_max=norms.first_max,
        last_layer_grad_max=norms.last_max,
        times_usual=norms.times_usual,
        skipped=norms.refused,
        block_grad_norms=norms.blocks,
        projection=output.projection,
    )


def unwrap(model: nn.Module) -> MoCoV3ForPreTraining:
    """The model inside DDP and torch.compile; accelerate's function walks through all layers for it."""
    while not isinstance(model, MoCoV3ForPreTraining):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def step_unless(skipped: torch.Tensor, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """`optimizer.step()`, which changes nothing if `skipped`: decided on the device where the optimizer can."""
    plain = getattr(optimizer, "optimizer", optimizer)
    if accelerator.scaler is not None:  # fp16: the gradient scaler does it
        optimizer.step()
    elif plain.defaults.get("fused") or isinstance(plain, LARS):
        plain.found_inf = skipped.to(torch.float32)
        optimizer.step()
    elif not skipped:
        optimizer.step()


class RunningStatistics:
    """The running statistics of a model's batch normalization before a step, to restore if the step is skipped."""

    def __init__(self, model: nn.Module):
        buffers = list(model.buffers())
        dtypes = dict.fromkeys(buffer.dtype for buffer in buffers)
        # Hundreds of small tensors: concatenated, they are copied and selected in a few operations.
        self.groups = [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in dtypes]
        self.before = [concatenated(buffers) for buffers in self.groups]

    def restore_where(self, skipped: torch.Tensor) -> None:
        for buffers, before in zip(self.groups, self.before, strict=True):
            kept = torch.where(skipped, before, concatenated(buffers)).split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(kept, buffers, strict=True)])


def concatenated(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def seed_step(seed: int, step: int, process_index: int) -> None:
    """Make what dropout and stochastic depth draw a function of the step: a run can resume at any."""
    torch.manual_seed(step_seed(seed, step * MAX_PROCESSES + process_index))
