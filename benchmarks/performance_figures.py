"""What the figures of bench.py come to: ratios of neighbouring rounds, and the fractions that they reach of a limit.

Ratios and fractions are formed round by round, of turns next to each other; then their median is taken.
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
    "sum": "sum of large tensors in place",
}


class Spread(NamedTuple):
    """Of the rounds."""

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
    """Of neighbouring rounds."""
    return spread([a / b for a, b in zip(of, over, strict=True)])


def plain_and_ours(seconds: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    return seconds["plain"], seconds["ours"]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def result(results: dict, part: str) -> dict | None:
    """What a part wrote, `None` where it was not run or failed."""
    return results["parts"][part]["result"] if part in results["parts"] else None


def step_reached(point: dict, who: str) -> Spread:
    """Least time of the step's operations at the rate of its limit in the same round, over the time measured."""
    flop, limit = point["flop_per_image"][who] * point["batch"], point["limit"]
    least = [flop * seconds / limit["flop"] for seconds in limit["seconds"]]
    return ratio(least, point["cpu_seconds"][who])


def update_reached(point: dict, who: str) -> Spread:
    """The same for bytes."""
    least = [point["bytes"] * seconds / point["limit_bytes"] for seconds in point["seconds"]["limit"]]
    return ratio(least, point["seconds"][who])


def limit_rates(point: dict) -> Spread:
    """Of a step's limit, in GFLOP/s."""
    return spread([point["limit"]["flop"] / seconds / 1e9 for seconds in point["limit"]["seconds"]])


def step_name(point: dict) -> str:
    return f"{NAMES[point['backbone']]}, {PRECISIONS[point['mixed_precision']]}"


def variant_of(point: dict) -> str:
    """Of a step on a GPU: the compiled one, if it was measured, stands for ours."""
    return "compiled" if "compiled" in point["variants"] else "ours"


def gpu_times_plain(point: dict, variant: str) -> Spread:
    """Of a variant of the step on a GPU, turn by turn."""
    return ratio(*(point["variants"][name]["images_per_second"] for name in (variant, "plain")))


def gpu_step_reached(point: dict, variant: str) -> Spread:
    """Rate of the operations computed, over the rate of the matrix product in the same run."""
    figures = point["variants"][variant]
    return spread([figures["of_limit"] * rate / figures["median"] for rate in figures["images_per_second"]])
