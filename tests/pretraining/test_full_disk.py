"""A full disk: nothing that a run has done is lost, with a real small disk and with injected failures."""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys

import pytest

from mocov3_hf import run_folder, storage
from mocov3_hf.data import bad_images
from mocov3_hf.data.bad_images import BadImage, BadImageLog
from mocov3_hf.pretraining import loop
from mocov3_hf.pretraining.loop import main
from mocov3_hf.reporting import FULL_DISK, output_to_full_disk
from tests.pretraining.test_resume import assert_same_run
from tests.pretraining.test_run import read_metrics


LENGTH = ["--max_steps", "9", "--save_steps", "2", "--knn_steps", "3", "--knn_k", "3", "--save_total_limit", "1"]
RECORDS = ("metrics.jsonl", "knn.jsonl", "bad_images.jsonl")


@pytest.fixture(scope="module")
def arguments(tiny, labeled, tmp_path_factory):
    """A run on images of which two are damaged."""
    folder = tmp_path_factory.mktemp("images")
    subprocess.run(["cp", "-r", *map(str, labeled.iterdir()), folder], check=True)
    for number in range(2):
        (folder / "train" / "dark" / f"x{number}.png").write_bytes(b"")
    options = ["--dataset_name", str(folder), "--max_bad_fraction", "0.5", "--knn_dataset_name", str(labeled)]
    return [*tiny, *LENGTH, *options]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, arguments):
    folder = tmp_path_factory.mktemp("expected")
    main([*arguments, "--output_dir", str(folder)])
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB: two checkpoints and the weights fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Take all space of a file system, and of the page that the log has begun."""
    for name in ("ballast", "log"):
        if name == "ballast" or (folder / name).exists():
            with open(folder / name, "ab", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"." * 64):
                    pass


def at_steps(monkeypatch, actions):
    """Do something before some steps of training (from 1)."""
    original, steps = loop.train_step, []

    def watched(*args, **kwargs):
        steps.append(1)
        actions.get(len(steps), lambda: None)()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", watched)


def assert_complete(folder, expected):
    assert_same_run(folder, expected)
    for name in RECORDS[1:]:
        lines = [sorted((path / name).read_text().splitlines()) for path in (folder, expected)]
        assert lines[0] == lines[1] != [], name
    run_folder.check_manifest(folder / "checkpoint-9")


def test_a_full_disk_that_gets_space_again(small_disk, arguments, expected, monkeypatch, capsys):
    """All lines are there afterwards, in the files and in the tracker; what is printed to the full disk does not end
    the run either."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    at_steps(monkeypatch, {2: lambda: fill(small_disk), 7: (small_disk / "ballast").unlink})
    folder = small_disk / "run"
    options = ["--on_save_error", "continue", "--report_to", "tensorboard"]
    with open(small_disk / "log", "a", buffering=1) as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        main([*arguments, *options, "--output_dir", str(folder)])
    assert_complete(folder, expected)
    assert [path.name for path in run_folder.list_checkpoints(folder)] == ["checkpoint-9"]
    text = (small_disk / "log").read_text()
    assert text.count("[output is missing here: the disk was full]") == 1
    assert re.search(r"metrics.jsonl can be written again: [2-6] lines kept in memory were added", text), text
    assert "--report_to tensorboard works again" in text
    assert "Traceback" not in text
    assert "lost" not in text
    accumulator = EventAccumulator(str(folder / "mocov3")).Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == list(range(1, 10))


def test_a_full_disk_that_stays_full(small_disk, arguments, expected, monkeypatch, capsys, fresh):
    at_steps(monkeypatch, {4: lambda: fill(small_disk)})
    folder = small_disk / "run"
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--on_save_error", "continue", "--output_dir", str(folder)])
    assert stop.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "warning"))]
    assert errors[-1].startswith("error: the checkpoint of step 9 could not be written: ")
    assert "No space left on device" in errors[-1]
    assert "checkpoint-2 is complete; when this is repaired, run " in errors[-1]
    written, damaged = storage.read_lines(folder / "metrics.jsonl")
    assert damaged == []
    (line,) = [line for line in errors if f"lines of {folder / 'metrics.jsonl'} are lost" in line]
    assert line.startswith(f"warning: {9 - len(written)} lines of "), line
    assert not (folder / "checkpoint-9").exists()
    (folder.parent / "ballast").unlink()
    fresh()
    main([*arguments, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"])
    assert_complete(folder, expected)


def test_a_start_on_a_full_disk(small_disk, arguments, capsys):
    fill(small_disk)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--output_dir", str(small_disk / "run")])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "No space left on device" in line
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
