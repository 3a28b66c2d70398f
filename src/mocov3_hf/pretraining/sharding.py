"""Weights, gradients and optimizer states spread over the processes (FSDP2), for models too large for copies.

Every parameter is then a `DTensor`, of which a process holds a part. Loss, gradients and update are those of whole
copies; what reads parameters one by one (checkpoints, gradient norms) goes through the functions here.
"""

import os
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model.modeling_mocov3 import MoCoV3Model
from ..model.modeling_mocov3_pretraining import MoCoV3ForPreTraining


# Kinds of devices on which this process has sharded a model.
sharded_devices: set[str] = set()


def shard(model: MoCoV3ForPreTraining, device: torch.device, num_processes: int) -> None:
    """
    Spread the parameters of a model over all processes, in place, before the optimizer is built. Buffers stay whole.

    Each unit is gathered when it computes and let go of afterwards: the blocks of both encoders, what is left of
    these, and the heads. The whole model is none, so that the gradient cache can call its parts. No unit keeps its
    weights after the forward pass: the momentum branch has no backward pass that would let go of them, and its moving
    average would go to copies.
    """
    # The pooled vector is a view of the tokens, and nobody writes to it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (num_processes,))
    sharded_devices.add(device.type)
    for unit in units(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for root in (model.momentum_encoder.encoder, model.momentum_encoder.projector):
        root.register_forward_hook(forget_pass)


def leave_if_sharded() -> None:
    """
    At the end of a program that has sharded a model: end the process at once, with exit code 0.

    Threads of FSDP2's collectives outlive the process group. Seen on CPUs (gloo, torch 2.14): once in some fifty times
    they were still there when the interpreter ended, which then aborted, although all was done and written.
    """
    if sharded_devices:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def forget_pass(root: nn.Module, *_) -> None:
    """
    Drop FSDP2's notes on a forward pass without a backward pass, which would take them off: they grow with every step.
    """
    if hasattr(root, "reset_iter_state"):  # since torch 2.14
        root.reset_iter_state()
        return
    state = root._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    for inner in state._state_ctx.all_states:
        if inner._fsdp_param_group is not None:
            inner._fsdp_param_group._post_forward_indices.clear()


def units(model: MoCoV3ForPreTraining) -> list[nn.Module]:
    """What is gathered at once, inner modules first."""
    momentum = model.momentum_encoder
    found = []
    for encoder in (model.mocov3, momentum.encoder):
        # transformers' name for the modules that must not be taken apart.
        blocks = encoder.backbone._no_split_modules or ()
        found += [module for module in encoder.modules() if type(module).__name__ in blocks][::-1]
        found.append(encoder)
    return [*found, model.projector, model.predictor, momentum.projector]


def unit_parameters(model: MoCoV3ForPreTraining, part: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Each unit of FSDP2 inside of a part of the model, and its parameters that no inner unit has."""
    taken: set[nn.Parameter] = set()
    inside = set(part.modules())
    for unit in units(model):
        if unit in inside:
            own = [parameter for parameter in unit.parameters() if parameter not in taken]
            taken.update(own)
            if own:
                yield unit, own


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, which may be nothing; all of one that is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor. Of one that is spread, all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, spread as a parameter is; as it was where that is not spread."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    # None: each process takes its part of its own copy, and nobody sends anything.
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


def whole_copy(encoder: MoCoV3Model) -> MoCoV3Model:
    """An encoder like one that is spread, on this process alone; all processes must ask for it."""
    with torch.device(encoder.device):
        copy = MoCoV3Model(encoder.config)
    spread = encoder.state_dict()
    for name, tensor in copy.state_dict().items():
        tensor.copy_(whole(spread[name]))
    return copy


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
