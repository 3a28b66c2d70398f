"""Damaged bookkeeping never stops a resume, and no damaged checkpoint is taken for a whole one."""

import json
import shutil

import pytest

from mocov3_hf import run_folder, storage
from mocov3_hf.pretraining import monitors, resume
from mocov3_hf.pretraining.monitors import summarize
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe
from tests.pretraining.test_resume import assert_same_run


LENGTH = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "2", "--knn_steps", "2", "--knn_k", "3"]


@pytest.fixture(scope="module")
def arguments(tiny, labeled):
    return [*tiny, "--dataset_name", str(labeled), *LENGTH]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, arguments):
    folder = tmp_path_factory.mktemp("finished") / "run"
    main([*arguments, "--output_dir", str(folder)])
    return folder


def resumed(folder, arguments, capsys):
    """Resume a copy; what it warned of."""
    capsys.readouterr()
    main([*arguments, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"])
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ") and "damage" in line]


DAMAGE = [b"\xff\xfe\x00\n", b"5\n", b"null\n", b"[]\n", b'{"step": NaN}\n', b'{"step": 1e999}\n', b'{"step": 3, "lo']


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_lines_are_reported_once_and_dropped(tmp_path, finished, arguments, capsys, fresh, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    whole = {}
    for name in ("metrics.jsonl", "knn.jsonl", "events.jsonl"):
        file = folder / name
        whole[file] = file.read_bytes() if file.exists() else b""
        file.write_bytes(whole[file] + damage)
    warnings = resumed(folder, arguments, capsys)
    assert sorted(warnings) == sorted(
        f"warning: {file} was damaged: 1 of {len(content.splitlines()) + 1} lines were dropped"
        for file, content in whole.items()
    )
    assert {file: file.read_bytes() for file in whole} == whole


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b"", b"\xff", b'{"model.safetensors": 5}', b"[" * 100_000])
def test_a_damaged_manifest_costs_one_checkpoint(tmp_path, finished, arguments, capsys, fresh, content):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoint-4" / "manifest.json").write_bytes(content)
    (warning,) = resumed(folder, arguments, capsys) or [""]
    assert "checkpoint-4" in warning
    assert warning.endswith("using an older one")
    assert_same_run(folder, finished)
    assert (folder / "knn.jsonl").read_text() == (finished / "knn.jsonl").read_text()


@pytest.mark.parametrize("entry", [None, [], "x", {}, {"size": "5", "sha256": 7}, {"size": None, "sha256": None}])
def test_entries_of_a_wrong_type(tmp_path, finished, entry):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-4", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest:
        (folder / "manifest.json").write_text(json.dumps({**manifest, name: entry}))
        with pytest.raises(run_folder.CheckpointError, match="checkpoint-4 is damaged"):
            run_folder.check_manifest(folder)
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != name}))
        if name != "preprocessor_config.json":
            with pytest.raises(run_folder.CheckpointError, match="does not list the files of a checkpoint"):
                run_folder.check_manifest(folder)


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"null", b"{}", b"\xff", b'{"run": {}, "optimizer": []}', b'{"run": 5}'])
@pytest.mark.parametrize("has_matching_manifest", [False, True])
def test_a_damaged_state_costs_one_checkpoint(
    tmp_path, finished, arguments, capsys, fresh, content, has_matching_manifest
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    checkpoint = folder / "checkpoint-4"
    (checkpoint / "state.json").write_bytes(content)
    if has_matching_manifest:
        (checkpoint / "manifest.json").unlink()
        run_folder.write_manifest(checkpoint)
    (warning,) = resumed(folder, arguments, capsys)
    assert "checkpoint-4 is damaged: " in warning
    assert "state.json" in warning
    assert_same_run(folder, finished)


@pytest.mark.parametrize("content", [b"", b"\xff", b"- 5", b"image_mean: [0.1, 0.2, 0.3]\nnum_channels: 7", None])
def test_the_recipe_beside_the_checkpoints_never_stops_a_resume(tmp_path, finished, arguments, capsys, fresh, content):
    """That of the checkpoint counts, whose manifest has its hash."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "recipe.yaml").unlink()
    if content is not None:
        (folder / "recipe.yaml").write_bytes(content)
    assert resumed(folder, arguments, capsys) == []
    assert_same_run(folder, finished)
    saved, whole = ((path / "recipe.yaml").read_text().splitlines() for path in (folder, finished))
    assert [line for line in saved if line not in whole] == [f"output_dir: {folder}", "resume_from_checkpoint: auto"]


def test_a_state_of_another_step_is_not_that_of_the_checkpoint(tmp_path, finished, arguments, capsys, fresh):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoint-4").rename(folder / "checkpoint-3")
    (warning,) = resumed(folder, arguments, capsys)
    assert warning.endswith("checkpoint-3 is damaged: state.json is that of step 4; using an older one")
    assert_same_run(folder, finished)


def flips(content):
    for position in range(len(content)):
        for bit in range(8):
            yield content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


@pytest.mark.slow
def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path, finished):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-4", folder)
    run_folder.check_manifest(folder)
    manifest = folder / "manifest.json"
    accepted = []
    for content in flips(manifest.read_bytes()):
        manifest.write_bytes(content)
        if run_folder.is_whole(folder):
            accepted.append(content)
    assert accepted == []


@pytest.mark.slow
def test_no_flipped_bit_of_the_metrics_raises(tmp_path, finished, arguments, monkeypatch, capsys):
    """Neither when the lines are read again nor in the summary at the end. A changed digit cannot be noticed."""
    monkeypatch.setattr(storage, "flush", lambda path: None)
    monkeypatch.setattr(monitors, "next_commands", lambda recipe: [])  # which look at the images
    recipe = load_recipe("quickstart", [*arguments[2:], "--output_dir", str(tmp_path)])
    plan = make_plan(recipe, 16, 1)
    damaged = 0
    for name in ("metrics.jsonl", "knn.jsonl"):
        whole = (finished / name).read_bytes()
        # The block norms are not read again; all other parts are flipped.
        content = b"".join(
            json.dumps({**json.loads(line), "block_grad_norms": {}}).encode() + b"\n" for line in whole.splitlines()
        )
        for flipped in flips(content):
            (tmp_path / name).write_bytes(flipped)
            resume.truncate_lines(storage.RecordFile(tmp_path / name), steps_done=4)
            lines, numbers = storage.read_lines(tmp_path / name)
            assert numbers == []
            damaged += len(lines) < 2
            steps = [line["step"] for line in lines]
            assert steps == sorted(set(steps))
            assert all(0 < step <= 4 for step in steps)
            summarize(recipe, plan)
        (tmp_path / name).write_bytes(content)
    assert damaged > 1000
