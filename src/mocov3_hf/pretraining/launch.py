"""What a launcher asked for, and the options of accelerate that follow from the method."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from accelerate import DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import nn

from ..reporting import UsageError
from ..requirements import check_tracker
from .recipe import NO_ACCUMULATION


# How accelerate asks a process to shard the model, which it does not do for a momentum encoder.
SHARDED_LAUNCHES = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism configuration": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


@dataclass
class DDPOptions(DistributedDataParallelKwargs):
    """accelerate's options of DDP, and the one that replaces `broadcast_buffers` in torch 2.14."""

    forward_sync_buffers: bool | None = None


def ddp_options() -> DDPOptions:
    """Running statistics are those of all processes already: there is nothing to broadcast in a step."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPOptions(gradient_as_bucket_view=True, **{name: False})


def check_launch(environment: Mapping[str, str]) -> None:
    """
    Refuse launches that would not do what was asked, or that the method does not support.

    `accelerate launch` sets a rendezvous address if several processes are asked for, but on CPUs without MPI it
    starts a single process without a warning.

    Raises:
        UsageError: such a launch, or one with gradient accumulation, a compiled or a sharded model.
    """
    for name, switch in SHARDED_LAUNCHES.items():
        if environment.get(switch, "false").lower() in ("true", "1"):
            raise UsageError(
                f"accelerate launch asks for {name}, which does not support a momentum encoder: leave it out of its"
                " configuration. For less memory pass --gradient_checkpointing true or --gradient_cache_chunk_size"
            )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if backend.upper() != "NO":
        raise UsageError(
            f"accelerate launch asks for torch.compile (dynamo_backend {backend.lower()}): leave it out of its"
            " configuration and pass --torch_compile true to pretrain"
        )
    asked_for_several = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    is_alone = not any(name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if asked_for_several and is_alone:
        raise UsageError(
            "accelerate launch was asked for several processes or machines and started one process, as it does on"
            " CPUs: start them with 'torchrun --nproc_per_node N -m mocov3_hf pretrain ...' (on each machine, with"
            " --nnodes), or pass --num_processes 1 --num_machines 1"
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps.strip() != "1":
        raise UsageError(f"{NO_ACCUMULATION}. accelerate launch sets it to {steps}: set it to 1 in its configuration")


def check_trackers(names: list[str]) -> list[str]:
    """
    Names of the trackers, without "none".

    Raises:
        UsageError: a tracker that is unknown or not installed.
    """
    names = [name for name in names if name != "none"]
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        check_tracker(name, LOGGER_TYPE_TO_CLASS, available)
    return names
