"""Kill pre-training runs at random moments, resume them, and compare the final weights with an uninterrupted run.

    python benchmarks/chaos.py --kills 50

Every configuration (processes, data, precision, optimizer) first runs without interruption. A second run is killed
with SIGKILL at random times, also inside saves, and resumed until its share of the kills is used up; then it finishes.
The final weights must be bit-identical. Prints one line per kill and a JSON object on the last line. Exits with 1 if
any weight differs.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Picture
from safetensors.torch import load_file


SCRIPT = Path(__file__).parent.parent / "scripts" / "pretrain.py"
VIT = '{"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}'
RESNET = '{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}'
ADAMW = ["--optimizer", "adamw", "--backbone_config", VIT]
LARS = ["--optimizer", "lars", "--base_learning_rate", "0.3", "--backbone_config", RESNET]
# name: (processes, options). Together they cover every value of each dimension, in several combinations.
KINDS = {
    "1 process, files, fp32, AdamW": (1, ["--mixed_precision", "no", *ADAMW]),
    "1 process, stream, bf16, AdamW": (1, ["--mixed_precision", "bf16", "--streaming", *ADAMW]),
    "1 process, files, bf16, LARS": (1, ["--mixed_precision", "bf16", *LARS]),
    "2 processes, files, bf16, AdamW": (2, ["--mixed_precision", "bf16", *ADAMW]),
    "2 processes, stream, fp32, LARS": (2, ["--mixed_precision", "no", "--streaming", *LARS]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--kills", type=int, default=50, help="total number of kills, divided among the configurations"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of every run")
    parser.add_argument(
        "--save_steps", type=int, default=3, help="steps between checkpoints; small, so that kills hit saves"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    report = {"kills": 0, "kills_in_a_save": 0, "kinds": {}}
    with tempfile.TemporaryDirectory(prefix="chaos_") as folder:
        data = write_shards(Path(folder) / "data")
        for index, (kind, (num_processes, settings)) in enumerate(KINDS.items()):
            kills = options.kills // len(KINDS) + (index < options.kills % len(KINDS))
            run = Killable(Path(folder) / str(index), data, num_processes, settings, options)
            report["kinds"][kind] = run.torment(kind, kills, moments)
            report["kills"] += run.kills
            report["kills_in_a_save"] += run.kills_in_a_save
    report["identical"] = all(result["identical"] for result in report["kinds"].values())
    print(json.dumps(report))
    sys.exit(0 if report["identical"] else 1)


class Killable:
    """One configuration: an uninterrupted run in one folder, a killed one in another."""

    def __init__(self, folder: Path, data: Path, num_processes: int, settings: list[str], options):
        self.straight, self.killed = folder / "straight", folder / "killed"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        self.command = [
            sys.executable,
            *(launcher if num_processes > 1 else []),
            str(SCRIPT),
            "--recipe",
            "quickstart",
        ]
        self.command += ["--dataset_name", str(data), "--max_steps", str(options.steps), *settings]
        self.command += [
            "--save_steps",
            str(options.save_steps),
            "--save_total_limit",
            "2",
            "--train_batch_size",
            "16",
        ]
        self.command += ["--head_hidden_size", "64", "--projection_dim", "16", "--dataloader_num_workers", "1"]
        self.kills = self.kills_in_a_save = 0

    def torment(self, kind: str, kills: int, moments: random.Random) -> dict:
        self.start(self.straight).wait()
        restarts, identical = 0, True
        while self.kills < kills:
            launch = self.start(self.killed)
            restarts += 1
            before = self.newest_step()
            # Kill only after progress, or a run might never get past its first step.
            while launch.poll() is None and self.newest_step() <= before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 1.5))
            if launch.poll() is not None:  # it finished before all kills were used: run it again
                identical = identical and self.is_identical()
                shutil.rmtree(self.killed)
                continue
            kill_tree(launch)
            self.kills += 1
            in_a_save = any(self.killed.glob(".*.incomplete")) or any(self.killed.glob(".*.deleted"))
            self.kills_in_a_save += in_a_save
            place = "inside a save" if in_a_save else "between saves"
            print(f"{kind}: kill {self.kills} {place}, newest checkpoint at step {self.newest_step()}", flush=True)
        self.start(self.killed).wait()
        identical = identical and self.is_identical()
        print(f"{kind}: {self.kills} kills, {'identical' if identical else 'DIFFERENT'}", flush=True)
        return {"kills": self.kills, "restarts": restarts, "identical": identical}

    def is_identical(self) -> bool:
        """Whether the weights in both folders are bit-identical."""
        expected, actual = (load_file(folder / "model.safetensors") for folder in (self.straight, self.killed))
        return expected.keys() == actual.keys() and all(torch.equal(expected[k], actual[k]) for k in expected)

    def start(self, folder: Path) -> subprocess.Popen:
        command = [*self.command, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
        return subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def newest_step(self) -> int:
        return max((int(path.name.split("-")[1]) for path in self.killed.glob("checkpoint-*")), default=0)


def kill_tree(launch: subprocess.Popen) -> None:
    """Send SIGKILL to a launcher and all its descendants, as simultaneously as possible."""
    processes = [psutil.Process(launch.pid), *psutil.Process(launch.pid).children(recursive=True)]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue  # exited in the meantime
    psutil.wait_procs(processes, timeout=60)
    launch.wait()


def write_shards(folder: Path) -> Path:
    """48 small images in three parquet files of unequal length."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard, number in enumerate([11, 20, 17]):
        images = [Picture.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)) for _ in range(number)]
        images = [image.resize((48, 40), Picture.Resampling.BICUBIC) for image in images]
        dataset = Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
        dataset.to_parquet(folder / f"train-{shard:05}-of-00003.parquet")
    return folder


if __name__ == "__main__":
    main()
