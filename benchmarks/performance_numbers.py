"""Speedups and fractions of the hardware limit, computed from the results of bench.py.

Each ratio is computed per round, from measurements taken next to each other. The median over rounds is reported.
"""

import statistics
from typing import NamedTuple


NAMES = {"vit_small": "ViT-S/16", "vit_base": "ViT-B/16", "resnet50": "ResNet-50"}
PRECISIONS = {"no": "float32", "bf16": "bf16"}
OPERATIONS = {"Gemm": "matrix product", "Convolution": "3×3 convolution"}
LIMITS = {
    "gemm_no": "matrix product, float32",
    "gemm_bf16": "matrix product, bf16",
    "convolution_no": "3×3 convolution, float32",
    "convolution_bf16": "3×3 convolution, bf16",
    "copy": "copy of a large tensor",
    "sum": "in-place sum of large tensors",
}


class Spread(NamedTuple):
    """Median, minimum and maximum over the rounds."""

    median: float
    least: float
    most: float

    def text(self, digits: int = 2, factor: float = 1.0) -> str:
        median, least, most = (f"{factor * value:.{digits}f}" for value in self)
        return median if least == most else f"{median} ({least}–{most})"

    def percent(self) -> str:
        return f"{self.text(0, 100)} %"


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratio(of: list[float], over: list[float]) -> Spread:
    """Spread of the ratios, round by round."""
    return spread([a / b for a, b in zip(of, over, strict=True)])


def plain_and_ours(seconds: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    return seconds["plain"], seconds["ours"]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def result(results: dict, part: str) -> dict | None:
    """The result of a part; `None` if it did not run or failed."""
    return results["parts"][part]["result"] if part in results["parts"] else None


def step_reached(point: dict, who: str) -> Spread:
    """Fraction of the limit: the step's operations at the limit's rate in the same round, over the measured time."""
    flop, limit = point["flop_per_image"][who] * point["batch"], point["limit"]
    least = [flop * seconds / limit["flop"] for seconds in limit["seconds"]]
    return ratio(least, point["cpu_seconds"][who])


def update_reached(point: dict, who: str) -> Spread:
    """Fraction of memory bandwidth: time of the bytes at the limit's rate, over the measured time."""
    least = [point["bytes"] * seconds / point["limit_bytes"] for seconds in point["seconds"]["limit"]]
    return ratio(least, point["seconds"][who])


def limit_rates(point: dict) -> Spread:
    """Rate of a step's limit, in GFLOP/s."""
    return spread([point["limit"]["flop"] / seconds / 1e9 for seconds in point["limit"]["seconds"]])


def step_name(point: dict) -> str:
    return f"{NAMES[point['backbone']]}, {PRECISIONS[point['mixed_precision']]}"


def variant_of(point: dict) -> str:
    """The variant that represents ours on a GPU: the compiled one if it was measured."""
    return "compiled" if "compiled" in point["variants"] else "ours"


def gpu_times_plain(point: dict, variant: str) -> Spread:
    """Speedup of a variant on a GPU over the plain step, round by round."""
    return ratio(*(point["variants"][name]["images_per_second"] for name in (variant, "plain")))


def gpu_step_reached(point: dict, variant: str) -> Spread:
    """Fraction of the limit: rate of the computed operations, over the limit's rate in the same run."""
    measured = point["variants"][variant]
    return spread([measured["of_limit"] * rate / measured["median"] for rate in measured["images_per_second"]])
