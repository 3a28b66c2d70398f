"""Pushes of finished classifiers: the real scripts and the real client, to a Hub on loopback."""

import json

import pytest

from mocov3_hf.evaluation import finetune, linear_probe, supervised
from mocov3_hf.reporting import RunError
from mocov3_hf.results import read_results
from tests.hub.stand_in import TOKEN, HubStandIn
from tests.launch import ROOT, python


@pytest.fixture
def hub():
    hub = HubStandIn()
    yield hub
    hub.shutdown()
    hub.server_close()


def command(model_folder, image_folder, output_dir, *more):
    paths = ["--model", model_folder, "--dataset_name", image_folder, "--output_dir", output_dir]
    return [
        str(value) for value in (*paths, "--num_train_epochs", 1, "--train_batch_size", 15, "--push_to_hub", *more)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more", "task"),
    [("finetune.py", ["--warmup_epochs", 0], "finetune"), ("linear_probe.py", [], "linear")],
)
def test_the_finished_folder_is_pushed(model_folder, image_folder, tmp_path, hub, script, more, task):
    argv = command(model_folder, image_folder, tmp_path / "birds", "--hub_private_repo", *more)
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    done = python(ROOT / "scripts" / script, *argv, **environment)
    (name,) = (key.removeprefix("models/") for key in hub.repositories)
    assert name.endswith("/birds"), "named as the folder"
    assert hub.private
    assert f"pushed: {hub.url}/{name}/commit/" in done.stdout
    files = hub.files(name)
    assert files["model.safetensors"] == (tmp_path / "birds" / "model.safetensors").read_bytes()
    assert {"config.json", "preprocessor_config.json", "results.json", "metrics.jsonl", "README.md"} <= set(files)
    assert json.loads(files["results.json"])["results"][0]["task"] == task
    assert not any(path.startswith("checkpoint-") for path in files)


@pytest.mark.slow
@pytest.mark.parametrize("main", [finetune.main, linear_probe.main])
def test_repository_and_visibility_are_passed_on(model_folder, image_folder, tmp_path, main, monkeypatch):
    pushed = []

    def push(folder, name, *, private):
        assert read_results(folder), "recorded before it is pushed"
        pushed.append((str(folder), name, private))
        return "https://hub/commit/1"

    argv = command(model_folder, image_folder, tmp_path, "--hub_model_id", "me/birds")
    monkeypatch.setattr(supervised, "push_folder", push)
    main(argv + (["--warmup_epochs", "0"] if main is finetune.main else []))
    assert pushed == [(str(tmp_path), "me/birds", False)]


def test_a_failed_push_loses_nothing_and_is_one_line(model_folder, image_folder, tmp_path, monkeypatch, fails):
    def push(folder, name, *, private):
        raise RunError("the token may not write")

    monkeypatch.setattr(supervised, "push_folder", push)
    options = ["--hub_model_id", "me/birds", "--hub_private_repo"]
    line = fails(linear_probe.main, command(model_folder, image_folder, tmp_path, *options), code=1)
    assert line.startswith(
        f"error: the classifier is saved in '{tmp_path}', but the push failed: the token may not write;"
    )
    assert line.endswith(f"mocov3 push {tmp_path} --hub_model_id me/birds --hub_private_repo")
    assert (tmp_path / "model.safetensors").exists()
    assert read_results(tmp_path)


def test_an_impossible_repository_is_refused_before_training(model_folder, image_folder, tmp_path, fails):
    arguments = command(model_folder, image_folder, tmp_path / "out", "--hub_model_id", "me/bi rds")
    line = fails(linear_probe.main, arguments, code=2)
    assert line.startswith("error: 'me/bi rds' is not a valid repository name: pass USER/NAME as --hub_model_id (")
    assert not (tmp_path / "out").exists()
