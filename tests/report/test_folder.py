"""What is read from a folder, whatever its state."""

import json

import pytest

from mocov3_hf import MoCoV3ForPreTraining
from mocov3_hf.recipe import load_recipe
from mocov3_hf.report.folder import ReportError, read_folder
from mocov3_hf.report.summary import facts, findings


def test_run(run):
    folder = read_folder(run)
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
    assert read_folder(run).parameters == counted


@pytest.mark.parametrize("broken", ['{"step": 45, "lo', "[1, 2]", '{"loss": 1.0}', "\x00\x00", '{"step": "4"}'])
def test_damaged_last_line(run, broken):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + broken)
    folder = read_folder(run)
    assert len(folder.metrics) == 9
    assert folder.notes == ["1 of 10 lines of metrics.jsonl (line 10) cannot be read and is left out."]


@pytest.mark.parametrize("name", ["results.json", "config.json", "recipe.yaml", "checkpoint-40/state.json"])
def test_damaged_file_is_left_out_with_a_note(run, name):
    (run / name).write_text("{ broken")
    folder = read_folder(run)
    assert folder.kind == "pretraining"
    assert len(folder.notes) == 1
    assert name.split("/")[-1].split(".")[0] in folder.notes[0]


def test_damaged_weights_are_left_out_with_a_note(run):
    (run / "model.safetensors").write_bytes(b"\x10")
    folder = read_folder(run)
    assert folder.parameters == {}
    assert "model.safetensors cannot be read" in folder.notes[0]


def test_batch_size_is_unknown_without_state_and_with_a_size_per_process(run):
    load_recipe(str(run / "recipe.yaml"), ["--per_device_train_batch_size", "4"]).save(run / "recipe.yaml")
    (run / "checkpoint-40" / "state.json").unlink()
    assert read_folder(run).global_batch_size is None
    load_recipe("quickstart").save(run / "recipe.yaml")
    assert read_folder(run).global_batch_size == 256


def test_folder_before_the_first_checkpoint(run):
    for name in ("config.json", "model.safetensors"):
        (run / name).unlink()
    folder = read_folder(run)
    assert folder.kind == "pretraining"
    assert not folder.has_model
    assert folder.backbone["hidden_size"] == 32
    assert folder.temperature == 0.2


def test_trainer_history_stands_in_for_the_lines_of_a_classifier(classifier):
    (classifier / "metrics.jsonl").unlink()
    for step, loss in ((5, 2.0), (10, 1.0)):
        checkpoint = classifier / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": loss}]}))
    assert read_folder(classifier).metrics == [{"step": 10, "loss": 1.0}]


def test_anything_else_is_refused(tmp_path):
    with pytest.raises(ReportError, match="does not exist"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match="is a file"):
        read_folder(tmp_path / "file")
    with pytest.raises(ReportError, match="neither a run nor a model"):
        read_folder(tmp_path)


def test_facts(run):
    found = dict(facts(read_folder(run)))
    assert found["Steps"] == "40 of 40 (10 epochs)"
    assert found["Global batch size"] == "8 on 2 processes"
    assert found["Peak learning rate"] == "0.002 × batch size / 256 = 6.25e-05"
    assert found["Dataset"] == "<u>"  # only the last part of a path: the rest is private
    total = sum(parameter.numel() for parameter in MoCoV3ForPreTraining.from_pretrained(run).parameters())
    assert found["Parameters"].startswith(f"{total / 1e6:.2f} M: ")
    assert "momentum encoder 0.02" in found["Parameters"]


def test_findings_of_an_unstable_run(run):
    found = findings(read_folder(run))
    assert ("bad", "Instability: 1 gradient spike, 1 skipped step, 1 rollback. See the gradient norm.") in found
    assert ("good", "kNN accuracy is 80.0 %, up from 20.0 % at step 10.") in found
    assert any(kind == "good" and "of the way from chance (1.66)" in text for kind, text in found)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"loss": 1.7}, "bad", "is at chance"),
        ({"projection_std_ratio": 0.001}, "bad", "have collapsed"),
        ({"data_wait_fraction": 0.4}, "look", "stalls training for 40 % of the time"),
        ({"step": 36}, "look", "stopped at step 36 of 40"),
    ],
)
def test_findings_of_what_goes_wrong(run, changes, kind, words):
    kept = [json.loads(line) | {"loss": 1.0} | changes for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert [found for found, text in findings(read_folder(run)) if words in text] == [kind]


def test_findings_of_an_accuracy_that_fell(classifier):
    expected = "Test accuracy fell from 70.0 % at step 10 to 60.0 %."
    assert findings(read_folder(classifier)) == [("look", expected)]
