"""LARS (You et al. 2017), in the form that MoCo v3 uses for ResNets."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class LARS(Optimizer):
    """
    SGD with momentum and layer-wise scaling: the trust ratio is the norm of the weights over the norm of the update.

    For a tensor `p` of two or more dimensions with gradient `g`:

        d = g + weight_decay · p
        d = d · trust_coefficient · ‖p‖ / ‖d‖    (not scaled if either norm is 0)
        μ = momentum · μ + d
        p = p - lr · μ

    With `trust_clip`, as in LARC, the factor is `min(trust_coefficient · ‖p‖ / ‖d‖ / lr, 1)`: no tensor moves farther
    than with SGD, and one with large gradients moves as with `lr = 1`.

    Tensors of at most one dimension (biases, norms) have neither weight decay nor scaling. The tensors of a group are
    updated together (multi-tensor).

    As in torch's fused optimizers, the attribute `found_inf` can be set to a 0-dim tensor. If it is 1, a step changes
    nothing. This needs no synchronization with the device.

    Args:
        params: Parameters or parameter groups, as for any torch optimizer.
        lr: Learning rate.
        momentum: Factor of the momentum buffer, in [0, 1).
        weight_decay: L2 penalty on tensors of two or more dimensions.
        trust_coefficient: Learning rate of a layer relative to its norm.
        trust_clip: Divide the trust ratio by the learning rate and clip it at 1.

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        trust_clip: bool = False,
    ):
        if lr < 0.0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        if trust_coefficient <= 0.0:
            raise ValueError(f"trust_coefficient must be positive, got {trust_coefficient}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust_clip": trust_clip,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # states of version 0.1 do not name it
            group.setdefault("trust_clip", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update all parameters that have a gradient. `closure`, if given, evaluates the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices = [parameter for parameter in parameters if parameter.ndim > 1]
            vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
            if matrices:
                self.descend(matrices, adapted_updates(matrices, group), group)
            if vectors:
                self.descend(vectors, [parameter.grad for parameter in vectors], group)
        return loss

    def descend(self, parameters: list[torch.Tensor], updates: list[torch.Tensor], group: dict) -> None:
        """Add the updates to the momentum buffers, and subtract the scaled buffers from the parameters."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        momentum, lr = group["momentum"], group["lr"]
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(parameters, buffers, alpha=-lr)
            return
        skip = found_inf.bool()
        zero = updates[0].new_zeros(())
        updates = [torch.where(skip, zero, update) for update in updates]  # multiplying by 0 would keep NaN
        # Compute in the precision of the parameters: `torch.where` would round Python numbers to float32.
        dtype = torch.promote_types(buffers[0].dtype, torch.float32)
        kept = skip.to(dtype)
        torch._foreach_mul_(buffers, kept + (1 - kept) * torch.full_like(kept, momentum))
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(parameters, torch._foreach_mul(buffers, (1 - kept) * torch.full_like(kept, -lr)))


def adapted_updates(parameters: list[torch.Tensor], group: dict) -> list[torch.Tensor]:
    """Gradients plus weight decay, each scaled by its trust ratio."""
    gradients = [parameter.grad for parameter in parameters]
    updates = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
    parameter_norms = torch.stack(torch._foreach_norm(parameters))
    update_norms = torch.stack(torch._foreach_norm(updates))
    ratios = group["trust_coefficient"] * parameter_norms / update_norms
    if group["trust_clip"]:
        ratios = (ratios / group["lr"]).clamp(max=1.0)
    ratios = torch.where((parameter_norms > 0) & (update_norms > 0), ratios, 1.0)
    torch._foreach_mul_(updates, list(ratios.unbind()))
    return updates
