"""A run records what it found, and resumes on the images that it was trained on, or says what has changed."""

import json
import shutil

import pytest

from mocov3_hf.pretraining.pretrain import main
from tests.pretraining.test_run import read_metrics


@pytest.fixture
def images(pictures, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(pictures, folder)
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture
def run(tiny, images, tmp_path, fresh):
    """A function (options) that runs in the same output folder."""
    started = []

    def start(*options):
        fresh()
        resume = ["--resume_from_checkpoint", "auto"] if started else []
        started.append(options)
        arguments = [*tiny, "--dataset_name", str(images), "--output_dir", str(tmp_path / "run"), *resume]
        main([*arguments, "--num_train_epochs", "4", "--max_steps", "null", "--save_steps", "3", *options])
        return read_metrics(tmp_path / "run")

    return start


def refused(run, capsys, *options) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    return capsys.readouterr().err.rstrip().splitlines()[-1]


def cut(tmp_path, step):
    """Leave the checkpoints up to a step, as if the run had been killed."""
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) > step:
            shutil.rmtree(folder)


def test_the_run_records_what_it_found(run, tmp_path, capsys):
    run("--max_steps", "1")
    assert "data: 24 images of 25 files, split 'train', image folder" in capsys.readouterr().err
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (data["num_images"], data["num_files"], data["skipped"]) == (24, 25, {"side file (.txt)": 1})
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "state.json").read_text())["run"]
    assert state["num_samples"] == 24
    assert len(state["data_fingerprint"]) == 32


@pytest.mark.slow
def test_a_data_set_that_changed_is_refused_and_then_continued_by_the_rule(run, images, tmp_path, capsys):
    assert len(run()) == 12  # 4 epochs of 3 steps
    cut(tmp_path, 6)
    for number in range(8):
        shutil.copy(images / "00.png", images / f"new{number}.png")
    message = refused(run, capsys)
    assert message.startswith("error: the data set grew from 24 to 32 images since ")
    assert message.endswith(
        "restore the data set, or pass --allow_data_change to continue with the images that there are now"
    )
    (tmp_path / "run" / "bad_images.jsonl").write_text('{"id": 1, "reason": "of the old data"}\n')
    lines = run("--allow_data_change", "--save_steps", "4")
    # The number of steps stays, epochs have 4 steps from here on.
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[5]["epoch"] == 2.0
    assert [line["epoch"] for line in lines[6:8]] == [7 / 4, 8 / 4]
    assert not (tmp_path / "run" / "bad_images.jsonl").exists()
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"]) == ("data_change", 6)
    # From now on these are the data of the run.
    cut(tmp_path, 8)
    assert [line["learning_rate"] for line in run()] == [line["learning_rate"] for line in lines]


def test_images_that_were_replaced_are_refused(run, images, tmp_path, capsys):
    run()
    cut(tmp_path, 6)
    (images / "01.png").write_bytes((images / "02.png").read_bytes())
    assert "the same number of images, but some were replaced, renamed or reordered" in refused(run, capsys)
    (images / "01.png").unlink()
    assert "the data set shrank from 24 to 23 images" in refused(run, capsys)


@pytest.mark.slow
def test_a_data_set_that_moved_is_the_same(run, images, tmp_path):
    run()
    cut(tmp_path, 6)
    images.rename(tmp_path / "moved")
    assert len(run("--dataset_name", str(tmp_path / "moved"))) == 12


@pytest.mark.slow
def test_checkpoints_without_a_fingerprint_resume_as_before(run, images, tmp_path):
    run()
    cut(tmp_path, 6)
    strip_identity(tmp_path / "run" / "checkpoint-6")
    (images / "01.png").write_bytes((images / "02.png").read_bytes())
    assert len(run()) == 12


def strip_identity(folder):
    from mocov3_hf.run_folder import write_manifest

    state = json.loads((folder / "state.json").read_text())
    for name in ("num_samples", "data_fingerprint", "data_changes"):
        del state["run"][name]
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def test_a_plan_as_one_json_object(tiny, images, capsys):
    main([*tiny, "--dataset_name", str(images), "--dry_run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    expected = {"num_images": 24, "skipped": {"side file (.txt)": 1}, "num_channels": 3, "train_batch_size": 8}
    expected |= {"total_steps": 4, "steps_per_epoch": 3, "mixed_precision": "no", "num_files": 25}
    assert {name: plan[name] for name in expected} == expected
    assert plan["learning_rate"] == pytest.approx(plan["recipe"]["base_learning_rate"] * 8 / 256)
    assert sum(plan["skipped"].values()) + plan["num_images"] == plan["num_files"]


def test_a_plan_in_words_says_what_was_found(tiny, images, capsys):
    main([*tiny, "--dataset_name", str(images), "--dry_run"])
    text = capsys.readouterr().out
    assert "data: 24 images of 25 files" in text
    assert "data: skipped 1: side file (.txt), such as notes.txt" in text


def test_json_without_a_dry_run_is_refused(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*tiny, "--json", "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "--json prints the plan of a run: pass it with --dry_run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
