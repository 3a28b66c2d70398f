"""Run folders: checkpoints with their manifests, the record of evaluations, and what damaged files do to readers."""

import json
import math
import multiprocessing
import os
import shutil

import pytest

from mocov3_hf import storage
from mocov3_hf.results import append_result, read_results
from mocov3_hf.run_folder import (
    CheckpointError,
    check_manifest,
    is_whole,
    list_checkpoints,
    read_run_folder,
    step_of,
    write_manifest,
)
from tests.factories import save_run


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the files that a manifest must list, and one more."""
    return write_checkpoint(tmp_path / "checkpoint-12")


FILES = ("model.safetensors", "state.json", "optimizer.safetensors", "recipe.yaml", "config.json")


def write_checkpoint(folder):
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(f"content of {name}".encode())
    write_manifest(folder)
    return folder


def test_checkpoints_are_listed_newest_first(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-12", "checkpoint-x", "checkpoint-", "other-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [100, 12, 9]
    assert list_checkpoints(tmp_path / "missing") == []


def test_a_checkpoint_is_whole_as_it_was_written(checkpoint):
    check_manifest(checkpoint)
    assert is_whole(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "optimizer.safetensors"])
def test_every_flipped_bit_is_found(checkpoint, name):
    content = (checkpoint / name).read_bytes()
    for position in range(len(content)):
        for bit in (0, 7):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            (checkpoint / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=f"is damaged: the content of {name} is not what was written"):
                check_manifest(checkpoint)
    (checkpoint / name).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{name} has {len(content) - 1} bytes, expected {len(content)}"):
        check_manifest(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"is damaged: {name} is missing"):
        check_manifest(checkpoint)
    assert not is_whole(checkpoint)


ENTRY = {"size": 1, "sha256": "0"}
ENTRIES = dict.fromkeys(FILES, ENTRY)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "{}", "3", '"text"', "[" * 100_000),
        *(json.dumps({name: ENTRY for name in FILES if name != missing}) for missing in FILES),
        json.dumps(ENTRIES | {"state.json": None}),
        json.dumps(ENTRIES | {"state.json": [1, "0"]}),
        json.dumps(ENTRIES | {"state.json": {"size": 1}}),
        json.dumps(ENTRIES | {"../other.json": ENTRY}),
        json.dumps(ENTRIES | {"": ENTRY}),
    ],
)
def test_manifests_that_are_not_valid_are_refused(checkpoint, content):
    (checkpoint / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"checkpoint-12 is (damaged|not complete): its manifest\.json") as error:
        check_manifest(checkpoint)
    assert "\n" not in str(error.value)
    assert not is_whole(checkpoint)


@pytest.mark.parametrize(
    "entry", [{"size": "1", "sha256": "0"}, {"size": 1.5, "sha256": 0}, {"size": None, "sha256": []}]
)
def test_manifest_entries_of_other_types_match_nothing(checkpoint, entry):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"state.json": entry}))
    with pytest.raises(CheckpointError, match=r"state\.json has \d+ bytes, expected"):
        check_manifest(checkpoint)


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "a\0b", ".."])
def test_names_in_a_manifest_that_no_file_can_have(checkpoint, name):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {name: ENTRY}))
    with pytest.raises(CheckpointError, match="checkpoint-12 is damaged: "):
        check_manifest(checkpoint)


def test_without_a_manifest_a_checkpoint_is_not_complete(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not complete: its manifest\.json cannot be read"):
        check_manifest(checkpoint)
    (checkpoint / "manifest.json").mkdir()
    assert not is_whole(checkpoint)


# Results of evaluations


def append(folder, task="knn", **changes):
    arguments = {"dataset": {"name": "d"}, "metrics": {"top1": 0.5}, "settings": {"k": [1, 5]}, "seconds": 1.23456}
    return append_result(folder, task=task, **(arguments | changes))


def test_a_result_says_what_was_done(tmp_path):
    result = append(tmp_path / "new" / "folder", seed=3, model={"name": "m"})
    assert read_results(tmp_path / "new" / "folder") == [result]
    assert result["metrics"] == {"top1": 0.5}
    assert (result["task"], result["seed"], result["seconds"], result["model"]) == ("knn", 3, 1.235, {"name": "m"})
    assert set(result["versions"]) >= {"python", "torch", "transformers", "datasets", "mocov3_hf"}
    assert result["hardware"]["cpu_count"] == os.cpu_count()
    assert result["date"].endswith("+00:00")


def test_results_add_up_in_order_and_stay_as_they_were(tmp_path):
    first = append(tmp_path)
    second = append(tmp_path, task="linear", metrics={"top1": 0.7})
    assert read_results(tmp_path) == [first, second]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_keys_of_other_writers_survive(tmp_path):
    append(tmp_path)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    content["results"][0]["remark"] = "by hand"
    path.write_text(json.dumps(content))
    append(tmp_path)
    assert read_results(tmp_path)[0]["remark"] == "by hand"


def write_many(folder, name):
    for number in range(20):
        append(folder, task=f"{name}-{number}")


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    tasks = [result["task"] for result in read_results(tmp_path)]
    assert sorted(tasks) == sorted(f"{name}-{number}" for name in "abc" for number in range(20))


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    first = append(tmp_path)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        append(tmp_path)
    assert read_results(tmp_path) == [first]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"format": 1}',
        '{"format": 1, "results": {}}',
        '{"format": 9, "results": []}',
    ],
)
def test_a_damaged_file_is_moved_aside_not_written_over(tmp_path, content):
    (tmp_path / "results.json.damaged").write_text("an earlier one")
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(tmp_path)
    with pytest.warns(
        UserWarning, match=r"started a new results\.json, moved the old one to results\.json\.damaged-2"
    ):
        result = append(tmp_path)
    assert read_results(tmp_path) == [result]
    assert (tmp_path / "results.json.damaged").read_text() == "an earlier one"
    assert (tmp_path / "results.json.damaged-2").read_text() == content


def test_no_file_no_results(tmp_path):
    assert read_results(tmp_path) == []


@pytest.mark.parametrize("metrics", [{"top1": math.nan}, {"top1": object()}])
def test_what_json_cannot_say_is_refused_before_anything_is_touched(tmp_path, metrics):
    with pytest.raises(ValueError, match="may only hold numbers, text, lists and mappings") as error:
        append(tmp_path / "new", metrics=metrics)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_results_of_other_types_are_left_out(tmp_path):
    result = append(tmp_path)
    rows = [None, 3, [], {"metrics": 1}, result]
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "results": rows}))
    assert read_results(tmp_path) == [result]


# The whole folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"3", b"\xff\xfe\x00", b"[" * 100_000])
@pytest.mark.parametrize(
    "name", ["config.json", "conversion.json", "results.json", "recipe.yaml", "metrics.jsonl", "model.safetensors"]
)
def test_damaged_files_are_left_out_with_a_note(run_folder, tmp_path, name, content):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / name).write_bytes(content)
    run = read_run_folder(folder)
    if (name, content) != ("recipe.yaml", b"null"):  # an empty recipe
        assert any(name in note for note in run.notes)
    assert not any("\n" in note for note in run.notes)
    assert len(run.events) == 3, "the rest is there"


def test_damaged_states_and_lines_are_left_out(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "checkpoint-40" / "state.json").write_text('{"run": [1]}')
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "{half", '{"step": "5"}', "[1]", *lines[1:]]))
    run = read_run_folder(folder)
    assert run.state == {}
    assert len(run.metrics) == len(lines)
    assert f"3 of {len(lines) + 3} lines of metrics.jsonl were left out, they are damaged: line 2, 3, 4." in run.notes
