"""The device of this process, and the precision that is fast on it."""

import os

import torch

from .reporting import UsageError, warn


# What torch calls the instructions of a CPU for bfloat16: AVX-512 and AMX on x86, NEON and SVE on arm64.
CPU_BF16 = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")
BF16_CAPABILITY, FP16_CAPABILITY = 8, 7  # compute capability of Ampere, and of the first GPUs with tensor cores


def this_device() -> torch.device:
    """The kind of device that a run on this machine uses; with `accelerate launch --cpu`, the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def best_precision(device: torch.device) -> tuple[str, str]:
    """
    The value of `--mixed_precision` that is fast on a device and keeps the range of the gradients where it can.

    Args:
        device: "cpu", "cuda" (also AMD's GPUs), or another kind, such as "mps".

    Returns:
        "bf16" on GPUs of compute capability 8 or more and on CPUs with instructions for bfloat16, "fp16" on GPUs of
        capability 7 (V100, T4), "no" (float32) elsewhere, and the reason as a clause.
    """
    if device.type == "cpu":
        found = [name for name in CPU_BF16 if torch.cpu.get_capabilities().get(name, False)]
        return ("bf16", f"this CPU has {found[0]}") if found else ("no", "this CPU has no instructions for bfloat16")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        gpu = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor},"
        if major >= BF16_CAPABILITY:
            return "bf16", f"{gpu} has native bfloat16"
        if major >= FP16_CAPABILITY:
            return "fp16", f"{gpu} has float16 tensor cores and no native bfloat16"
        return "no", f"{gpu} has no tensor cores"
    return "no", f"half precision has not been measured on {device.type}"


def resolve_precision(asked: str, device: torch.device, saved: str | None = None) -> tuple[str, str]:
    """
    The precision that a command uses, with a warning about one that the device emulates.

    Args:
        asked: "auto", "no", "bf16" or "fp16".
        device: Of the run.
        saved: That of the checkpoint which a run resumes; "auto" keeps it.

    Returns:
        "no", "bf16" or "fp16", and the reason as a clause; no reason for a precision that was asked for.

    Raises:
        UsageError: fp16 on a CPU.
    """
    best, reason = best_precision(device)
    if asked != "auto":
        used, why, label = asked, "", f"--mixed_precision {asked}"
    elif saved is not None:
        used, why, label = saved, "as in the checkpoint", f"mixed_precision {saved}, as in the checkpoint,"
    else:
        return best, reason
    if used == "fp16" and device.type == "cpu":
        raise UsageError(f"{label} needs a GPU: use auto, bf16 or no on this machine")
    if used == "bf16" and best != "bf16" and device.type in ("cpu", "cuda"):
        warn(f"{label} is slow: {reason}, and emulates it; {best} is faster")
    return used, why
