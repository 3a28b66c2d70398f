"""Train on two hosts, cut one off, and go on; needs root, for the network namespaces that are the hosts.

    python -m benchmarks.two_hosts --output benchmarks/results/two_hosts_cpu.json

Two network namespaces joined by a virtual cable are started as docs/scaling.md says for two nodes. Compared are the
losses of one host and of two with the same global batch; then, for each way of losing a host, how long the other takes
to end, with which exit code and line, and whether both, started again, reach the weights of the undisturbed run to the
bit. Prints a JSON object. Exit code 1 if a loss differs by more than 1e-6 in the first steps, a survivor ends with
exit code 0 or not in time, or any bit differs.
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
# Over the communication timeout: for the launchers to notice, and for slow machines.
SECONDS_TO_SPARE = 40
# Each way of losing a host: what is done to it, and the hosts that survive.
LOSSES = {
    "cable of host 1 pulled": (lambda hosts: hosts.cut(), (0, 1)),
    "host 1 killed": (lambda hosts: hosts.kill(1), (0,)),
    "host 0 killed": (lambda hosts: hosts.kill(0), (1,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="Steps of every run.")
    parser.add_argument("--communication_timeout", type=int, default=5, help="Of every run, in seconds.")
    parser.add_argument(
        "--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES), help="Ways of losing a host."
    )
    parser.add_argument("--output", type=Path, default=None, help="File for the figures.")
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
    """All figures; `passed` says whether they are as they must be."""
    common = arguments(folder / "images", steps, timeout)
    one, two = folder / "one_host", folder / "two_hosts"
    command = [sys.executable, str(SCRIPT), *common, "--output_dir", str(one)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"one host ended with {done.returncode}:\n{done.stderr}")
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
    """Of a run of seconds, in float32."""
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
        RuntimeError: a host that does not end with exit code 0, with what it printed.
    """
    launches = hosts.start(command, logs)
    wait(launches, timeout=300)
    for rank, launch in enumerate(launches):
        if launch.returncode != 0:
            raise RuntimeError(
                f"host {rank} ended with {launch.returncode}:\n{(logs / f'host{rank}.log').read_text()}"
            )


def compare_losses(one: Path, two: Path) -> dict:
    """Largest relative difference of the logged losses; rounding grows from step to step."""
    curves = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for run in (one, two)
    ]
    differences = [abs(a - b) / abs(a) for a, b in zip(*curves, strict=True)]
    return {"first_3_steps": max(differences[:3]), "all_steps": max(differences)}


def lose(folder: Path, name: str, common: list[str], undisturbed: Path, timeout: int) -> dict:
    """Lose a host after the first checkpoint, wait for the survivors, start both again and compare the end."""
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
    """What the run itself said at its end, without the launcher's report of it."""
    return [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]


if __name__ == "__main__":
    main()
