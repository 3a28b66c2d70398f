"""The files of docs/scaling.md: accelerate configurations, SLURM scripts, and launches that are refused."""

import os
import stat
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from benchmarks.scaling import RECIPES, estimate_step_times, seconds_per_image, step_seconds
from mocov3_hf.pretraining.estimate import Exchange
from mocov3_hf.pretraining.launch import SHARDED_LAUNCHES, check_launch
from mocov3_hf.pretraining.recipe import parse
from mocov3_hf.reporting import UsageError
from tests.benchmarks.results import gpu_results
from tests.launch import ROOT


FOLDER = ROOT / "docs" / "scaling"
MACHINES = {"one_node": (1, 8), "two_nodes": (2, 16), "eight_nodes": (8, 64)}
# Stand-ins for the commands of SLURM: srun runs its command once, as task 3 of the job.
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then echo node-0; echo node-1; else echo "$@" >> "$CALLS"; fi',
    "scancel": 'echo scancel "$@" >> "$CALLS"',
    "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=3 exec "$@"',
    "python": 'printf "%s\\n" "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR" "$@"; exit "$STATUS"',
}


@pytest.mark.parametrize("name", MACHINES)
def test_configurations_load(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == MACHINES[name]
    assert config.distributed_type.value == "MULTI_GPU"


def submit(script, tmp_path, status=0):
    """Run a job script as SLURM would; returns its output and its calls of SLURM commands."""
    for name, body in COMMANDS.items():
        command = tmp_path / name
        command.write_text(f"#!/bin/bash\n{body}\n")
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    calls = tmp_path / "calls"
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
    }
    environment = {**os.environ, **job, "CALLS": str(calls), "STATUS": str(status)}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    command = ["bash", str(script), "my images", "runs/my run", "--seed", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout.splitlines(), calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sbatch")), ids=lambda path: path.stem)
def test_slurm_scripts_start_a_valid_command(script, tmp_path):
    (ranks, *program), calls = submit(script, tmp_path)
    arguments = program[3:]
    assert ranks == "3 3 16 8 node-0"
    assert program[:3] == ["-m", "mocov3_hf", "pretrain"]
    recipe = parse(arguments)
    assert recipe.data.dataset_name == "my images"
    assert recipe.run.output_dir == "runs/my run"
    assert recipe.run.resume_from_checkpoint == "auto"
    assert recipe.run.seed == 3
    assert recipe.optimization.train_batch_size == 4096
    assert calls == ""


def test_a_lost_host_requeues_the_job_and_a_mistake_does_not(tmp_path):
    script = FOLDER / "vit_base_64_gpus.sbatch"
    assert submit(script, tmp_path, status=1)[1] == "requeue 77\n"
    (tmp_path / "calls").unlink()
    assert submit(script, tmp_path, status=2)[1] == ""


@pytest.mark.parametrize(("name", "switch"), SHARDED_LAUNCHES.items())
def test_launches_that_shard_the_model_are_refused(name, switch):
    with pytest.raises(UsageError, match=rf"asks for {name}, which does not support a momentum encoder: leave it out"):
        check_launch({switch: "true"})
    check_launch({switch: "false"})


def test_estimated_step_times():
    """80 MB of gradients on 4 processes at 1 GB/s, in a step of 200 ms."""
    exchanged = [Exchange("gradients", "all-reduce", 1, 80_000_000), Exchange("keys", "all-gather", 2, 4_000_000)]
    gradients, keys = 0.120 + 0.001, 0.003 + 0.002
    assert step_seconds(0.2, exchanged, 4, 1e9, 0.001, overlap=False) == pytest.approx(0.2 + gradients + keys)
    # 100 ms of the backward pass hide all but 21 ms.
    assert step_seconds(0.2, exchanged, 4, 1e9, 0.001, overlap=True) == pytest.approx(0.2 + 0.021 + keys)
    assert step_seconds(0.2, exchanged, 1, 1e9, 0.001, overlap=False) == 0.2


def test_measured_steps_replace_the_assumed_speed():
    points = [
        {
            "backbone": "resnet50",
            "mixed_precision": precision,
            "batch": 8,
            "seconds_median": {"plain": 9.0, "ours": ours},
        }
        for precision, ours in {"no": 4.0, "bf16": 2.0}.items()
    ]
    measured = seconds_per_image({"points": points}, "bf16")
    assert measured == {"resnet50": 0.25}
    networks, seconds = {"fast": 1e9}, measured["resnet50"]
    rows = estimate_step_times("ResNet-50", RECIPES["ResNet-50"], networks, 1.0, 1e9, 0.0, seconds)
    assert [row["compute_ms"] for row in rows] == pytest.approx([0.25e3 * 4096 / row["processes"] for row in rows])


def test_measured_steps_of_a_gpu_are_the_compiled_ones():
    measured = seconds_per_image(gpu_results(), "bf16")
    assert measured == {name: pytest.approx(1 / 300) for name in ("vit_small", "resnet50")}
