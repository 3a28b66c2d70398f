"""What is read from the folder of a run or a model, whatever its state."""

import json

import pytest
import yaml

from mocov3_hf import MoCoV3ForPreTraining
from mocov3_hf.run_folder import read_run_folder
from tests.factories import save_recipe, save_run, save_trained_classifier


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


@pytest.fixture
def classifier(tmp_path):
    return save_trained_classifier(tmp_path / "classifier")


def test_run(run):
    folder = read_run_folder(run)
    assert folder.kind == "pretraining"
    assert folder.notes == []
    assert len(folder.metrics) == 9
    assert len(folder.knn) == len(folder.events) == 3
    assert [row["task"] for row in folder.results] == ["knn"]
    assert folder.temperature == 0.2
    assert folder.global_batch_size == 8  # of the checkpoint: the recipe says 16


def test_parameters_are_those_of_the_model(run):
    counted = {}
    for name, parameter in MoCoV3ForPreTraining.from_pretrained(run).named_parameters():
        part = name.split(".")[0]
        counted[part] = counted.get(part, 0) + parameter.numel()
    assert read_run_folder(run).parameters == counted


@pytest.mark.parametrize("broken", ['{"step": 45, "lo', "[1, 2]", '{"loss": 1.0}', "\x00\x00", '{"step": "4"}'])
def test_damaged_last_line(run, broken):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + broken)
    folder = read_run_folder(run)
    assert len(folder.metrics) == 9
    assert folder.notes == ["1 of 10 lines of metrics.jsonl were left out, they are damaged: line 10."]


@pytest.mark.parametrize("name", ["results.json", "config.json", "recipe.yaml", "checkpoint-40/state.json"])
def test_damaged_file_is_left_out_with_a_note(run, name):
    (run / name).write_text("{ broken")
    folder = read_run_folder(run)
    assert folder.kind == "pretraining"
    assert len(folder.notes) == 1
    assert folder.notes[0].startswith(f"{name.split('/')[-1]} was left out")
    assert str(run) not in folder.notes[0]  # a report may be published


def test_damaged_weights_are_left_out_with_a_note(run):
    (run / "model.safetensors").write_bytes(b"\x10")
    folder = read_run_folder(run)
    assert folder.parameters == {}
    assert "model.safetensors cannot be read" in folder.notes[0]


def test_batch_size_is_unknown_without_state_and_with_a_size_per_process(run):
    save_recipe(run, str(run / "recipe.yaml"), "--per_device_train_batch_size", "4")
    (run / "checkpoint-40" / "state.json").unlink()
    assert read_run_folder(run).global_batch_size is None
    save_recipe(run, "quickstart")
    assert read_run_folder(run).global_batch_size == 256


def test_folder_before_the_first_checkpoint(run):
    for name in ("config.json", "model.safetensors"):
        (run / name).unlink()
    folder = read_run_folder(run)
    assert folder.kind == "pretraining"
    assert folder.config == {}
    assert folder.backbone["hidden_size"] == 32
    assert folder.temperature == 0.2


def test_trainer_history_stands_in_for_the_lines_of_a_classifier(classifier):
    (classifier / "metrics.jsonl").unlink()
    for step, loss in ((5, 2.0), (10, 1.0)):
        checkpoint = classifier / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": loss}]}))
    assert read_run_folder(classifier).metrics == [{"step": 10, "loss": 1.0}]


def test_anything_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_run_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        read_run_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="neither a run nor a model"):
        read_run_folder(tmp_path)


def test_names_of_earlier_versions_are_those_of_today(run):
    written = {"momentum": 0.99, "momentum_schedule": "cosine", "model_name_or_path": "x", "lars_momentum": 0.9}
    (run / "recipe.yaml").write_text(yaml.safe_dump(written))
    (run / "metrics.jsonl").write_text('{"step": 1, "momentum": 0.5}\n{"step": 2, "ema_decay": 0.6}\n')
    folder = read_run_folder(run)
    assert folder.recipe == {"ema_decay": 0.99, "ema_schedule": "cosine", "model": "x", "lars_momentum": 0.9}
    assert [line["ema_decay"] for line in folder.metrics] == [0.5, 0.6]


@pytest.mark.parametrize("value", ["many", [1], {}, 0, -1, True, float("inf")])
def test_a_number_that_is_none_is_unknown(run, value):
    (run / "config.json").unlink()
    (run / "checkpoint-40" / "state.json").unlink()
    (run / "recipe.yaml").write_text(yaml.safe_dump({"train_batch_size": value, "temperature": value}))
    folder = read_run_folder(run)
    assert folder.global_batch_size is None
    assert folder.temperature is None


def test_a_recipe_that_is_a_list_is_left_out_with_a_note(run):
    (run / "recipe.yaml").write_text("- 1\n")
    folder = read_run_folder(run)
    assert folder.recipe == {}
    assert folder.notes == ["recipe.yaml was left out: recipe.yaml must hold a mapping of options, got a list."]
