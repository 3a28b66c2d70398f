"""Interrupted runs: resumed bit-identically, refused when they would be another run, never damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mocov3_hf import run_folder, storage
from mocov3_hf.pretraining import checkpoint, loop
from mocov3_hf.pretraining.pretrain import main
from tests.fork_server import ranks
from tests.launch import ROOT
from tests.pretraining.test_run import read_metrics, without_times


LENGTH = ["--max_steps", "7", "--save_steps", "2", "--logging_steps", "3"]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(folder, expected):
    first, second = weights_of(folder), weights_of(expected)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert without_times(read_metrics(folder)) == without_times(read_metrics(expected))


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it runs but `finally`."""


def kill_at(monkeypatch, target, name, call):
    """Make the `call`-th call of a function the last thing a run does."""
    original, calls = getattr(target, name), []

    def last(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, last)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny):
    """Uninterrupted runs of seven steps, by optimizer and precision."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs = {}

    def run(*options):
        if options not in runs:
            runs[options] = folder / str(len(runs))
            main([*tiny, *LENGTH, *options, "--output_dir", str(runs[options])])
        return runs[options]

    return run


RESNET = '{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}'
KINDS = {
    "adamw": ("--optimizer", "adamw"),
    "adamw_bf16_dropout": (
        "--mixed_precision",
        "bf16",
        "--backbone_config",
        '{"hidden_dropout_prob": 0.1, "drop_path_rate": 0.2}',
    ),
    "lars": ("--optimizer", "lars", "--base_learning_rate", "0.3", "--backbone_config", RESNET),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("killed_in_step", [2, 3, 4, 6])
def test_a_resumed_run_is_bit_identical(tmp_path, tiny, uninterrupted, monkeypatch, fresh, kind, killed_in_step):
    expected = uninterrupted(*KINDS[kind])
    fresh()
    arguments = [*tiny, *LENGTH, *KINDS[kind], "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        kill_at(patch, loop, "train_step", killed_in_step)
        with pytest.raises(Killed):
            main(arguments)
    fresh()
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert_same_run(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_a_resumed_stream_is_bit_identical(tmp_path, tiny, shards, monkeypatch, fresh, num_workers):
    arguments = [*tiny, *LENGTH, "--dataset_name", str(shards), "--streaming", "--dataloader_num_workers", num_workers]
    main([*arguments, "--output_dir", str(tmp_path / "straight")])
    fresh()
    with monkeypatch.context() as patch:
        kill_at(patch, loop, "train_step", 6)
        with pytest.raises(Killed):
            main([*arguments, "--output_dir", str(tmp_path / "cut")])
    fresh()
    main([*arguments, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "auto"])
    assert_same_run(tmp_path / "cut", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (checkpoint, "named_optimizer_state", 2),
        (checkpoint, "save_file", 2),
        (storage, "flush", 3),
        (storage, "flush", 12),
        (storage, "flush", 20),
        (loop, "publish", 2),
        (checkpoint, "delete_folder", 1),
    ],
)
def test_a_kill_inside_a_save_costs_nothing(tmp_path, tiny, uninterrupted, monkeypatch, fresh, module, name, call):
    expected = uninterrupted(*KINDS["adamw"])
    fresh()
    arguments = [*tiny, *LENGTH, *KINDS["adamw"], "--save_total_limit", "1", "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        kill_at(patch, module, name, call)
        with pytest.raises(Killed):
            main(arguments)
    for folder in run_folder.list_checkpoints(tmp_path):
        run_folder.check_manifest(folder)
    fresh()
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert_same_run(tmp_path, expected)
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path)] == ["checkpoint-7"]
    assert not list(tmp_path.glob(".*"))


def kill_tree(launch):
    """SIGKILL to a launcher and everything it started, its workers last seen first."""
    processes = [*psutil.Process(launch.pid).children(recursive=True), psutil.Process(launch.pid)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=30)
    launch.wait()


@pytest.mark.slow
def test_sigkill_on_two_processes_continued_by_one(tmp_path, tiny, uninterrupted, fresh):
    """A real kill of a real launch; the sample sequence does not depend on the number of processes."""
    expected = uninterrupted(*KINDS["adamw"])
    fresh()
    arguments = [*tiny, *LENGTH, *KINDS["adamw"], "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch = subprocess.Popen(
        [*command, str(ROOT / "scripts" / "pretrain.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_tree(launch)
    assert (tmp_path / "checkpoint-2").exists()
    main([*arguments, "--resume_from_checkpoint", "auto"])
    for mine, its in zip(read_metrics(tmp_path), read_metrics(expected), strict=True):
        assert mine["step"] == its["step"]
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_resumed_processes_are_bit_identical(tmp_path, tiny):
    arguments = [*tiny, *LENGTH, *KINDS["adamw_bf16_dropout"]]
    script = ROOT / "scripts" / "pretrain.py"
    ranks(2, script, *arguments, "--output_dir", str(tmp_path / "straight"))
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    lines = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 9')  # the last one half written
    ranks(2, script, *arguments, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "auto")
    assert_same_run(tmp_path / "cut", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(tmp_path, tiny, uninterrupted, monkeypatch, fresh, capsys, number):
    expected = uninterrupted(*KINDS["adamw"])
    fresh()
    monkeypatch.setattr(sys, "argv", ["scripts/pretrain.py", "--recipe", "quickstart", "--overwrite_output_dir"])
    arguments = [*tiny, *LENGTH, *KINDS["adamw"], "--output_dir", str(tmp_path)]
    original, steps = loop.train_step, []

    def signalled(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", signalled)
        main(arguments)
    assert len(steps) == 3
    assert run_folder.list_checkpoints(tmp_path)[0].name == "checkpoint-3"
    output = capsys.readouterr().out
    assert f"stopped by {number.name} after step 3" in output
    assert "  python scripts/pretrain.py --recipe quickstart --resume_from_checkpoint auto" in output
    fresh()
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert_same_run(tmp_path, expected)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, tiny, uninterrupted, fresh, capsys):
    expected = uninterrupted(*KINDS["adamw"])
    fresh()
    shutil.copytree(expected, tmp_path / "run")
    folders = run_folder.list_checkpoints(tmp_path / "run")
    assert [folder.name for folder in folders] == ["checkpoint-7", "checkpoint-6", "checkpoint-4"]
    damaged = folders[0] / "model.safetensors"
    damaged.unlink()
    damaged.write_bytes((folders[1] / "model.safetensors").read_bytes()[:-1])
    weights = folders[1] / "optimizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    arguments = [*tiny, *LENGTH, *KINDS["adamw"], "--output_dir", str(tmp_path / "run")]
    main([*arguments, "--resume_from_checkpoint", "auto"])
    errors = capsys.readouterr().err
    assert "checkpoint-7 is damaged: model.safetensors has" in errors
    assert "checkpoint-6 is damaged: the content of optimizer.safetensors is not what was written" in errors
    assert_same_run(tmp_path / "run", expected)


def stop_line(capsys, arguments, code=2):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
    return capsys.readouterr().err.rstrip().splitlines()[-1]


def test_what_would_be_another_run_is_refused(tmp_path, tiny, fresh, capsys):
    arguments = [*tiny, *LENGTH, "--output_dir", str(tmp_path)]
    main(arguments)
    fresh()
    assert "already holds a run: pass --resume_from_checkpoint auto" in stop_line(capsys, arguments)
    fresh()
    changed = [*arguments, "--resume_from_checkpoint", "auto", "--temperature", "0.3"]
    line = stop_line(capsys, changed)
    assert "temperature (0.2 there, 0.3 now)" in line
    assert "--allow_recipe_change" in line
    fresh()
    line = stop_line(capsys, [*arguments, "--resume_from_checkpoint", "auto", "--train_batch_size", "12"])
    assert "global batch size (8 there, 12 now)" in line
    fresh()
    line = stop_line(capsys, [*arguments, "--resume_from_checkpoint", str(tmp_path / "checkpoint-9")])
    assert "checkpoint-9 is not a folder" in line
    fresh()
    main([*changed, "--allow_recipe_change"])  # nothing left to do, and no error
    fresh()
    main([*arguments, "--overwrite_output_dir", "--max_steps", "2"])
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_checkpoint_of_another_order_of_images_is_refused(tmp_path, tiny, fresh, capsys):
    """As version 0.1 wrote them."""
    arguments = [*tiny, "--output_dir", str(tmp_path)]
    main([*arguments, "--save_steps", "2", "--save_total_limit", "9"])
    shutil.rmtree(tmp_path / "checkpoint-4")
    folder = tmp_path / "checkpoint-2"
    state = json.loads((folder / "state.json").read_text())
    del state["run"]["order_version"]
    state["run"]["version"] = "0.1.0"
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    run_folder.write_manifest(folder)
    fresh()
    resume = [*arguments, "--resume_from_checkpoint", "auto"]
    line = stop_line(capsys, resume)
    assert "was written by a mocov3_hf (0.1.0) that orders the images of an epoch differently: resume it with" in line
    fresh()
    main([*resume, "--allow_recipe_change"])
    assert "the run continues in the order of this version, so that some images of this" in capsys.readouterr().err
    assert run_folder.list_checkpoints(tmp_path)[0].name == "checkpoint-4"


def test_a_full_disk_stops_or_not_as_asked(tmp_path, tiny, fresh, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    arguments = [*tiny, *LENGTH, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        kill_at(patch, loop, "train_step", 4)
        with pytest.raises(Killed):
            main(arguments)
    before = {path.name for path in tmp_path.iterdir()}
    for choice in ("stop", "continue"):
        fresh()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", full)
            resume = ["--resume_from_checkpoint", "auto", "--on_save_error", choice]
            with pytest.raises(SystemExit) as stop:
                main([*arguments, *resume])
        assert stop.value.code == 1
        errors = capsys.readouterr().err
        failed = [step for step in (4, 6, 7) if f"the checkpoint of step {step} could not be written" in errors]
        # A failure of the last one always ends the run: there is no later one.
        assert failed == ([4] if choice == "stop" else [4, 6, 7])
        assert "No space left on device" in errors
        assert {path.name for path in tmp_path.iterdir()} == before
        run_folder.check_manifest(tmp_path / "checkpoint-2")


def test_no_pickle_anywhere(tmp_path, tiny):
    main([*tiny, "--output_dir", str(tmp_path)])
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml"}
    state = json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())
    assert state["run"]["step"] == 4
    assert state["run"]["version"]
