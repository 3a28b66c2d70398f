"""Steps of the quickstart beside other busy processes, with another source tree and with this one.

    python -m benchmarks.contention --before SRC --output benchmarks/results/contention_cpu.json

Every measurement is a run of its own, `python -m mocov3_hf pretrain` as a user starts it, beside 0, 1 and 2 processes
that compute all the time. The trees take turns. Reported are medians of the seconds of a step over all runs, without
the first steps of each, and how many times slower that is than alone.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from mocov3_hf.data import workers
from mocov3_hf.data.digits import write_digits

from .data_path import finish
from .limits import cpu_name


WARMUP_STEPS = 2
NEIGHBORS = (0, 1, 2)
THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Processes that do nothing but compute."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds_of_steps(tree: str, digits: Path, steps: int) -> list[float]:
    """A run of the quickstart recipe with the package of a source tree: seconds of each step after the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mocov3_hf", "pretrain", str(digits), "--recipe", "quickstart"]
        command += ["--max_steps", str(steps), "--logging_steps", "1", "--output_dir", folder]
        environment = {name: value for name, value in os.environ.items() if name not in THREADS}
        subprocess.run(command, env={**environment, "PYTHONPATH": tree}, check=True, capture_output=True, cwd=folder)
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return [256 / line["images_per_second"] for line in lines][WARMUP_STEPS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="SRC", required=True, help="folder src of another version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    if options.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be more than the {WARMUP_STEPS} steps that are left out, got {options.steps}")
    trees = {"before": str(Path(options.before).resolve()), "after": str(Path(workers.__file__).parents[2])}
    seconds: dict = {which: {number: [] for number in NEIGHBORS} for which in trees}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        digits = write_digits(Path(folder) / "digits")
        for round_index in range(options.rounds):
            for number in NEIGHBORS:
                for which in trees if round_index % 2 else reversed(trees):
                    with busy_processes(number):
                        steps = seconds_of_steps(trees[which], digits, options.steps)
                    seconds[which][number].append(steps)
                    print(f"{which:6s} beside {number}: {statistics.median(steps):6.2f} s a step", file=sys.stderr)
    result = {"machine": cpu_name(), "cores": workers.cores_of_process(), "torch": torch.__version__}
    result |= {"load_at_the_start": load, "seconds_of_steps": seconds}
    for which, by_number in seconds.items():
        medians = {n: statistics.median(second for run in runs for second in run) for n, runs in by_number.items()}
        result[which] = {n: {"seconds": value, "times_alone": value / medians[0]} for n, value in medians.items()}
        line = ", ".join(f"beside {n} {value:.2f} s ({value / medians[0]:.1f} x)" for n, value in medians.items())
        print(f"{which:6s} {line}")
    finish(result, options.output)


if __name__ == "__main__":
    main()
