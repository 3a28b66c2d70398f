"""The automatic plan against hand-tuned recipes: kNN accuracy after the same number of images seen.

digits       handwritten digits, 8-bit grayscale, 1,438 images of 32 pixels; the recipe quickstart
cifar10      5,000 color images of 32 pixels; the recipe cifar10_vit-nano-p8_small-data with 10 epochs
cifar10_all  all 50,000 of them; the recipe cifar10_vit-nano-p8 with 2 epochs
radiographs  12-bit grayscale, 16 pixels; the options of benchmarks/channels.py
bands        5 float channels with NaN, 16 pixels; the options of benchmarks/channels.py

    python -m benchmarks.auto_plan --work_dir DIR [--cifar10 FOLDER] [--only NAME ...]

Each data set adds its part to the output file.
"""

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import mocov3_hf
from benchmarks.channels import CHANGES, OPTIONS, write_bands, write_radiographs
from mocov3_hf.data.digits import write_digits
from mocov3_hf.pretraining.checkpoint import read_state
from mocov3_hf.pretraining.probe import automatic_recipe
from mocov3_hf.run_folder import list_checkpoints, read_run_folder


OUTPUT = Path(__file__).parent / "results" / "auto_plan_cpu.json"
SETS = ("digits", "cifar10", "cifar10_all", "radiographs", "bands")
K = 20


def hand_tuned(name: str) -> dict[str, Any]:
    """The recipe and its options."""
    if name == "digits":
        return {"recipe": "quickstart"}
    if name == "cifar10":
        return {"recipe": "cifar10_vit-nano-p8_small-data", "num_train_epochs": 10, "warmup_epochs": 1}
    if name == "cifar10_all":
        return {"recipe": "cifar10_vit-nano-p8", "num_train_epochs": 2, "warmup_epochs": 0.2}
    channels = {"radiographs": 1, "bands": 5}[name]
    return OPTIONS | CHANGES.get(name, {}) | {"num_channels": channels, "num_train_epochs": 24}


def write_images(name: str, folder: Path, cifar10: str) -> str:
    """Path of the data set."""
    if name in ("cifar10", "cifar10_all"):
        return cifar10
    if not folder.exists():
        {"digits": write_digits, "radiographs": write_radiographs, "bands": write_bands}[name](folder)
    return str(folder)


def measure(data: str, folder: Path, splits: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    started = time.process_time()
    run = mocov3_hf.pretrain(data, output_dir=folder, train_split=splits["train_split"], **options)
    seconds = time.process_time() - started
    state = read_state(list_checkpoints(folder)[0])
    if state.step < state.total_steps:
        raise SystemExit(f"{folder} was stopped after step {state.step} of {state.total_steps}: nothing to compare")
    recipe = read_run_folder(folder).recipe
    found = mocov3_hf.knn(run, data, k=[K], **splits)
    return {
        f"knn{K}_top1": found[f"knn{K}_top1"],
        "pretraining_cpu_seconds": round(seconds, 1),
        "steps": state.total_steps,
        "recipe": {name: recipe[name] for name in PLANNED},
    }


PLANNED = (
    *("backbone_config", "image_size", "crop_scale", "flip_probability", "blur_sigma", "blur_probability_1"),
    *("grayscale_probability", "base_learning_rate", "train_batch_size", "num_train_epochs", "warmup_epochs"),
    *("max_steps", "ema_decay", "mixed_precision"),
)


def compare(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    data = write_images(name, chosen.work_dir / name, chosen.cifar10)
    splits = {"train_split": "train", "test_split": "test"}
    if name == "cifar10":
        splits = {"train_split": "train[:5000]", "test_split": "test[:2000]"}
    by_hand = measure(data, chosen.work_dir / f"{name}_by_hand", splits, hand_tuned(name))
    samples = by_hand["steps"] * by_hand["recipe"]["train_batch_size"]
    asked = {
        "dataset_name": data,
        "train_split": splits["train_split"],
        "num_channels": hand_tuned(name).get("num_channels"),
    }
    asked = {option: value for option, value in asked.items() if value is not None}
    batch = automatic_recipe({**asked, "dry_run": True}, time.time()).optimization.train_batch_size
    channels = {option: value for option, value in asked.items() if option == "num_channels"}
    automatic = measure(data, chosen.work_dir / f"{name}_auto", splits, {"max_steps": samples // batch, **channels})
    difference = automatic[f"knn{K}_top1"] - by_hand[f"knn{K}_top1"]
    return {"images_seen": samples, "automatic": automatic, "by_hand": by_hand, "difference": round(difference, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--cifar10", default="uoft-cs/cifar10")
    parser.add_argument("--only", nargs="*", choices=SETS, default=SETS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args()
    results = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    results |= {"machine": platform.machine(), "cpu_count": os.cpu_count()}
    for name in chosen.only:
        results[name] = compare(name, chosen)
        chosen.output.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results[name], indent=2))


if __name__ == "__main__":
    main()
