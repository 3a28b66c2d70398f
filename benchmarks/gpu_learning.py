"""CIFAR-10 on a GPU from start to annealed end within minutes: loss, kNN along the way, linear probe.

    python -m benchmarks.gpu_learning [--dataset_name FOLDER] [--time_budget 5m] --output FILE.json

Pre-trains with a recipe, whose schedule is made as long as the time budget allows, and fits logistic regression to the
frozen features. The result is written as it grows: after pre-training without the linear accuracy.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import mocov3_hf

from .data_path import finish
from .limits import REHEARSAL, cpu_name


# The folder "train" of a data set in memory has no kNN split of its own: both are named.
SPLITS = {"train_split": "train", "test_split": "test"}
TINY = {
    "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "head_hidden_size": 16,
    "projection_dim": 8,
    "image_size": 32,
    "train_batch_size": 16,
    "max_steps": 4,
    "warmup_epochs": 0,
    "knn_steps": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--recipe", default="cifar10_resnet14")
    parser.add_argument("--time_budget", default="5m", help="of pre-training")
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        finish(measure(options, Path(folder)), options.output)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    data, length = options.dataset_name, {"time_budget": options.time_budget, "knn_steps": 500}
    if REHEARSAL:
        from mocov3_hf.data.digits import write_digits

        data, length = str(write_digits(folder / "digits")), TINY
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "torch": torch.__version__,
        "recipe": options.recipe,
        "time_budget": options.time_budget,
    }
    speed = {"torch_compile": not REHEARSAL, "deterministic": False}
    run = mocov3_hf.pretrain(data, options.recipe, folder / "run", **speed, **length)
    metrics = run.metrics
    kept = [name for name in ("epoch", "loss", "learning_rate", "images_per_second", "knn_top1") if name in metrics]
    result["metrics"] = metrics.set_index("step")[kept].dropna(how="all").reset_index().to_dict("records")
    if options.output:
        finish(result, options.output)
    probe = mocov3_hf.linear_probe(run, data, output_dir=folder / "linear", cached=True, **SPLITS)
    return result | {"linear": probe.results, "linear_top1": probe.results["linear_top1"]}


if __name__ == "__main__":
    main()
