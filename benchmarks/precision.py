"""Training steps in bfloat16 and float32 on a CPU with all its instructions, and limited to AVX2.

    python -m benchmarks.precision --output benchmarks/results/precision_cpu.json

Every measurement is a run of its own, `python -m mocov3_hf pretrain` with a recipe for CIFAR-10 on the quickstart's
digits, in small batches. torch, oneDNN and MKL are limited to AVX2 by their environment variables. The four cases take
turns. Reported are medians of the images per second over all runs, without the first steps of each. What
`--mixed_precision auto` would choose is asked of the machine itself, which the variables do not change.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mocov3_hf.data import workers
from mocov3_hf.data.digits import write_digits
from mocov3_hf.precision import best_precision

from .data_path import finish
from .limits import cpu_name


RECIPE, BATCH_SIZE, WARMUP_STEPS = "cifar10_vit-nano-p8", 64, 2
INSTRUCTIONS = {
    "all": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
PRECISIONS = ("bf16", "no")


def images_per_second(digits: Path, steps: int, precision: str, environment: dict[str, str]) -> list[float]:
    """A run of a few steps: the images per second of each after the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mocov3_hf", "pretrain", str(digits), "--recipe", RECIPE]
        command += ["--train_batch_size", str(BATCH_SIZE), "--mixed_precision", precision, "--max_steps", str(steps)]
        command += ["--logging_steps", "1", "--output_dir", folder]
        variables = {**os.environ, "PYTHONPATH": str(Path(workers.__file__).parents[2]), **environment}
        subprocess.run(command, env=variables, check=True, capture_output=True, cwd=folder)
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return [line["images_per_second"] for line in lines][WARMUP_STEPS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    if options.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be more than the {WARMUP_STEPS} steps that are left out, got {options.steps}")
    found: dict = {name: {precision: [] for precision in PRECISIONS} for name in INSTRUCTIONS}
    cases = [(name, precision) for name in INSTRUCTIONS for precision in PRECISIONS]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        digits = write_digits(Path(folder) / "digits")
        for round_index in range(options.rounds):
            for name, precision in cases if round_index % 2 else reversed(cases):
                rates = images_per_second(digits, options.steps, precision, INSTRUCTIONS[name])
                found[name][precision].extend(rates)
                print(f"{name:5s} {precision:5s} {statistics.median(rates):7.1f} images/s", file=sys.stderr)
    medians = {
        name: {precision: statistics.median(rates) for precision, rates in by_precision.items()}
        for name, by_precision in found.items()
    }
    choice, reason = best_precision(torch.device("cpu"))
    result = {"machine": cpu_name(), "cores": workers.cores_of_process(), "torch": torch.__version__}
    result |= {"recipe": RECIPE, "batch_size": BATCH_SIZE, "load_at_the_start": load, "auto": choice, "reason": reason}
    finish({**result, "images_per_second": medians, "all": found}, options.output)


if __name__ == "__main__":
    main()
