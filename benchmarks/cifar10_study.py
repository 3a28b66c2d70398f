"""CIFAR-10 study: accuracy over epochs, and the paper's ablations in miniature.

    python -m benchmarks.cifar10_study [--jobs 2] [--groups curves ablations tuning failure] [--dataset_name ID|FOLDER]
    python -m benchmarks.cifar10_study --long    # for a GPU: the same arms on ViT-tiny/4, 200 epochs, and ResNet-14

Every run is a process that pre-trains on the 50,000 training images with `mocov3 pretrain` and evaluates its
checkpoints by kNN (k = 20) and logistic regression on frozen features of 20,000 training images (all with --long),
tested on all 10,000 test images. It writes one file to --results. Finished runs are skipped and interrupted ones
resume, so the study can be stopped at any time. study_arms.py defines the arms; study_report.py makes the tables and
plots.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModel

from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.data.photometric import IMAGENET_MEAN, IMAGENET_STD
from mocov3_hf.evaluation.linear import fit_linear_classifier
from mocov3_hf.metrics.knn import knn_accuracy
from mocov3_hf.pretraining.build import build_model
from mocov3_hf.pretraining.pretrain import main as pretrain
from mocov3_hf.pretraining.recipe import load_recipe

from .study_arms import ARMS, LONG_ARMS, Arm, arguments_of


ROOT = Path(__file__).parent.parent
HUB_ID = "uoft-cs/cifar10"
KNN_K = 20
TRAIN_SPLIT, TEST_SPLIT = "train[:20000]", "test"
LONG_TRAIN_SPLIT = "train"
# Metrics of metrics.jsonl that are kept.
KEPT_METRICS = (
    *("step", "epoch", "loss", "loss_normalized", "positive_top1", "grad_norm", "first_layer_grad_max"),
    *("last_layer_grad_max", "projection_std_ratio", "projection_effective_rank", "gradient_spikes", "skipped_steps"),
)
BATCH_SIZE = 500


class LabeledSplit:
    """
    A split of CIFAR-10 in memory: whole normalized images (N, 3, 32, 32), upsampled if the model was trained on larger
    views.
    """

    def __init__(self, dataset_name: str, split: str, image_size: int):
        self.image_size = image_size
        images = open_labeled(dataset_name, split=split)
        pixels = torch.stack([images.decode(index) for index in range(len(images))])
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.pixels = (pixels.float() / 255 - mean) / deviation
        self.labels = torch.from_numpy(images.labels)

    @torch.inference_mode()
    def features(self, encoder: torch.nn.Module) -> torch.Tensor:
        """(N, D) float32 on the CPU."""
        device = next(encoder.parameters()).device
        with torch.autocast(device.type, torch.bfloat16):
            pooled = [
                encoder(self.enlarged(batch.to(device))).pooler_output for batch in self.pixels.split(BATCH_SIZE)
            ]
        return torch.cat(pooled).flatten(1).float().cpu()

    def enlarged(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[-1] == self.image_size:
            return pixels
        return F.interpolate(pixels, size=(self.image_size, self.image_size), mode="bilinear")


def evaluate(encoder: torch.nn.Module, train: LabeledSplit, test: LabeledSplit) -> dict[str, float]:
    """kNN and linear accuracy (0 to 1) of the features, in eval mode."""
    encoder = encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if encoder.backbone._supports_sdpa:
        encoder.set_attn_implementation("sdpa")
    bank, queries = train.features(encoder), test.features(encoder)
    classifier = fit_linear_classifier(bank, train.labels, max_iterations=200, device=encoder.device)
    return {
        "knn_top1": knn_accuracy(queries, test.labels, bank, train.labels, KNN_K)[KNN_K],
        "linear_top1": classifier.accuracy(queries, test.labels),
    }


def run(arm: Arm, seed: int, options: argparse.Namespace) -> None:
    """Run one arm with one seed in this process: pre-train, evaluate, write its result file."""
    folder = options.output_dir / f"{arm.key}_seed{seed}"
    arguments = [*arguments_of(arm), "--seed", str(seed)]
    is_continued = (folder / "metrics.jsonl").exists()
    started, started_at = time.process_time(), time.perf_counter()
    pretrain(
        [
            *arguments,
            *("--dataset_name", options.dataset_name, "--output_dir", str(folder), "--save_total_limit", "1000"),
            *("--resume_from_checkpoint", "auto"),
        ]
    )
    # The time of an interrupted run is unknown.
    seconds = {"pretraining": None if is_continued else time.process_time() - started}
    wall = None if is_continued else time.perf_counter() - started_at
    recipe = load_recipe(arguments[1], arguments[2:])
    metrics = read_lines(folder / "metrics.jsonl")
    if not metrics or metrics[-1]["step"] < arm.steps:  # after a signal, pretrain also returns normally
        sys.exit("interrupted; start the study again to resume")
    started = time.process_time()
    splits = (LONG_TRAIN_SPLIT if options.long else TRAIN_SPLIT, TEST_SPLIT)
    train, test = (LabeledSplit(options.dataset_name, split, recipe.views.image_size) for split in splits)
    epoch_of = {line["step"]: line["epoch"] for line in metrics}
    steps_per_epoch = metrics[-1]["step"] / metrics[-1]["epoch"]
    points = []
    if arm.points > 1:
        points.append({"step": 0, "epoch": 0.0, **evaluate(build_model(recipe).mocov3, train, test)})
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        step = int(checkpoint.name.rpartition("-")[2])
        epoch = epoch_of.get(step, step / steps_per_epoch)
        points.append({"step": step, "epoch": epoch, **evaluate(AutoModel.from_pretrained(checkpoint), train, test)})
    seconds["evaluation"] = time.process_time() - started
    result = {
        "arm": arm.name,
        "group": arm.group,
        "recipe": arm.recipe,
        "seed": seed,
        "command": ["mocov3", "pretrain", *arguments, "--dataset_name", HUB_ID],
        "points": points,
        "metrics": [{name: line[name] for name in KEPT_METRICS if name in line} for line in metrics],
        "knn_while_training": read_lines(folder / "knn.jsonl"),
        "events": read_lines(folder / "events.jsonl"),
        "cpu_seconds": seconds,
        "wall_seconds_of_pretraining": wall,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    path = result_path(arm, seed, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def result_path(arm: Arm, seed: int, options: argparse.Namespace) -> Path:
    return options.results / f"{arm.key}_seed{seed}.json"


def run_all(arms: list[Arm], options: argparse.Namespace) -> None:
    """Start all runs without a result file, `--jobs` at a time, each on its share of the cores."""
    todo = [
        (arm, seed)
        for seed in range(max(arm.seeds for arm in arms))
        for arm in arms
        if seed < arm.seeds and not result_path(arm, seed, options).exists()
    ]
    print(f"{len(todo)} runs to do, {options.jobs} at a time", flush=True)
    started, done, failed = time.perf_counter(), [], []

    def start(task: tuple[Arm, int]) -> None:
        arm, seed = task
        log = options.output_dir / f"{arm.key}_seed{seed}.log"
        command = [
            sys.executable,
            "-m",
            "benchmarks.cifar10_study",
            "--run",
            arm.name,
            "--run_seed",
            str(seed),
            *shared_arguments(options),
        ]
        with log.open("w") as stream:
            code = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=stream, env=one_core(options)).returncode
        (done if code == 0 else failed).append(task)
        outcome = "done" if code == 0 else f"FAILED (exit code {code}, see {log})"
        place = f"{len(done) + len(failed)}/{len(todo)}, {(time.perf_counter() - started) / 60:.0f} min"
        print(f"[{place}] {arm.name}, seed {seed}: {outcome}", flush=True)

    options.output_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(start, todo))
    if failed:
        sys.exit(f"error: {len(failed)} of {len(todo)} runs failed: run the command again to repeat them")


def shared_arguments(options: argparse.Namespace) -> list[str]:
    paths = ("--output_dir", str(options.output_dir.resolve()), "--results", str(options.results.resolve()))
    # A folder may be relative to the current directory.
    name = str(Path(options.dataset_name).resolve()) if Path(options.dataset_name).exists() else options.dataset_name
    return [*paths, "--dataset_name", name, *(["--long"] if options.long else [])]


def one_core(options: argparse.Namespace) -> dict[str, str]:
    """Environment of a run: its share of the cores, and malloc settings that avoid page faults."""
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default=HUB_ID, help="Hub id, or folder of CIFAR-10's parquet files")
    parser.add_argument("--groups", nargs="+", help="groups of arms to run; default: all")
    parser.add_argument("--arms", nargs="+", help="names of arms to run; default: all")
    parser.add_argument("--long", action="store_true", help="longer runs, for a GPU")
    parser.add_argument("--jobs", type=int, help="parallel runs; default: one per core, or 1 on a GPU")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/cifar10-study"), help="folder for checkpoints and logs"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder for one file per run; default: benchmarks/results/cifar10_study_cpu or _gpu",
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--run_seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.jobs = options.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    options.results = options.results or Path(__file__).parent / "results" / (
        "cifar10_study_gpu" if options.long else "cifar10_study_cpu"
    )
    arms = LONG_ARMS if options.long else ARMS
    if options.run is not None:
        run(next(arm for arm in arms if arm.name == options.run), options.run_seed, options)
        return
    for wanted, known in ((options.groups, {arm.group for arm in arms}), (options.arms, {arm.name for arm in arms})):
        if unknown := set(wanted or ()) - known:
            parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
    arms = [
        arm
        for arm in arms
        if (options.groups is None or arm.group in options.groups)
        and (options.arms is None or arm.name in options.arms)
    ]
    run_all(arms, options)


if __name__ == "__main__":
    main()
