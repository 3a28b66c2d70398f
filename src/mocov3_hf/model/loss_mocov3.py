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
"""The InfoNCE loss of MoCo v3 (paper, equation 1 and algorithm 1) over the keys of all processes."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

from .batchnorm_mocov3 import num_processes


@dataclass
class ContrastiveOutput:
    """
    One direction of the loss. All tensors are 0-dimensional.

    Args:
        loss: `2T · CE(q̂ · k̂ᵀ / T)`, the mean over the queries of this process.
        positive_similarity: mean cosine similarity of a query and its positive.
        positive_top1: fraction of the queries whose positive is the most similar of all keys.
    """

    loss: torch.Tensor
    positive_similarity: torch.Tensor
    positive_top1: torch.Tensor


def contrastive_loss(
    query: torch.Tensor, key: torch.Tensor, temperature: float, even_batches: bool = False
) -> ContrastiveOutput:
    """
    `ctr(q, k)` of the paper, multiplied by `2T` as in the official code.

    The logits are computed in float32 or float64, also under autocast: at `T = 0.2`, half precision is not enough.

    Args:
        query (`torch.Tensor` of shape `(B, P)`):
            Predictions of one view.
        key (`torch.Tensor` of shape `(B, P)`):
            Projections of the other view by the momentum encoder. Row `i` is the positive of query `i`. They get no
            gradient (stop-gradient).
        temperature (`float`):
            `T`.
        even_batches (`bool`, *optional*, defaults to `False`):
            Whether `B` is the same on all processes, which saves an exchange of batch sizes. Otherwise, each process
            weights its loss so that the mean over the processes is the mean over all queries.
    """
    with torch.autocast(device_type=query.device.type, enabled=False):
        query, key = (F.normalize(at_least_float32(vectors), dim=1) for vectors in (query, key.detach()))
        keys, first, weight = gather_keys(key, even_batches)
        logits = query @ keys.T / temperature
        positives = first + torch.arange(len(query), device=query.device)
        loss = 2 * temperature * F.cross_entropy(logits, positives) * weight
    with torch.no_grad():
        positive_similarity = (query * key).sum(dim=1).mean()
        positive_top1 = (logits.argmax(dim=1) == positives).float().mean()
    return ContrastiveOutput(loss, positive_similarity, positive_top1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def gather_keys(key: torch.Tensor, even_batches: bool = False) -> tuple[torch.Tensor, int, float]:
    """
    Gather the keys of all processes.

    Returns:
        The keys `(sum of B, P)` in the order of ranks, the row of the first key of this process, and the weight of
        the loss of this process.
    """
    if num_processes() == 1:
        return key, 0, 1.0
    key, rank = key.contiguous(), dist.get_rank()
    sizes = [len(key)] * num_processes() if even_batches else gather_sizes(key)
    gathered = [key.new_empty(size, key.shape[1]) for size in sizes]
    if len(set(sizes)) == 1:
        dist.all_gather(gathered, key)
    else:
        # gloo and NCCL gather equal shapes only. Other shapes take one broadcast per process.
        gathered[rank] = key
        for source, keys in enumerate(gathered):
            dist.broadcast(keys, src=source)
    return torch.cat(gathered), sum(sizes[:rank]), len(key) * len(sizes) / sum(sizes)


def gather_sizes(key: torch.Tensor) -> list[int]:
    """Batch sizes of all processes."""
    sizes = torch.zeros(num_processes(), dtype=torch.int64, device=key.device)
    sizes[dist.get_rank()] = len(key)
    dist.all_reduce(sizes)
    return sizes.tolist()


def chance_loss(temperature: float, global_batch_size: int) -> float:
    """Loss of both directions if all keys are equally similar to a query: `4T · ln(batch)`."""
    return 4 * temperature * math.log(global_batch_size)


def floor_loss(temperature: float, global_batch_size: int) -> float:
    """Loss of both directions if positives are identical and negatives are orthogonal."""
    return 4 * temperature * math.log1p((global_batch_size - 1) * math.exp(-1 / temperature))


__all__ = ["ContrastiveOutput", "chance_loss", "contrastive_loss", "floor_loss"]
