"""Train on two hosts, lose one, and resume. Needs root, to create network namespaces as hosts.

    python -m benchmarks.two_hosts --output benchmarks/results/two_hosts_cpu.json

Two network namespaces, connected by a virtual link, are started as docs/scaling.md describes for two nodes. First, the
losses of one host and of two are compared at the same global batch. Then a host is lost in several ways. Recorded are
the time until the other host exits, its exit code and its error line, and whether the resumed run ends bit-identically
to an uninterrupted one. Prints a JSON object. Exits with 1 if the losses differ by more than 1e-6 in the first steps,
if a surviving host exits with 0 or too late, or if any weight differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from .hosts import SCRIPT, Hosts, wait, wait_for, why_not


VIT = '{"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}'
SAVE_STEPS = 5
# Beyond the communication timeout: for the launchers to notice, and for slow machines.
SECONDS_TO_SPARE = 40
# Each way of losing a host: the action, and the surviving hosts.
LOSSES = {
    "cable of host 1 pulled": (lambda hosts: hosts.cut(), (0, 1)),
    "host 1 killed": (lambda hosts: hosts.kill(1), (0,)),
    "host 0 killed": (lambda hosts: hosts.kill(0), (1,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of every run")
    parser.add_argument("--communication_timeout", type=int, default=5, help="seconds, for every run")
    parser.add_argument(
        "--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES), help="ways of losing a host"
    )
    parser.add_argument("--output", type=Path, default=None, help="file for the results")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"error: {reason}")
    with tempfile.TemporaryDirectory(prefix="two_hosts_") as folder:
        report = measure(Path(folder), options.steps, options.communication_timeout, options.losses)
    print(json.dumps(report, indent=2))
    if options.output is not None:
        options.output.write_text(f"{json.dumps(report, indent=2)}\n", encoding="utf-8")
    sys.exit(0 if report["passed"] else 1)


def measure(folder: Path, steps: int, timeout: int, losses: list[str]) -> dict:
    """All results; `passed` is whether every requirement is met."""
    common = arguments(folder / "images", steps, timeout)
    one, two = folder / "one_host", folder / "two_hosts"
    command = [sys.executable, str(SCRIPT), *common, "--output_dir", str(one)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"one host exited with {done.returncode}:\n{done.stderr}")
    with Hosts() as hosts:
        run_through(hosts, [*common, "--output_dir", str(two)], folder / "logs")
    report = {
        "steps": steps,
        "communication_timeout_s": timeout,
        "difference_of_losses": compare_losses(one, two),
        "lost": {name: lose(folder, name, common, two, timeout) for name in losses},
    }
    report["passed"] = report["difference_of_losses"]["first_3_steps"] <= 1e-6 and all(
        result["identical_after_resuming"] and result["ended_in_time"] and 0 not in result["exit_codes"].values()
        for result in report["lost"].values()
    )
    return report


def arguments(images: Path, steps: int, timeout: int) -> list[str]:
    """Arguments of a run of a few seconds, in float32."""
    write_images(images)
    sizes = ["--head_hidden_size", "32", "--projection_dim", "16", "--train_batch_size", "16"]
    length = ["--max_steps", str(steps), "--save_steps", str(SAVE_STEPS), "--logging_steps", "1"]
    running = ["--dataloader_num_workers", "1", "--mixed_precision", "no", "--communication_timeout", str(timeout)]
    images_and_model = ["--dataset_name", str(images), "--backbone_config", VIT]
    return ["--recipe", "quickstart", *images_and_model, *sizes, *length, *running]


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(32):
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{index:02}.png")


def run_through(hosts: Hosts, command: list[str], logs: Path) -> None:
    """
    Raises:
        RuntimeError: if a host exits with another code than 0; the message holds its output.
    """
    launches = hosts.start(command, logs)
    wait(launches, timeout=300)
    for rank, launch in enumerate(launches):
        if launch.returncode != 0:
            raise RuntimeError(
                f"host {rank} exited with {launch.returncode}:\n{(logs / f'host{rank}.log').read_text()}"
            )


def compare_losses(one: Path, two: Path) -> dict:
    """Largest relative difference of the logged losses; rounding errors grow from step to step."""
    curves = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for run in (one, two)
    ]
    differences = [abs(a - b) / abs(a) for a, b in zip(*curves, strict=True)]
    return {"first_3_steps": max(differences[:3]), "all_steps": max(differences)}


def lose(folder: Path, name: str, common: list[str], undisturbed: Path, timeout: int) -> dict:
    """Lose a host after the first checkpoint, wait for the survivors, resume on both and compare the final weights."""
    act, survivors = LOSSES[name]
    run, logs = folder / name.replace(" ", "_"), folder / "logs"
    command = [*common, "--output_dir", str(run), "--resume_from_checkpoint", "auto"]
    with Hosts() as hosts:
        launches = hosts.start(command, logs)
        wait_for(run / f"checkpoint-{SAVE_STEPS}", launches)
        act(hosts)
        seconds = wait(launches, timeout=timeout + 10 * SECONDS_TO_SPARE)
        said = [line for rank in survivors for line in error_lines(logs / f"host{rank}.log")]
    with Hosts() as hosts:
        run_through(hosts, command, logs)
    expected, actual = (load_file(path / "model.safetensors") for path in (undisturbed, run))
    return {
        "seconds_to_end": {f"host {rank}": round(seconds[rank], 1) for rank in survivors},
        "ended_in_time": all(seconds[rank] <= timeout + SECONDS_TO_SPARE for rank in survivors),
        "exit_codes": {f"host {rank}": launches[rank].returncode for rank in survivors},
        "lines": [line.split("; to continue:")[0].replace(str(folder), "") for line in said],
        "identical_after_resuming": all(torch.equal(expected[key], actual[key]) for key in expected),
    }


def error_lines(log: Path) -> list[str]:
    """Error lines of the run itself, without the report of the launcher."""
    return [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]


if __name__ == "__main__":
    main()
