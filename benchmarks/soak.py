"""
A long run of tiny steps with kNN, saves and data-loading workers: does memory, or anything else, grow?

    python benchmarks/soak.py --steps 2000 --output benchmarks/results/soak_cpu.json

A second process samples the run: resident memory of the main process and of its workers; open files, threads and
mapped files of /dev/shm of the main process; processes. Of every quantity, the medians of the second and the last
quarter of the steps are compared. Exits with 1 if one has grown by more than 5 % and more than a small constant.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image


BACKBONE = (
    '{"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}'
)
# What may be gained without a leak: an allocator that rounds up, a file that is being written.
SLACK = {"main_MB": 5, "workers_MB": 5, "files": 3, "threads": 2, "processes": 1, "shm_files": 8, "shm_MB": 4}


def write_images(folder: Path) -> Path:
    """48 images for training and 16 for testing, of two classes."""
    rng = np.random.default_rng(0)
    for split, number in {"train": 24, "test": 8}.items():
        for label, level in {"bright": 180, "dark": 0}.items():
            (folder / split / label).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 60, (48, 48, 3)) + level
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{index}.jpg")
    return folder


def start(steps: int, data: Path, output_dir: Path) -> subprocess.Popen:
    options = {
        "recipe": "quickstart",
        "dataset_name": data,
        "output_dir": output_dir,
        "backbone_config": BACKBONE,
        "head_hidden_size": 16,
        "projection_dim": 8,
        "train_batch_size": 8,
        "max_steps": steps,
        "save_steps": 25,
        "save_total_limit": 2,
        "logging_steps": 5,
        "knn_steps": 50,
        "knn_k": 3,
        "dataloader_num_workers": 2,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "mocov3_hf", "pretrain", *words]
    log = (output_dir.parent / "log").open("w")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def sample(process: psutil.Process) -> dict[str, float]:
    children = process.children(recursive=True)
    memory = 0
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            memory += child.memory_info().rss
    # Batches in shared memory are mapped files that have no name any more.
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    shared = [line.split()[0].split("-") for line in maps if "/dev/shm/torch_" in line]
    return {
        "main_MB": process.memory_info().rss / 1e6,
        "workers_MB": memory / 1e6,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "processes": 1 + len(children),
        "shm_files": len(shared),
        "shm_MB": sum(int(end, 16) - int(begin, 16) for begin, end in shared) / 1e6,
    }


def last_step(metrics: Path) -> int:
    try:
        lines = metrics.read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, ValueError):  # not yet, or a line that is being written
        return 0


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="steps of the run")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between samples")
    parser.add_argument("--output", type=Path, help="write the results here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        folder = Path(name)
        started = time.perf_counter()
        run = start(options.steps, write_images(folder / "data"), folder / "run")
        process, samples = psutil.Process(run.pid), []
        while run.poll() is None:
            step = last_step(folder / "run" / "metrics.jsonl")
            with contextlib.suppress(psutil.NoSuchProcess):
                if step:
                    samples.append((step, sample(process)))
            time.sleep(options.interval)
        if run.returncode != 0:
            print((folder / "log").read_text()[-3000:])
            return 1
        seconds = time.perf_counter() - started
    quarters = [[], [], [], []]
    for step, found in samples:
        quarters[min(3, step * 4 // options.steps)].append(found)
    results = {"steps": options.steps, "seconds": round(seconds), "samples": len(samples), "quantities": {}}
    for name, slack in SLACK.items():
        medians = [round(statistics.median(found[name] for found in quarter), 2) for quarter in quarters if quarter]
        grown = medians[-1] - medians[1] > max(slack, 0.05 * medians[1])
        results["quantities"][name] = {
            "medians_of_quarters": medians,
            "max": round(max(found[name] for _, found in samples), 2),
            "flat": not grown,
        }
    text = json.dumps(results, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    return int(not all(found["flat"] for found in results["quantities"].values()))


if __name__ == "__main__":
    sys.exit(main())
