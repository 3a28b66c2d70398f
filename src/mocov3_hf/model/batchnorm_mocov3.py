# Copyright 2026 The mocov3_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Batch normalization with statistics of all processes, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as FusedSyncBatchNorm
from torch.utils.module_tracker import ModuleTracker


def num_processes() -> int:
    """Number of processes in the default process group, or 1 if it is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_recomputation() -> bool:
    """Whether this forward pass runs inside a backward pass, where gradient checkpointing repeats it."""
    return not torch.compiler.is_compiling() and ModuleTracker().is_bw


class GlobalBatchNormFunction(torch.autograd.Function):
    """
    Normalizes `(B, C, ...)` with the mean and variance over all processes, each with any batch size.

    The variance is computed in two passes, first the mean and then the centered squares: `E[x²] - μ²` suffers from
    cancellation. The backward pass also reduces over all processes, because every sample affects the statistics of
    all of them. The gradients of `weight` and `bias` stay local and are averaged by DDP.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, eps):
        compute = hidden_states.to(weight.dtype) if weight is not None else hidden_states
        compute = compute.float() if compute.dtype in (torch.float16, torch.bfloat16) else compute
        dims = [dim for dim in range(compute.dim()) if dim != 1]
        local_count = compute.numel() // compute.shape[1]
        totals = torch.cat([compute.sum(dims), compute.new_tensor([local_count])])
        dist.all_reduce(totals)
        count, mean = totals[-1], totals[:-1] / totals[-1]

        centered = compute - per_channel(mean, compute)
        squares = centered.square().sum(dims)
        dist.all_reduce(squares)
        variance = squares / count

        inverse_std = torch.rsqrt(variance + eps)
        normalized = centered * per_channel(inverse_std, compute)
        ctx.save_for_backward(normalized, weight, inverse_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        output = normalized
        if weight is not None:
            output = output * per_channel(weight, compute) + per_channel(bias, compute)
        return output.to(hidden_states.dtype), mean, variance, count

    @staticmethod
    def backward(ctx, grad_output, *_):
        normalized, weight, inverse_std, count = ctx.saved_tensors
        grad = grad_output.to(normalized.dtype)
        dims = [dim for dim in range(grad.dim()) if dim != 1]
        grad_bias, grad_weight = grad.sum(dims), (grad * normalized).sum(dims)

        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        mean_grad, mean_grad_normalized = sums / count
        grad_input = grad - per_channel(mean_grad, grad) - normalized * per_channel(mean_grad_normalized, grad)
        scale = inverse_std if weight is None else inverse_std * weight
        grad_input = (grad_input * per_channel(scale, grad)).to(grad_output.dtype)
        if weight is None:
            return grad_input, None, None, None
        return grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None


def per_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape `(C,)` to broadcast over `(B, C, ...)`."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """
    Base of the classes below. In training with several processes, the statistics are those of the batches of all
    processes together, for any batch size of each. Otherwise it is torch's batch normalization. Gradient checkpointing
    does not count a batch twice.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training and is_recomputation():
            with self.running_statistics_kept():
                return self.normalize(hidden_states)
        return self.normalize(hidden_states)

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or num_processes() == 1:
            return super().forward(hidden_states)
        self._check_input_dim(hidden_states)
        if hidden_states.is_cuda:
            return self.fused(hidden_states)
        output, mean, variance, count = GlobalBatchNormFunction.apply(hidden_states, self.weight, self.bias, self.eps)
        if count <= 1:
            raise ValueError(
                "batch normalization needs more than one value per channel over all processes: use a larger batch"
            )
        if self.track_running_stats:
            self.update_running_statistics(mean, variance * (count / (count - 1)))
        return output

    def fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same with the CUDA kernels of `torch.nn.SyncBatchNorm`."""
        return FusedSyncBatchNorm.apply(
            hidden_states,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self.average_factor() if self.track_running_stats else 0.0,
            dist.group.WORLD,
            dist.get_world_size(),
        )

    @contextmanager
    def running_statistics_kept(self) -> Iterator[None]:
        """Update copies. Without buffers, autograd would save other tensors than in the pass that is repeated."""
        kept = self._buffers.copy()
        self._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in kept.items()})
        try:
            yield
        finally:
            self._buffers.update(kept)

    @torch.no_grad()
    def update_running_statistics(self, mean: torch.Tensor, unbiased_variance: torch.Tensor) -> None:
        factor = self.average_factor()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), factor)

    def average_factor(self) -> float:
        """Count this batch and return its weight in the running statistics."""
        self.num_batches_tracked.add_(1)
        return self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)


class MoCoV3BatchNorm1d(GlobalBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with statistics of all processes."""


class MoCoV3BatchNorm2d(GlobalBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with statistics of all processes."""


class MoCoV3TokenBatchNorm(MoCoV3BatchNorm1d):
    """Batch normalization of tokens `(B, L, D)` over all images, tokens and processes."""

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().normalize(hidden_states.flatten(0, 1)).view_as(hidden_states)


def use_global_statistics(module: nn.Module) -> nn.Module:
    """
    Make every `torch.nn.BatchNorm1d` and `BatchNorm2d` in `module` use the statistics of all processes, in place.

    Only the class of the layers changes. Parameters, buffers, keys, hooks and flags stay the same.
    """
    replacements = {nn.BatchNorm1d: MoCoV3BatchNorm1d, nn.BatchNorm2d: MoCoV3BatchNorm2d}
    for layer in module.modules():
        if type(layer) in replacements:
            layer.__class__ = replacements[type(layer)]
    return module


__all__ = ["MoCoV3BatchNorm1d", "MoCoV3BatchNorm2d", "MoCoV3TokenBatchNorm", "use_global_statistics"]
