"""A signal to all processes of a fine-tuning: the step is finished and saved, and the run resumes bit-identically."""

import multiprocessing
import os
import signal

import pytest

from mocov3_hf.evaluation import trainer
from mocov3_hf.evaluation.finetune import main
from mocov3_hf.run_folder import read_results
from tests.evaluation.finetuning import ALL, command, same


@pytest.fixture
def signalled(monkeypatch):
    """Call it to send a signal to this process and its workers in a step."""

    def at(step, number, only_workers=False):
        original, steps = trainer.seed_forward, []

        def seed_forward(*arguments):
            steps.append(1)
            if len(steps) == step:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, number)
                if not only_workers:
                    os.kill(os.getpid(), number)
            original(*arguments)

        monkeypatch.setattr(trainer, "seed_forward", seed_forward)

    return at


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "number"), [(3, signal.SIGTERM), pytest.param(4, signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_stops(model_folder, image_folder, tmp_path, signalled, monkeypatch, capsys, step, number):
    """Four steps: in the middle of the second epoch, and at the very end."""
    workers = ["--dataloader_num_workers", 1]
    whole = command(model_folder, image_folder, tmp_path / "whole", *ALL, *workers)
    main(whole)
    arguments = command(model_folder, image_folder, tmp_path / "cut", *ALL, *workers)
    signalled(step, number)
    assert main(arguments) == {}
    output = capsys.readouterr().out
    assert f"stopped by {number.name} after step {step}; to resume:" in output
    assert output.rstrip().endswith("--resume_from_checkpoint auto")
    assert not (tmp_path / "cut" / "results.json").exists()
    monkeypatch.undo()
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert same(tmp_path / "whole" / "model.safetensors", tmp_path / "cut" / "model.safetensors")
    (one,), (two,) = read_results(tmp_path / "whole"), read_results(tmp_path / "cut")
    assert one["metrics"] == two["metrics"]


def test_a_signal_before_training_ends_at_once(model_folder, image_folder, tmp_path, monkeypatch, capsys):
    from mocov3_hf.evaluation import supervised

    monkeypatch.setattr(supervised, "open_training_splits", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(command(model_folder, image_folder, tmp_path)) == {}
    assert "stopped by SIGTERM before training; to resume:" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_in_one_line(model_folder, image_folder, tmp_path, signalled, fails):
    workers = ["--dataloader_num_workers", 1]
    signalled(1, signal.SIGKILL, only_workers=True)
    line = fails(main, command(model_folder, image_folder, tmp_path, *workers, "--train_batch_size", 4), code=1)
    assert "a data-loading worker died, perhaps out of memory" in line
