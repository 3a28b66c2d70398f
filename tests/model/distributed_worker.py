"""Training steps in each of several processes; run by test_distributed.py through torchrun, or alone for one process.

Usage: distributed_worker.py OUTPUT BACKBONE[+checkpointing]:SIZES ..., where SIZES are the images of each process, as
in "vit:4,2".
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.loading import enable_gradient_checkpointing
from tests.factories import NANO_VIT


BACKBONES = {
    "vit": NANO_VIT,
    "vit_bn": {**NANO_VIT, "mlp_norm": "batch_norm"},
    "conv_stem": {**NANO_VIT, "stem": "conv", "image_size": 32, "patch_size": 16, "num_hidden_layers": 1},
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 12],
        "depths": [1, 1],
        "layer_type": "bottleneck",
    },
}
HEADS = {"projection_dim": 8, "head_hidden_size": 16}


def main(output: str, cases: list[str]) -> None:
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size > 1:
        dist.init_process_group("gloo")
        assert dist.get_world_size() == world_size
    results = {}
    for case in cases:
        backbone, sizes = case.split(":")
        sizes = [int(size) for size in sizes.split(",")]
        assert world_size == len(sizes), f"expected {len(sizes)} processes, found {world_size}"
        results[case] = one_step(backbone, sizes, world_size, rank)
    if rank == 0:
        torch.save(results, output)
    if world_size > 1:
        dist.destroy_process_group()


def one_step(name: str, sizes: list[int], world_size: int, rank: int) -> dict:
    backbone, _, checkpointing = name.partition("+")
    torch.manual_seed(0)
    model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=BACKBONES[backbone], **HEADS)).double()
    if checkpointing:
        enable_gradient_checkpointing(model.mocov3)
    # Away from the start, where both branches agree and a ResNet's blocks are the identity.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    size = BACKBONES[backbone].get("image_size", 32)
    views = torch.randn(2, sum(sizes), 3, size, size, generator=generator, dtype=torch.float64)
    start = sum(sizes[:rank])
    mine = views[:, start : start + sizes[rank]]

    # Without the exchange of batch sizes, equal batches must give the same result.
    model.even_batches = len(set(sizes)) == 1
    trained = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model
    result = trained(pixel_values=mine[0], pixel_values_2=mine[1])
    result.loss.backward()
    loss = result.loss.detach().clone()
    top1 = result.positive_top1_1 * len(mine[0])
    if world_size > 1:
        dist.all_reduce(loss)
        loss /= world_size
        dist.all_reduce(top1)
    return {
        "loss": loss,
        "top1": top1 / sum(sizes),
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "buffers": dict(model.named_buffers()),
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
