"""Estimate the step time on 1 to 64 GPUs from the step time on one and from the bytes that processes exchange.

    python -m benchmarks.scaling --output benchmarks/results/scaling_assumed.json

The global batch is fixed and divided among the processes, as in training. Every collective is a ring (Patarasuk and
Yuan 2009) at the speed of its slowest link: NVLink inside a node of 8 GPUs, the network between nodes. Bandwidths,
latency and the speed of one GPU are assumptions; pass those of your machines. With overlap, gradients are exchanged
during the backward pass, which is half of the computation (two forward passes, and a backward pass that costs two).
With --step_json, the computation is the step time that step.py or step_gpu.py measured on one device (compiled, on a
GPU), in proportion to the number of images, instead of --tflops.
Prints a table in Markdown.
"""

import argparse
import json
from pathlib import Path

import torch

from mocov3_hf import MoCoV3ForPreTraining
from mocov3_hf.pretraining.build import build_config
from mocov3_hf.pretraining.estimate import Exchange, exchanges, multiply_adds
from mocov3_hf.pretraining.recipe import load_recipe


# Names in the result files of step.py and step_gpu.py.
BACKBONES = {"ResNet-50": "resnet50", "ViT-S": "vit_small", "ViT-B": "vit_base", "ViT-L": "vit_large"}
RECIPES = {
    "ResNet-50": "mocov3_resnet50_8xb512-amp-coslr-300e_in1k",
    "ViT-S": "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k",
    "ViT-B": "mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k",
    "ViT-L": "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k",
}
ASSUMED = ("ResNet-50", "ViT-B", "ViT-L")  # models in the table for an assumed GPU
NUM_PROCESSES = (1, 2, 4, 8, 16, 32, 64)
GPUS_PER_NODE = 8
# Two views; forward through both encoders, backward (twice the forward) through one; a multiply-add counts as two.
OPERATIONS_PER_MULTIPLY_ADD = 2 * 2 * (1 + 1 + 2)
BACKWARD_SHARE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tflops", type=float, default=316, help="TFLOP/s of one GPU; 316 is 32 %% of the bf16 peak of an H200"
    )
    parser.add_argument(
        "--step_json", type=Path, default=None, help="measured step times, from step.py, step_gpu.py or bench.py"
    )
    parser.add_argument("--precision", default="bf16", help="precision of the measured steps")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s of a ring inside a node")
    parser.add_argument(
        "--infiniband", type=float, default=200, help="GB/s between nodes; default: half of 8 × 400 Gbit/s"
    )
    parser.add_argument("--ethernet", type=float, default=10, help="GB/s of a ring between nodes on 100 GbE")
    parser.add_argument("--latency", type=float, default=30, help="microseconds per collective")
    parser.add_argument("--output", type=Path, default=None, help="file for the results")
    options = parser.parse_args()
    networks = {"InfiniBand": options.infiniband, "100 GbE": options.ethernet}
    measured = None
    if options.step_json is not None:
        measured = seconds_per_image(json.loads(options.step_json.read_text(encoding="utf-8")), options.precision)
        if not measured.keys() & BACKBONES.values():
            known = ", ".join(BACKBONES.values())
            parser.error(
                f"{options.step_json} has no step of {known} in {options.precision}: pass another --precision"
            )
    rows = [
        row
        for name, recipe in RECIPES.items()
        if (name in ASSUMED if measured is None else BACKBONES[name] in measured)
        for row in estimate_step_times(
            name,
            recipe,
            networks,
            options.tflops,
            options.nvlink,
            options.latency,
            None if measured is None else measured[BACKBONES[name]],
        )
    ]
    print(as_markdown(rows, list(networks)))
    if options.output is not None:
        unused = ("output", "step_json", "precision") if measured is None else ("output", "tflops")
        assumptions = {
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key not in unused
        }
        source = "assumed, not measured" if measured is None else "measured"
        report = {"single_gpu": source, "assumptions": assumptions, "rows": rows}
        options.output.write_text(f"{json.dumps(report, indent=2)}\n", encoding="utf-8")


def seconds_per_image(report: dict, precision: str) -> dict[str, float]:
    """Seconds per image on one device, by backbone; also reads the result file of bench.py."""
    steps = report["parts"]["step"]["result"] if "parts" in report else report
    return {
        point["backbone"]: seconds_of_point(point)
        for point in steps["points"]
        if point["mixed_precision"] == precision
    }


def seconds_of_point(point: dict) -> float:
    """Seconds per image of our step; on a GPU of the compiled step, if it was measured."""
    if "variants" not in point:
        return point["seconds_median"]["ours"] / point["batch"]
    variants = point["variants"]
    return 1 / variants["compiled" if "compiled" in variants else "ours"]["median"]


def estimate_step_times(name, recipe_name, networks, tflops, nvlink, latency, image_seconds=None) -> list[dict]:
    """Step time in ms for each number of processes and each network, with and without overlap."""
    recipe = load_recipe(recipe_name)
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(build_config(recipe))
        pixels = torch.zeros(1, 3, recipe.views.image_size, recipe.views.image_size)
        macs = multiply_adds(MoCoV3ForPreTraining(build_config(recipe)).mocov3, pixels)
    rows = []
    for number in NUM_PROCESSES:
        batch_size = recipe.optimization.train_batch_size // number
        if image_seconds is None:
            compute = OPERATIONS_PER_MULTIPLY_ADD * macs * batch_size / (tflops * 1e12)
        else:
            compute = image_seconds * batch_size
        row = {"model": name, "processes": number, "batch_size": batch_size, "compute_ms": compute * 1e3}
        exchanged = exchanges(model, batch_size, number)
        row["sent_mb"] = sum(exchange.sent_bytes(number) for exchange in exchanged) / 1e6
        for network, bandwidth in networks.items():
            slowest = nvlink if number <= GPUS_PER_NODE else min(nvlink, bandwidth)
            for key, overlap in (("without", False), ("with", True)):
                seconds = step_seconds(compute, exchanged, number, slowest * 1e9, latency * 1e-6, overlap)
                row[f"{network}, {key} overlap, ms"] = seconds * 1e3
        rows.append(row)
    return rows


def step_seconds(
    compute: float, exchanged: list[Exchange], num_processes: int, bandwidth: float, latency: float, overlap: bool
) -> float:
    """
    Estimated step time in seconds.

    Args:
        compute: Computation in seconds.
        exchanged: Collectives of a step.
        num_processes: Processes in the ring.
        bandwidth: Bytes per second of its slowest link.
        latency: Additional seconds per collective.
        overlap: Whether gradients are exchanged during the backward pass.
    """
    if num_processes == 1:
        return compute
    times = {e.name: e.sent_bytes(num_processes) / bandwidth + e.count * latency for e in exchanged}
    gradients = times.pop("gradients")
    if overlap:
        gradients = max(0.0, gradients - BACKWARD_SHARE * compute)
    return compute + sum(times.values()) + gradients


def as_markdown(rows: list[dict], networks: list[str]) -> str:
    columns = [f"{network}, {key} overlap" for network in networks for key in ("without", "with")]
    lines = [
        f"| model | GPUs | images per GPU | computation, ms | MB sent | {' | '.join(columns)} |",
        f"|---|---|---|---|---|{'---|' * len(columns)}",
    ]
    for row in rows:
        times = " | ".join(f"{row[f'{column}, ms']:.0f}" for column in columns)
        lines.append(
            f"| {row['model']} | {row['processes']} | {row['batch_size']} | {row['compute_ms']:.0f} |"
            f" {row['sent_mb']:.0f} | {times} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
