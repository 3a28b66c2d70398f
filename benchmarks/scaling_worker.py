"""Measure the step time of a small model; started by scaling_check.py, in one process or on two hosts.

Usage: scaling_worker.py OUTPUT. The first process writes the medians and the collectives of a step to OUTPUT.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.pretraining.estimate import exchanges
from mocov3_hf.pretraining.instability import GradientWatch
from mocov3_hf.pretraining.launch import ddp_options
from mocov3_hf.pretraining.step import train_step
from mocov3_hf.process_group import StopRequest


BACKBONE = {
    "model_type": "mocov3_vit",
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
HEADS = {"projection_dim": 64, "head_hidden_size": 256}
BATCH_SIZE = 8  # per process
WARM_UP_STEPS, STEPS, SMALL_EXCHANGES = 3, 15, 200


def main(output: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.ddp_handler = ddp_options()
    torch.manual_seed(0)
    model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=BACKBONE, **HEADS))
    exchanged = exchanges(model, BATCH_SIZE, accelerator.num_processes, on_gpu=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    watch = GradientWatch(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    views = torch.randn(2, BATCH_SIZE, 3, BACKBONE["image_size"], BACKBONE["image_size"])
    seconds = []
    with StopRequest() as stop:
        stop.start_training()
        for _ in range(WARM_UP_STEPS + STEPS):
            start = time.perf_counter()
            train_step(
                model,
                optimizer,
                (views[0], views[1]),
                learning_rate=1e-4,
                ema_decay=0.99,
                max_grad_norm=None,
                accelerator=accelerator,
                watch=watch,
            )
            stop.agreed(accelerator)
            seconds.append(time.perf_counter() - start)
    report = {
        "step_seconds": statistics.median(seconds[WARM_UP_STEPS:]),
        "latency_seconds": small_exchange_seconds() if accelerator.num_processes > 1 else 0.0,
        "exchanged": [dataclasses.asdict(exchange) for exchange in exchanged],
    }
    if accelerator.is_main_process:
        output.write_text(json.dumps(report), encoding="utf-8")
    accelerator.end_training()


def small_exchange_seconds() -> float:
    """Median time of an all-reduce of one number."""
    number, seconds = torch.zeros(1), []
    for _ in range(SMALL_EXCHANGES):
        start = time.perf_counter()
        dist.all_reduce(number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
