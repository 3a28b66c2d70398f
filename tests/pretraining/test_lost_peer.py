"""How a run ends when another process is lost, and when the processes see different checkpoints."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from mocov3_hf.data.sources import open_source
from mocov3_hf.pretraining import loop, pixels, pretrain, resume
from mocov3_hf.pretraining.recipe import parse
from tests.fork_server import ranks


WORKER = Path(__file__).parent / "agreement_worker.py"
# As gloo words them.
TIMED_OUT = "[/build/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 7000ms for recv operation to complete"
CLOSED = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.2]:39655. This is typ"
)


@pytest.fixture
def alarm(monkeypatch):
    """Seconds until the process must exit; the alarm must not end the test process."""
    given = []
    monkeypatch.setattr("signal.alarm", given.append)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return given


def run_into(error, tmp_path, tiny, monkeypatch, step):
    """A run whose training raises `error` after `step` steps, with a checkpoint."""

    def train(self, stop):
        self.step = step
        (self.output_dir / "checkpoint-2").mkdir()
        raise error

    monkeypatch.setattr(loop.Run, "train", train)
    pretrain.main([*tiny, "--output_dir", str(tmp_path / "run"), "--communication_timeout", "7"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(TIMED_OUT), "another process has not responded for 7 s"),
        (RuntimeError(CLOSED), "another process is gone"),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"), "another process is gone"),
        (torch.distributed.DistStoreError("wait timeout after 7000ms"), "another process has not responded for 7 s"),
    ],
)
def test_a_lost_process_ends_the_run_in_one_line(error, said, tmp_path, tiny, monkeypatch, capsys, alarm):
    with pytest.raises(SystemExit) as stop:
        run_into(error, tmp_path, tiny, monkeypatch, step=3)
    assert stop.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: in step 4, {said}")
    assert "checkpoint-2 is complete; to resume: " in line
    assert line.endswith("--resume_from_checkpoint auto")
    assert alarm == [20]


def test_other_errors_keep_their_traceback(tmp_path, tiny, monkeypatch, alarm):
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_into(RuntimeError("shapes do not match"), tmp_path, tiny, monkeypatch, step=3)
    assert alarm == []


def test_a_process_lost_before_the_start(tmp_path, tiny, monkeypatch, capsys, alarm):
    def join(_):
        raise RuntimeError(TIMED_OUT)

    monkeypatch.setattr(loop, "build_accelerator", join)
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*tiny, "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: before the first step, another process has not responded for 600 s")
    assert line.endswith("There is no checkpoint yet: start again")


@pytest.mark.slow
def test_hosts_without_a_shared_file_system_are_refused(tmp_path, tiny):
    """If one process finds a checkpoint and another does not, they would start from different steps."""
    pretrain.main([*tiny, "--output_dir", str(tmp_path / "0")])
    codes, output = ranks(2, WORKER, str(tmp_path), *tiny, "--resume_from_checkpoint", "auto", check=False)
    assert all(codes)
    assert "sees checkpoint-4 and process 1 on" in output
    assert "must be on a file system that all hosts share" in output


def test_equal_copies_on_all_hosts_are_accepted(tmp_path, tiny, monkeypatch, capsys, fresh):
    arguments = [*tiny, "--output_dir", str(tmp_path / "run")]
    pretrain.main(arguments)
    fresh()
    monkeypatch.setattr(resume, "gather_object", lambda answers: answers * 2)
    pretrain.main([*arguments, "--resume_from_checkpoint", "auto"])
    assert "nothing left to do" in capsys.readouterr().out


def test_images_that_one_process_refuses_all_refuse(tmp_path, tiny, monkeypatch, capsys):
    """No process waits for one that has exited."""
    refusal = ("the images of this host have 4 channels", {})
    monkeypatch.setattr(pixels, "gather_object", lambda answers: [*answers, refusal])
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*tiny, "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == f"error: {refusal[0]}"


def test_the_pixel_range_is_that_of_the_first_process(tmp_path, tiny, monkeypatch):
    def gather(answers):
        (_, mine) = answers[0]
        return [(None, {**mine, "pixel_range": [0.0, 4095.0]}), *answers]

    monkeypatch.setattr(pixels, "gather_object", gather)
    recipe = parse([*tiny, "--output_dir", str(tmp_path / "run")])
    source = open_source(recipe.data.dataset_name)
    settled = pixels.settle_pixels_together(recipe, source, Accelerator(cpu=True))
    assert settled.data.pixel_range == [0.0, 4095.0]


def test_what_one_process_refuses_all_refuse(tmp_path, tiny, monkeypatch, capsys):
    """No process waits for one that has exited."""
    refusal = ("the disk of this host holds another run", "no checkpoint", None, "host-1")
    monkeypatch.setattr(resume, "gather_object", lambda answers: [*answers, refusal])
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*tiny, "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == f"error: {refusal[0]}"
