"""A full disk: nothing that a run has done is lost, with a real small disk and with injected failures."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys

import pytest

from mocov3_hf import run_folder, storage
from mocov3_hf.data.bad_images import BadImage, BadImageLog
from mocov3_hf.pretraining import loop, pretrain
from mocov3_hf.pretraining.pretrain import main
from tests.launch import search_path
from tests.pretraining.test_resume import Killed, assert_same_run, kill_at


LENGTH = ["--max_steps", "9", "--save_steps", "2", "--knn_steps", "3", "--knn_k", "3", "--save_total_limit", "1"]
RECORDS = ("metrics.jsonl", "knn.jsonl", "bad_images.jsonl")


@pytest.fixture(scope="module")
def arguments(tiny, labeled, tmp_path_factory):
    """A run on images of which two are damaged."""
    folder = tmp_path_factory.mktemp("images")
    subprocess.run(["cp", "-r", *map(str, labeled.iterdir()), folder], check=True)
    for number in range(2):
        (folder / "train" / "dark" / f"x{number}.png").write_bytes(b"no image")
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


@pytest.mark.slow
def test_a_full_disk_that_gets_space_again(small_disk, arguments, expected, monkeypatch, capsys):
    """All lines are there afterwards, in the files and in the tracker; what is printed to the full disk does not end
    the run either."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    at_steps(monkeypatch, {2: lambda: fill(small_disk), 7: (small_disk / "ballast").unlink})
    folder = small_disk / "run"
    options = ["--on_save_error", "continue", "--report_to", "tensorboard"]
    with open(small_disk / "log", "a", buffering=1) as log:
        monkeypatch.setattr("sys.stdout", log)
        monkeypatch.setattr("sys.stderr", log)
        main([*arguments, *options, "--output_dir", str(folder)])
        monkeypatch.undo()
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_on_a_full_disk_does_not_change_the_exit_code(tmp_path, tiny):
    command = [sys.executable, "-m", "mocov3_hf", "pretrain", *tiny, "--output_dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path()}
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, env=environment, timeout=300).returncode == 0
    assert run_folder.is_whole(tmp_path / "checkpoint-4")


OPERATIONS = [
    (storage, "append_lines"),
    (storage, "flush"),
    (storage, "grant_usual_permissions"),
    (os, "replace"),
    (os, "rename"),
    (os, "mkdir"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), OPERATIONS)
def test_each_operation_fails_for_a_while(tmp_path, arguments, expected, monkeypatch, module, name):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = getattr(module, name)
    at_steps(
        monkeypatch,
        {4: lambda: monkeypatch.setattr(module, name, refuse), 7: lambda: monkeypatch.setattr(module, name, original)},
    )
    main([*arguments, "--on_save_error", "continue", "--output_dir", str(tmp_path)])
    assert_complete(tmp_path, expected)
    assert not list(tmp_path.glob(".*"))


def errors_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "warning"))]


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "model.safetensors", "data.json", ".run.lock", "events.jsonl", "checkpoint-4"]
)
def test_what_is_in_the_way_at_the_start_is_named(tmp_path, arguments, capsys, monkeypatch, name):
    monkeypatch.setattr(pretrain, "Run", None)
    what = "folder in the place of a file"
    if name == "checkpoint-4":
        (tmp_path / name).write_text("")
        what = "file in the place of a folder"
    elif name == "events.jsonl":  # opening it would wait for a reader
        os.mkfifo(tmp_path / name)
        what = "special file in the place of a file"
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert errors_of(capsys) == [f"error: {tmp_path / name} is a {what} of the run: move it away"]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["stop", "continue"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "checkpoint-4"])
def test_what_gets_in_the_way_is_named_once(tmp_path, arguments, capsys, monkeypatch, name, choice):
    def block():
        if name == "checkpoint-4":
            (tmp_path / name).write_text("")
        else:
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).mkdir()

    at_steps(monkeypatch, {2 if name == "model.safetensors" else 4: block})
    ends = choice == "stop" or name != "checkpoint-4"  # at the last step, nothing may be missing
    with pytest.raises(SystemExit) if ends else contextlib.nullcontext() as stop:
        main([*arguments, "--on_save_error", choice, "--output_dir", str(tmp_path)])
    lines = errors_of(capsys)
    assert not ends or stop.value.code == 1
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == ends
    about = [line for line in lines if f"{tmp_path / name}'" in line or f"{tmp_path / name} " in line]
    warnings = [line for line in about if line.startswith("warning") and "lost" not in line]
    newest = run_folder.list_checkpoints(tmp_path)[0].name
    if choice == "stop":
        # What can be written is.
        assert newest == {"metrics.jsonl": "checkpoint-4", "model.safetensors": "checkpoint-2"}.get(
            name, "checkpoint-2"
        )
        assert name in errors[0]
    else:
        assert newest == "checkpoint-9"
        # The file itself, and that checkpoints go on without it.
        assert len(warnings) == (2 if name == "metrics.jsonl" else 1), lines


def test_a_stop_on_a_full_disk_is_a_failure(tmp_path, arguments, capsys, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_and_stop():
        monkeypatch.setattr(storage, "flush", refuse)
        os.kill(os.getpid(), signal.SIGTERM)

    at_steps(monkeypatch, {5: fill_and_stop})
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--on_save_error", "continue", "--output_dir", str(tmp_path)])
    assert stop.value.code == 1
    assert "the checkpoint of step 5 could not be written" in errors_of(capsys)[-1]


def test_weights_that_a_kill_left_behind_are_replaced_on_resume(tmp_path, arguments, expected, monkeypatch, fresh):
    arguments = [*arguments, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        kill_at(patch, loop, "publish", 5)
        with pytest.raises(Killed):
            main(arguments)
    assert (tmp_path / "checkpoint-9").exists()
    fresh()
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert_complete(tmp_path, expected)


def test_bad_images_are_listed_later(tmp_path, monkeypatch, capsys):
    def refuse(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = BadImageLog(10, max_fraction=1, file=tmp_path / "bad_images.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "append_lines", refuse)
        log.add([BadImage(1, "is empty")])
        log.add([BadImage(1, "is empty"), BadImage(2, "is empty")])
    assert len(log) == 2
    assert not log.file.exists()
    log.add([BadImage(3, "is empty")])
    assert [storage.json.loads(line)["id"] for line in log.file.read_text().splitlines()] == [1, 2, 3]
    assert capsys.readouterr().err.count("warning: ") == 2
