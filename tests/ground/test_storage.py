"""Files and folders are written whole or not at all."""

import errno
import hashlib
import json
import os
import resource
import signal

import pytest
from safetensors import SafetensorError

from mocov3_hf import storage
from mocov3_hf.new_folder import check_new_folder
from mocov3_hf.reporting import RunError, UsageError


def test_atomic_file_replaces_in_one_step_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    storage.write_text(path, "old")
    with pytest.raises(RuntimeError), storage.atomic_file(path) as aside:  # noqa: PT012
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    storage.write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


def test_files_have_the_usual_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        with storage.atomic_file(tmp_path / "file") as aside:
            aside.touch(0o600)
        with storage.atomic_folder(tmp_path / "folder") as aside:
            (aside / "file").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o644


def test_atomic_folder(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(RuntimeError), storage.atomic_folder(folder) as aside:  # noqa: PT012
        (aside / "half").touch()
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with storage.atomic_folder(folder) as aside:
        (aside / "first").touch()
        assert not folder.exists()
    with pytest.raises(FileExistsError), storage.atomic_folder(folder):
        pass
    with storage.atomic_folder(folder, replace=True) as aside:
        (aside / "second").touch()
        assert os.listdir(folder) == ["first"]
    assert os.listdir(folder) == ["second"]
    assert os.listdir(tmp_path) == ["folder"]


def test_an_empty_folder_may_be_filled_and_a_file_is_not_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    with storage.atomic_folder(tmp_path / "empty") as aside:
        (aside / "file").touch()
    assert os.listdir(tmp_path / "empty") == ["file"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), storage.atomic_folder(tmp_path / "file", replace=True):
        pass


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    with storage.atomic_folder(tmp_path / "out") as aside:
        (aside / "file").write_text("first")
        second = pytest.raises(RunError, match=rf"{tmp_path}/out is being written by another process: wait for it")
        with second, storage.atomic_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "file").read_text() == "first"
    storage.aside_of(tmp_path / "out").mkdir()  # of a killed process
    with storage.atomic_folder(tmp_path / "out", replace=True) as aside:
        (aside / "file").write_text("second")
    assert (tmp_path / "out" / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_overwriting_never_deletes_what_is_read_or_was_not_written_by_the_command(tmp_path):
    check, images = check_new_folder, tmp_path / "images"
    images.mkdir()
    check(images, False, "mark")
    (images / "cat.jpg").touch()
    with pytest.raises(UsageError, match="exists and is not an empty folder: pass another --output_dir, or"):
        check(images, False, "mark")
    with pytest.raises(UsageError, match=r"images was not written by this command \(no mark in it\)"):
        check(images, True, "mark")
    (images / "mark").touch()
    check(images, True, "mark", [tmp_path, "user/model", "https://host/model"])
    link = tmp_path / "link"
    link.symlink_to(images)
    for read in (images, images / "cat.jpg", link, link / "cat.jpg"):
        with pytest.raises(UsageError, match=f"--overwrite_output_dir would delete {read}, which is read"):
            check(images, True, "mark", ["user/model", read])


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    storage.aside_of(tmp_path / "checkpoint-3").mkdir()
    (tmp_path / ".checkpoint-2.deleted").mkdir()
    (tmp_path / ".metrics.jsonl.17.incomplete").touch()
    (tmp_path / "checkpoint-1").mkdir()
    storage.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("tail", "damaged"),
    [
        (b"", []),
        (b'{"step": 3, "lo', [3]),
        (b"5\n", [3]),
        (b"null\n", [3]),
        (b"\xff\xfe\n", [3]),
        (b'{"loss": 1}\n', [3]),
        (b'{"step": "3"}\n[]\n', [3, 4]),
        (b"[" * 100_000, [3]),
    ],
)
def test_damaged_lines_are_left_out_and_numbered(tmp_path, tail, damaged):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}]
    storage.append_lines(path, lines)
    with open(path, "ab") as file:
        file.write(tail)
    found, numbers = storage.read_lines(path)
    assert json.dumps(found) == json.dumps(lines)
    assert numbers == damaged
    storage.rewrite_lines(path, found)
    assert storage.read_lines(path)[1] == []


def test_no_file_has_no_lines(tmp_path):
    assert storage.read_lines(tmp_path / "none.jsonl") == ([], [])


def test_sha256(tmp_path):
    content = os.urandom(3 * storage.BLOCK + 5)
    (tmp_path / "file").write_bytes(content)
    assert storage.sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert [storage.is_local(name) for name in ("data", "./no", "~/no", "/no", "user/name", "name")] == [
        True, True, True, True, False, False,
    ]  # fmt: skip


def test_processes(tmp_path):
    assert storage.process_is_alive(os.getpid())
    assert not storage.process_is_alive(2**22 + 12345)


def test_lines_are_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.jsonl"
    storage.append_lines(path, [{"step": 1}])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limit[1]))  # the write is cut short
    try:
        with pytest.raises(OSError, match="File too large"):
            storage.append_lines(path, [{"step": 2}, {"step": 3}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == '{"step": 1}\n'
    path.write_text('{"step": 1}\n{"st')  # by a killed process
    storage.append_lines(path, [{"step": 2}])
    assert storage.read_lines(path) == ([{"step": 1}, {"step": 2}], [2])


def test_records_wait_and_are_counted(tmp_path, capsys):
    path = tmp_path / "file.jsonl"
    path.mkdir()
    records = storage.RecordFile(path)
    for step in range(3):
        records.append({"step": step})
    assert isinstance(records.error, IsADirectoryError)
    path.rmdir()
    records.append({"step": 3})
    assert [line["step"] for line in storage.read_lines(path)[0]] == [0, 1, 2, 3]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path} cannot be written (Is a directory): its lines are kept in memory",
        f"warning: {path} can be written again: 4 lines kept in memory were added",
    ]
    path.unlink()
    path.mkdir()
    records.append({"step": 4}, {"step": 5})
    records.close()
    assert f"warning: 2 lines of {path} are lost ([Errno 21] Is a directory" in capsys.readouterr().err


def test_cutting_off_lines_needs_no_space(tmp_path, monkeypatch):
    path = tmp_path / "file.jsonl"
    lines = [{"step": step, "loss": step / 3} for step in range(5)]
    storage.append_lines(path, lines)
    monkeypatch.setattr(storage, "write_text", None)
    storage.rewrite_lines(path, lines)
    storage.rewrite_lines(path, lines[:3])
    assert storage.read_lines(path) == (lines[:3], [])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (SafetensorError("Error while serializing"), "Error while serializing"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "torch.save failed"),
    ],
)
def test_the_errors_of_libraries_that_write(error, said):
    with pytest.raises(RunError, match=rf"the model could not be written: .*{said}"), storage.writing("the model"):
        raise error
    with pytest.raises(RuntimeError, match=r"^another$"), storage.writing("the model"):
        raise RuntimeError("another")


def test_a_full_disk_names_the_file(tmp_path):
    def refuse():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for write in (storage.atomic_file, storage.atomic_folder):
        with pytest.raises(OSError, match=r"No space left on device: '.*/name'"), write(tmp_path / "name"):
            refuse()
