"""`mocov3_hf.pretrain()`: the run of the command, with Python values and exceptions; and the commands in messages."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

import mocov3_hf
from mocov3_hf import run_folder
from mocov3_hf.option_values import resume_command
from mocov3_hf.pretraining import checkpoint
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.reporting import RunError, UsageError
from tests.launch import ROOT, search_path
from tests.pretraining.test_run import read_metrics, without_times


def test_the_call_is_the_command(tmp_path, tiny, options, pictures, fresh):
    main([*tiny, "--output_dir", str(tmp_path / "command")])
    fresh()
    run = mocov3_hf.pretrain(pictures, output_dir=tmp_path / "call", **options)
    folder = run.output_dir
    assert folder == tmp_path / "call"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("command", "call"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert without_times(read_metrics(tmp_path / "command")) == without_times(read_metrics(folder))


def test_calls_with_another_precision_in_one_process(tmp_path, options, pictures, capsys):
    for precision in ("no", "bf16"):
        mocov3_hf.pretrain(pictures, output_dir=tmp_path / precision, mixed_precision=precision, **options)
    losses = [read_metrics(tmp_path / precision)[0]["loss"] for precision in ("no", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_a_call_outside_the_main_thread(tmp_path, options, pictures):
    runs = []
    thread = threading.Thread(
        target=lambda: runs.append(mocov3_hf.pretrain(pictures, output_dir=tmp_path / "run", **options))
    )
    thread.start()
    thread.join()
    assert runs == [mocov3_hf.Run(tmp_path / "run")]


def test_mistakes_raise(tmp_path, options, pictures):
    with pytest.raises(UsageError, match=r"^pretrain\(\): there is no option 'sede'; did you mean 'seed'\?$"):
        mocov3_hf.pretrain(pictures, output_dir=tmp_path, **options, sede=1)
    with pytest.raises(ValueError, match="nowhere"):
        mocov3_hf.pretrain(tmp_path / "nowhere", output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_failures_raise(tmp_path, options, pictures, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"checkpoint of step 4 could not be written.*No space left.*resume_from_chec"):
        mocov3_hf.pretrain(pictures, output_dir=tmp_path, **options)


def test_a_plan_is_printed(tmp_path, options, pictures, capsys):
    mocov3_hf.pretrain(pictures, output_dir=tmp_path / "out", dry_run=True, **options)
    assert "estimated memory per process" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_an_earlier_version_resumes_silently(tmp_path, tiny, fresh, capsys):
    """Its recipe has the options and the spellings of before; its other files have the format of today."""
    arguments = [*tiny, "--save_steps", "2"]
    main([*arguments, "--output_dir", str(tmp_path / "straight")])
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "old" / "checkpoint-2")
    recipe = tmp_path / "old" / "checkpoint-2" / "recipe.yaml"
    text = recipe.read_text().replace("ema_decay:", "momentum:").replace("ema_schedule:", "momentum_schedule:")
    text = text.replace("\nmodel: null\n", "\nmodel_name_or_path: null\n")
    recipe.write_text(text + "tf32: null\nchannels_last: true\nin_place_relu: null\nfsdp: false\n")
    (recipe.parent / run_folder.MANIFEST).unlink()
    run_folder.write_manifest(recipe.parent)
    fresh()
    capsys.readouterr()
    main([*arguments, "--output_dir", str(tmp_path / "old"), "--resume_from_checkpoint", "auto"])
    errors = capsys.readouterr().err
    assert "resuming from" in errors
    assert "deprecated" not in errors
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "old"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("mocov3 pretrain images --recipe x", "mocov3 pretrain images --recipe x --resume_from_checkpoint auto"),
        (
            "mocov3 pretrain --overwrite_output_dir images --resume_from_checkpoint a/b --seed 1",
            "mocov3 pretrain images --seed 1 --resume_from_checkpoint auto",
        ),
        (
            "scripts/pretrain.py --overwrite-output-dir true --resume_from_checkpoint=auto --seed 1",
            "python scripts/pretrain.py --seed 1 --resume_from_checkpoint auto",
        ),
    ],
)
def test_the_command_to_resume(typed, expected, monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    program, *words = typed.split()
    monkeypatch.setattr(sys, "argv", [program, *words])
    assert resume_command(words) == expected


@pytest.mark.slow
def test_importing_the_package_does_not_import_pretraining():
    code = "import sys, mocov3_hf; print(mocov3_hf.pretrain.__name__)"
    code += "; print([name for name in sys.modules if name.startswith('mocov3_hf.pretraining.')])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search_path()},
    )
    assert done.stdout.split() == ["pretrain", "[]"]
