"""Hardware limits of this machine: matrix products, convolutions and memory bandwidth, on one core or a GPU.

    python benchmarks/limits.py [--device cuda] [--rounds 5] [--output FILE.json]

Matrix products and convolutions in float32 and bf16, in GFLOP/s (a multiply-add counts as two). The copy of a tensor
larger than any cache, and the in-place sum of two, in GB/s read and written. A copy moves more than it counts, because
a processor also reads the cache lines that it overwrites; the in-place sum is therefore the limit of in-place work.
step.py and updates.py measure the limits again between their own rounds. The last line is JSON with every round.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining


# Tiny shapes instead of real ones, to rehearse gpu_session.py.
REHEARSAL = os.environ.get("MOCOV3_REHEARSAL") == "1"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
# Side of the square matrices. On a CPU the rate is the same within noise from 512 on, and for the shapes of ViT-S.
GEMM_SIDE = {"cpu": 128 if REHEARSAL else 2048, "cuda": 8192}
GEMM_REPEATS = {"cpu": 4, "cuda": 20}
# Size of each tensor that is copied or added: much larger than the caches.
TENSOR_BYTES = {"cpu": 2**28, "cuda": 2**31}
# Input of a 3×3 convolution in ResNet-50's second stage: B, C, H, W.
CONVOLUTION = {"cpu": (1 if REHEARSAL else 16, 128, 28, 28), "cuda": (256, 128, 28, 28)}


class Gemm:
    """Linear layers on square matrices in one precision; a call computes `flop` operations."""

    def __init__(self, mixed_precision: str, device: str = "cpu"):
        side, self.repeats = GEMM_SIDE[device], GEMM_REPEATS[device]
        generator = torch.Generator().manual_seed(0)
        matrices = torch.randn(2, side, side, generator=generator).to(device, DTYPES[mixed_precision])
        self.inputs, self.weight = matrices[0].contiguous(), matrices[1].contiguous()
        self.flop = self.repeats * 2 * side**3

    def __call__(self, *_) -> None:
        for _ in range(self.repeats):
            F.linear(self.inputs, self.weight)


class Convolution:
    """3×3 convolutions of a channels_last batch, as in ResNet-50."""

    def __init__(self, mixed_precision: str, device: str = "cpu"):
        batch, channels, height, width = CONVOLUTION[device]
        self.repeats = 8
        dtype = DTYPES[mixed_precision]
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(batch, channels, height, width, generator=generator).to(device, dtype)
        self.images = self.images.to(memory_format=torch.channels_last)
        self.weight = torch.randn(channels, channels, 3, 3, generator=generator).to(device, dtype)
        self.weight = self.weight.to(memory_format=torch.channels_last)
        self.flop = self.repeats * 2 * batch * height * width * channels**2 * 9

    def __call__(self, *_) -> None:
        for _ in range(self.repeats):
            F.conv2d(self.images, self.weight, padding=1)


class Copy:
    """Copy of a large tensor; `bytes` counts reads and writes."""

    def __init__(self, device: str = "cpu"):
        self.source = torch.zeros(TENSOR_BYTES[device] // 4, device=device)
        self.target = torch.zeros_like(self.source)
        self.bytes = 2 * TENSOR_BYTES[device]

    def __call__(self, *_) -> None:
        self.target.copy_(self.source)


class Sum(Copy):
    """In-place sum of two large tensors; `bytes` counts two reads and one write."""

    def __init__(self, device: str = "cpu"):
        super().__init__(device)
        self.bytes = 3 * TENSOR_BYTES[device]

    def __call__(self, *_) -> None:
        self.target.add_(self.source)


def clock(function: Callable[[], object], device: str) -> float:
    """CPU seconds of this process, or wall-clock seconds on a GPU, synchronized at both ends."""
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(device: str, rounds: int) -> dict[str, dict]:
    """Rates of all limits. They alternate; the first round is a warm-up."""
    limits = {}
    for mixed_precision in DTYPES:
        limits[f"gemm_{mixed_precision}"] = Gemm(mixed_precision, device)
        limits[f"convolution_{mixed_precision}"] = Convolution(mixed_precision, device)
    limits |= {"copy": Copy(device), "sum": Sum(device)}
    seconds: dict[str, list[float]] = {name: [] for name in limits}
    for index in range(rounds + 1):
        for name, limit in limits.items():
            taken = clock(limit, device)
            if index:
                seconds[name].append(taken)
        print(f"limits: round {index}/{rounds}", file=sys.stderr, flush=True)
    return {
        name: {
            "unit": "GB/s" if isinstance(limit, Copy) else "GFLOP/s",
            "rates": [(limit.bytes if isinstance(limit, Copy) else limit.flop) / t / 1e9 for t in seconds[name]],
        }
        for name, limit in limits.items()
    }


def step_flop_per_image(config: MoCoV3Config, image_size: int, pooled_query_only: bool) -> float:
    """
    FLOPs of a pre-training step per image, for both views: the matrix products and convolutions that are computed,
    forward in both branches and backward in the trained one (no gradient of pixels or of a frozen patch projection).
    Norms, activations and the optimizer are not counted. A multiply-add counts as two.
    """
    batch = 2
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(config)
    if model.mocov3.backbone._supports_attention_backend:
        model.set_attn_implementation("eager")  # its matrix products are counted on every device
    model.pooled_query_only = pooled_query_only
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        model.to_empty(device="cpu")  # shapes only; autocast does not support the device "meta"
        views = torch.zeros(2, batch, 3, image_size, image_size)
        model(pixel_values=views[0], pixel_values_2=views[1]).loss.backward()
    return counter.get_total_flops() / batch


def cpu_name() -> str:
    """The CPU model that the operating system reports."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "limits": measure(options.device, options.rounds),
    }
    for name, limit in result["limits"].items():
        print(f"{name}: {statistics.median(limit['rates']):.1f} {limit['unit']}, best {max(limit['rates']):.1f}")
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(f"{json.dumps(result, indent=1)}\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
