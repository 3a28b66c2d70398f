"""Profile of a training step on a GPU, by kind of kernel (step_gpu.py --profile)."""

from collections.abc import Callable

from limits import clock
from torch.profiler import ProfilerActivity, profile


# Kind of a kernel, by the first of these words that its name contains.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "dot_do_o", "convert_dq"),
    "convolutions": ("conv", "cudnn", "implicit", "wgrad", "dgrad", "fprop", "nhwc"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "fused by the compiler": ("triton",),
    "optimizer and EMA": ("multi_tensor", "foreach", "fusedadam", "adam"),
    "copies": ("memcpy", "memset", "copy"),
    "batch norm": ("batch_norm", "bn_"),
    "layer norm": ("layer_norm", "layernorm"),
    "elementwise": ("elementwise", "reduce", "softmax", "cat"),
}


def where_time_goes(name: str, step: Callable[[], object], device: str, steps: int = 3) -> dict:
    """Profile: share of the time in which the device is busy, shares by kind of kernel, and the longest kernels."""
    for _ in range(2):
        step()
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        wall = clock(lambda: [step() for _ in range(steps)], device)
    kernels = {
        event.key: getattr(event, f"self_{'device' if device == 'cuda' else 'cpu'}_time_total") / 1e6
        for event in profiler.key_averages()
    }
    busy = sum(kernels.values())
    kinds: dict[str, float] = {}
    for kernel, seconds in kernels.items():
        kind = kind_of(kernel)
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:25]
    result = {
        "seconds_per_step": wall / steps,
        "busy": busy / wall,
        "shares_of_busy": {kind: seconds / busy for kind, seconds in sorted(kinds.items(), key=lambda item: -item[1])},
        "longest_ms_per_step": {name[:120]: 1e3 * seconds / steps for name, seconds in longest},
    }
    print(f"profile of {name}: busy {result['busy']:.2f}, " + str(result["shares_of_busy"]), flush=True)
    return result


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
