"""A step on weights that FSDP2 spreads over two processes; run by test_sharding.py through torchrun.

Usage: sharding_worker.py OUTPUT, which gets, by name, tensors of the spread model and of a whole one.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.optim import LARS
from mocov3_hf.pretraining.sharding import shard, whole
from tests.model.distributed_worker import BACKBONES, HEADS


BATCH_SIZE = 6  # on each process
OPTIMIZERS = {
    # Gradients of biases before a softmax are rounding alone, which a small eps would blow up.
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, eps=1e-3, weight_decay=0.1, fused=True),
    "lars": lambda parameters: LARS(parameters, lr=0.1, weight_decay=0.1),
}


def main(output: str) -> None:
    whole, views = build_model(), build_views()
    # Before there is a process group: one process on the whole batch.
    expected = {"loss": step(whole, views)}
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    spread = build_model()
    shard(spread, torch.device("cpu"), num_processes=2)
    start = dist.get_rank() * BATCH_SIZE
    actual = {"loss": step(spread, views[:, start : start + BATCH_SIZE])}
    dist.all_reduce(actual["loss"])
    actual["loss"] /= 2

    for model, result in ((whole, expected), (spread, actual)):
        assert all(isinstance(parameter, DTensor) == (model is spread) for parameter in model.parameters())
        result["gradients"] = gathered({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        result["buffers"] = dict(model.named_buffers())
        result["momentum encoder before"] = gathered(dict(model.momentum_encoder.named_parameters()))
        model.update_momentum_encoder(0.9)
        result["momentum encoder"] = gathered(dict(model.momentum_encoder.named_parameters()))
        for name, make in OPTIMIZERS.items():
            optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
            result[name] = gathered(dict(model.named_parameters()))
            optimizer.found_inf = torch.ones(())
            optimizer.step()
            result[f"{name}, step refused"] = gathered(dict(model.named_parameters()))
    # Nothing is left of passes that have been forgotten or gone back through.
    for root in (spread.mocov3, spread.momentum_encoder.encoder, spread.momentum_encoder.projector):
        assert not root._get_fsdp_state()._comm_ctx.post_forward_order
    if dist.get_rank() == 0:
        torch.save({"expected": expected, "actual": actual}, output)
    dist.barrier()
    # At once: the threads of fully_shard's collectives can outlive the interpreter's end, which then aborts.
    os._exit(0)


def build_model() -> MoCoV3ForPreTraining:
    """The same on every process, away from the start, where both branches agree."""
    torch.manual_seed(0)
    model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=BACKBONES["vit"], **HEADS)).double()
    model.even_batches = True
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def build_views() -> torch.Tensor:
    """Of both processes together, `(2, B, C, H, W)`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 2 * BATCH_SIZE, 3, 16, 16, generator=generator, dtype=torch.float64)


def step(model: nn.Module, views: torch.Tensor) -> torch.Tensor:
    loss = model(pixel_values=views[0], pixel_values_2=views[1]).loss
    loss.backward()
    return loss.detach().clone()


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole copies."""
    return {name: whole(tensor).detach().clone() for name, tensor in tensors.items()}


if __name__ == "__main__":
    main(sys.argv[1])
