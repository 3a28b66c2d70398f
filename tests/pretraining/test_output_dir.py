"""The output folder: one run at a time, writable, and never somebody else's."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

import mocov3_hf
from mocov3_hf.pretraining import folder_lock, loop
from mocov3_hf.pretraining.folder_lock import LOCK, FolderLock
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.reporting import UsageError
from tests.fork_server import ranks
from tests.launch import ROOT


def stop_line(capsys, arguments, code=2):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def nothing_is_built(monkeypatch):
    def never(*_):
        raise AssertionError("the folder must be checked first")

    monkeypatch.setattr(loop, "build_accelerator", never)
    monkeypatch.setattr(loop, "build_source", never)


@pytest.fixture
def other_run():
    """The id of a process that lives."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def write_lock(folder, **changes):
    owner = {**folder_lock.describe_this_process(), **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps(owner))


def started(process_id):
    return folder_lock.psutil.Process(process_id).create_time()


def test_a_second_run_ends_in_one_line(tmp_path, tiny, capsys, other_run):
    write_lock(tmp_path, pid=other_run, started=started(other_run))
    line = stop_line(capsys, [*tiny, "--output_dir", str(tmp_path)])
    assert f"{tmp_path} is in use by a run on {folder_lock.platform.node()} (process {other_run} since 20" in line
    assert "pass another --output_dir" in line
    assert (tmp_path / LOCK).exists()
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.slow
def test_all_processes_end_when_the_folder_is_in_use(tmp_path, tiny, other_run):
    write_lock(tmp_path, pid=other_run, started=started(other_run))
    script = ROOT / "scripts" / "pretrain.py"
    codes, output = ranks(2, script, *tiny, "--output_dir", str(tmp_path), check=False)
    assert all(codes)
    assert output.count("error: " + str(tmp_path)) == 1


def test_the_lock_is_there_while_training_and_gone_afterwards(tmp_path, tiny, monkeypatch, fresh, capsys):
    original, seen = loop.train_step, []

    def watched(*args, **kwargs):
        seen.append(json.loads((tmp_path / LOCK).read_text())["pid"])
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", watched)
    main([*tiny, "--output_dir", str(tmp_path)])
    assert seen == [os.getpid()] * 4
    assert not (tmp_path / LOCK).exists()
    fresh()
    stop_line(capsys, [*tiny, "--output_dir", str(tmp_path)])  # it holds a run
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    "content",
    [
        {"pid": 2**22 + 1},  # more than Linux gives
        {"started": 5.0},  # the number of the process was given again
        {"pid": None},
        {"pid": "x"},
        {"pid": -1},
    ],
)
def test_a_dead_owner_on_this_host_is_replaced_at_once(tmp_path, content):
    write_lock(tmp_path, **content)
    start = time.monotonic()
    with FolderLock(tmp_path) as lock:
        lock.acquire()
        assert lock.is_mine()
    assert time.monotonic() - start < 5


def test_a_zombie_is_dead(tmp_path):
    """A killed run in a container whose first process does not wait for others."""
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there
    write_lock(tmp_path, pid=process.pid, started=started(process.pid))
    with FolderLock(tmp_path) as lock:
        lock.acquire()
        assert lock.is_mine()
    process.wait()


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(folder_lock, "REFRESH_SECONDS", 0.2)
    monkeypatch.setattr(folder_lock, "POLL_SECONDS", 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("content", ['{"host": "node-7", "pid": 12, "started": 1e9}', "", "[]", "\0", "9" * 5000])
def test_another_host_keeps_its_lease(tmp_path, short_lease, content, capsys):
    (tmp_path / LOCK).write_text(content)
    start = time.monotonic()
    with FolderLock(tmp_path) as lock:
        lock.acquire()
    assert 1.5 < time.monotonic() - start < 10
    assert "waiting up to 2 s to see whether it is alive" in capsys.readouterr().err


def test_a_lease_that_is_over_is_taken_at_once(tmp_path, capsys):
    write_lock(tmp_path, host="node-7")
    os.utime(tmp_path / LOCK, (time.time() - 100,) * 2)
    with FolderLock(tmp_path) as lock:
        lock.acquire()
    assert capsys.readouterr().err == ""


def test_a_live_run_on_another_host_is_refused(tmp_path, short_lease, monkeypatch):
    with FolderLock(tmp_path) as first:
        with monkeypatch.context() as patch:
            patch.setattr(folder_lock.platform, "node", lambda: "node-7")
            first.owner = folder_lock.describe_this_process()
            first.acquire()
        with FolderLock(tmp_path) as second, pytest.raises(UsageError, match=r"in use by a run on node-7 \(process"):
            second.acquire()
        assert first.is_mine()


def test_a_run_that_was_replaced_writes_no_more(tmp_path, tiny, monkeypatch, capsys):
    """As after minutes in SIGSTOP: its lease is over, and the requeued job owns the folder."""
    original, steps = loop.train_step, []

    def replaced(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            write_lock(tmp_path, host="node-7", pid=12)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", replaced)
    arguments = [*tiny, "--save_steps", "2", "--on_save_error", "continue", "--output_dir", str(tmp_path)]
    line = stop_line(capsys, arguments, code=1)
    assert "a run on node-7 (process 12" in line
    assert f"has taken over {tmp_path}" in line
    assert not (tmp_path / "checkpoint-4").exists()
    assert (tmp_path / LOCK).exists(), "it belongs to the other run"


def test_one_of_many_gets_the_lock(tmp_path):
    """All find the same dead owner."""
    for _ in range(20):
        write_lock(tmp_path, started=5.0)
        locks = [FolderLock(tmp_path) for _ in range(8)]
        for number, lock in enumerate(locks):
            lock.owner["started"] += number * 1e-3
        refused = []

        def acquire(lock, refused=refused):
            try:
                lock.acquire()
            except UsageError:
                refused.append(lock)

        threads = [threading.Thread(target=acquire, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 7
        (winner,) = [lock for lock in locks if lock.is_acquired]
        winner.check()
        winner.__exit__(None, None, None)


@pytest.mark.parametrize("output_dir", ["", " "])
def test_an_empty_name(tiny, capsys, nothing_is_built, output_dir):
    assert "--output_dir is missing" in stop_line(capsys, [*tiny, "--output_dir", output_dir])


def test_an_empty_name_from_python(pictures):
    with pytest.raises(UsageError, match="--output_dir is empty"):
        mocov3_hf.pretrain(pictures, recipe="quickstart", output_dir="")


def test_a_file_in_the_way(tmp_path, tiny, capsys, nothing_is_built):
    (tmp_path / "file").write_text("")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        line = stop_line(capsys, [*tiny, "--output_dir", str(output_dir)])
        assert f"--output_dir {output_dir} cannot be created: {tmp_path / 'file'} is a file" in line
    for name in ("nowhere", "loop"):
        (tmp_path / name).symlink_to(name if name == "loop" else tmp_path / "missing")
        line = stop_line(capsys, [*tiny, "--output_dir", str(tmp_path / name)])
        assert f"cannot be created: {tmp_path / name} is a link to a folder that does not exist" in line


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that refuses files")
def test_a_folder_that_cannot_be_written(tiny, capsys, nothing_is_built):
    for output_dir in ("/proc/self/runs", "/proc"):
        line = stop_line(capsys, [*tiny, "--output_dir", output_dir])
        assert f"--output_dir {output_dir} cannot be written (" in line


@pytest.mark.parametrize("number", [13, 28, 30])  # permission, full, read-only
def test_why_a_folder_cannot_be_written(tmp_path, tiny, capsys, nothing_is_built, monkeypatch, number):
    def refuse(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    line = stop_line(capsys, [*tiny, "--output_dir", str(tmp_path / "runs")])
    assert f"cannot be written ({os.strerror(number)}): pass another folder" in line


def test_a_name_that_is_too_long(tmp_path, tiny, capsys, nothing_is_built):
    assert "File name too long" in stop_line(capsys, [*tiny, "--output_dir", str(tmp_path / ("x" * 300))])


@pytest.mark.slow
@pytest.mark.parametrize("resume", [[], ["--resume_from_checkpoint", "auto"]])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
)
def test_a_model_of_somebody_else_is_kept(tmp_path, tiny, capsys, fresh, resume, name, monkeypatch):
    (tmp_path / name).write_text("{}")
    arguments = [*tiny, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_model", None)
        line = stop_line(capsys, [*arguments, *resume])
    assert f"{tmp_path} holds a model that is not of this run" in line
    assert [path.name for path in tmp_path.iterdir()] == [name]
    fresh()
    if not resume:
        main([*arguments, "--overwrite_output_dir"])
        assert (tmp_path / "checkpoint-4").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, tiny):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("{}")
    main([*tiny, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"])
    assert (tmp_path / "checkpoint-4").exists()
