"""Counts what one training step really exchanges; run by test_communication.py in two processes.

Usage: communication_worker.py OUTPUT, which gets, for each case, the bytes counted and those predicted.
"""

import dataclasses
import json
import sys
from collections import Counter
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.pretraining.estimate import exchanges
from mocov3_hf.pretraining.launch import ddp_options
from mocov3_hf.pretraining.step import train_step
from mocov3_hf.process_group import StopRequest
from tests.model.distributed_worker import BACKBONES, HEADS


BATCH_SIZE = 4
KINDS = {  # no other operation belongs into a step
    "allreduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
}


class Counted(TorchDispatchMode):
    """Bytes and number of the collective operations of every kind, those of DDP's reducer among them."""

    def __init__(self):
        super().__init__()
        self.num_bytes, self.count = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            kind = KINDS[name]
            # The tensors of whole size: what is gathered or summed in place.
            wholes = {
                "allreduce_": lambda: arguments[0],
                "allgather_": lambda: arguments[0][0],
                "_allgather_base_": lambda: arguments[:1],
            }[name]()
            self.num_bytes[kind] += sum(tensor.nbytes for tensor in wholes)
            self.count[kind] += 1
        return function(*arguments, **(keywords or {}))


def main(output: str) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.ddp_handler = ddp_options()
    assert accelerator.num_processes == 2
    results = {}
    for backbone in BACKBONES:
        for chunk_size in (None, 2) if backbone == "vit" else (None,):
            results[f"{backbone}, chunks of {chunk_size}"] = count(accelerator, backbone, chunk_size)
    if accelerator.is_main_process:
        with open(output, "w", encoding="utf-8") as file:
            json.dump(results, file)
    accelerator.end_training()


def count(accelerator: Accelerator, backbone: str, chunk_size: int | None) -> dict:
    model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=BACKBONES[backbone], **HEADS))
    predicted = exchanges(model, BATCH_SIZE, accelerator.num_processes, on_gpu=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    size = BACKBONES[backbone].get("image_size", 32)
    views = torch.randn(2, BATCH_SIZE, 3, size, size)
    with StopRequest() as stop:
        stop.start_training()
        counted = Counted()
        # Before its second step DDP rebuilds its buckets and broadcasts them, once in a run.
        for watcher in (nullcontext(), nullcontext(), counted):
            with watcher:
                train_step(
                    model,
                    optimizer,
                    (views[0], views[1]),
                    learning_rate=1e-3,
                    ema_decay=0.99,
                    max_grad_norm=1.0,
                    accelerator=accelerator,
                    gradient_cache_chunk_size=chunk_size,
                )
                stop.agreed(accelerator)
    return {
        "predicted": [dataclasses.asdict(exchange) for exchange in predicted],
        "counted": {kind: [counted.count[kind], counted.num_bytes[kind]] for kind in counted.count},
    }


if __name__ == "__main__":
    main(sys.argv[1])
