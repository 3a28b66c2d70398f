"""The automatic plan beside hand-tuned recipes: kNN accuracy after the same number of images seen.

digits       handwritten digits as images, beside the recipe quickstart
radiographs  digits as 16-bit grayscale PNG (benchmarks/channels.py), beside the settings there
cifar10_5k   5,000 images of CIFAR-10, beside cifar10_vit-nano-p8_small-data
cifar10      50,000 images, beside cifar10_vit-nano-p8

    python -m benchmarks.auto_plan --work_dir DIR [--cifar10 FOLDER] [--output benchmarks/results/auto_plan_cpu.json]
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.channels import OPTIONS, write_radiographs
from benchmarks.limits import cpu_name
from mocov3_hf import knn, pretrain
from mocov3_hf.data.digits import write_digits


K = 20
SEEDS = (0, 1)


def measure(data: str, options: Mapping[str, Any], folder: Path, splits: Mapping[str, str]) -> dict[str, Any]:
    """Pre-train and classify the test split; CPU seconds of the training, and what the recipe is."""
    start = time.process_time()
    run = pretrain(data, output_dir=folder, **options)
    seconds = time.process_time() - start
    found = knn(run, data, k=[K], **splits)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    keys = ("backbone_config", "image_size", "crop_scale", "train_batch_size", "num_train_epochs", "base_learning_rate")
    return {
        "knn_top1": found[f"knn{K}_top1"],
        "cpu_seconds": seconds,
        "recipe": {key: recipe[key] for key in (*keys, "ema_decay", "warmup_epochs", "flip_probability")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--cifar10", help="CIFAR-10 as parquet; the Hub's if left out", default="uoft-cs/cifar10")
    parser.add_argument("--only", nargs="+", help="names of the data sets to use")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    digits, radiographs = args.work_dir / "digits", args.work_dir / "radiographs"
    if not digits.exists():
        write_digits(digits)
    if not radiographs.exists():
        write_radiographs(radiographs)
    both = {"train_split": "train", "test_split": "test"}
    few = {"train_split": "train[:5000]", "test_split": "test"}
    small = {"train_split": "train[:5000]"}
    cases = {
        "digits": (str(digits), {"recipe": "quickstart", "num_train_epochs": 36}, {}, both),
        "radiographs": (str(radiographs), {**OPTIONS, "num_train_epochs": 36}, {}, both),
        "cifar10_5k": (args.cifar10, {"recipe": "cifar10_vit-nano-p8_small-data", "num_train_epochs": 10}, small, few),
        "cifar10": (args.cifar10, {"recipe": "cifar10_vit-nano-p8", "num_train_epochs": 1}, {}, both),
    }
    results: dict[str, Any] = {"hardware": {"cpu": cpu_name(), "cpu_count": os.cpu_count()}, "k": K, "sets": {}}
    for name, (data, tuned, common, splits) in cases.items():
        if args.only and name not in args.only:
            continue
        rows = []
        for seed in args.seeds:
            shared = {**common, "seed": seed, "save_steps": 10_000}
            # The same number of images seen, and no evaluation in between. All else is chosen.
            auto = {"num_train_epochs": tuned["num_train_epochs"], "knn_steps": None, **shared}
            scaled = {**tuned, "warmup_epochs": tuned["num_train_epochs"] / 10, **shared}
            folder = args.work_dir / "runs" / f"{name}_{seed}"
            row = {
                "seed": seed,
                "automatic": measure(data, auto, folder.with_name(f"{folder.name}_automatic"), splits),
                "tuned": measure(data, scaled, folder.with_name(f"{folder.name}_tuned"), splits),
            }
            rows.append(row)
            print(name, seed, row["automatic"]["knn_top1"], row["tuned"]["knn_top1"], flush=True)
            results["sets"][name] = rows
            if args.output is not None:
                args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
