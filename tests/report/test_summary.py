"""The summary of a folder: facts about it, and what to notice in its curves."""

import copy
import json

import numpy as np
import pytest
import yaml

from mocov3_hf import MoCoV3ForPreTraining
from mocov3_hf.report.curves import Series
from mocov3_hf.report.measured import results_section
from mocov3_hf.report.summary import accuracy_findings, facts, findings, lead
from mocov3_hf.results import append_result
from mocov3_hf.run_folder import read_run_folder
from tests.factories import write_lines


def test_facts(run):
    found = dict(facts(read_run_folder(run)))
    assert found["Steps"] == "40 of 40 (10 epochs)"
    assert found["Global batch size"] == "8 on 2 processes"
    assert found["Peak learning rate"] == "0.002 × batch size / 256 = 6.25e-05"
    assert found["EMA decay"] == "0.9, cosine"
    # 40 steps of 8 images at 100 images/s, on two processes.
    assert found["Training time"] == "0:00:03"
    assert found["Throughput"] == "100 images/s; 320 images seen"
    assert found["Cost"] == f"{3.2 * 2 / 3600:.3g} process-hours"
    assert found["Trained on"] == "a cpu, 2 cores"
    assert found["Dataset"] == "<u>"  # only the last part of a path: the rest is private
    total = sum(parameter.numel() for parameter in MoCoV3ForPreTraining.from_pretrained(run).parameters())
    assert found["Parameters"].startswith(f"{total / 1e6:.2f} M: ")
    assert "momentum encoder 0.02" in found["Parameters"]


def test_findings_of_an_unstable_run(run):
    found = findings(read_run_folder(run))
    assert ("bad", "Instability: 1 gradient spike, 1 skipped step, 1 rollback. See the gradient norm.") in found
    assert ("good", "kNN accuracy is 80.0 %, up from 20.0 % at step 10; chance is 33.3 %.") in found
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
    assert [found for found, text in findings(read_run_folder(run)) if words in text] == [kind]


def test_findings_of_an_accuracy_that_fell(classifier):
    expected = "Test accuracy fell from 70.0 % at step 10 to 60.0 %."
    assert findings(read_run_folder(classifier)) == [("look", expected)]


def test_a_classifier_is_judged_by_the_size_of_its_test_split(classifier):
    lines = [{"step": 10, "eval_top1": 0.3}, {"step": 20, "eval_top1": 0.4}]
    write_lines(classifier / "metrics.jsonl", lines)  # of three classes
    for size, expected in ((10, "bad"), (1000, "good")):
        append_result(
            classifier, task="linear", dataset={"size": size}, metrics={"top1": 0.4}, settings={}, seconds=1.0
        )
        assert [kind for kind, _ in findings(read_run_folder(classifier))] == [expected]


@pytest.mark.parametrize(
    ("last", "chance", "images", "kind"),
    [
        (0.10, 0.1, 100, "bad"),
        (0.02, 0.1, 100, "bad"),
        (0.15, 0.1, 100, "bad"),  # chance reaches 0.16 on 100 images in 1 of 20 runs
        (0.17, 0.1, 100, "good"),
        (0.15, 0.1, 10_000, "good"),
        (0.15, 0.1, np.nan, "good"),
        (0.15, None, 100, "look"),  # of earlier versions, which did not record it
        (0.60, 0.1, 100, "look"),  # fell from 0.7
    ],
)
def test_an_accuracy_is_good_only_above_chance(last, chance, images, kind):
    accuracy = Series(np.array([1.0, 2.0]), np.array([0.7 if last == 0.6 else 0.01, last]))
    ((found, text),) = accuracy_findings("Accuracy", accuracy, chance, images)
    assert found == kind
    assert f"{100 * last:.1f} %" in text


def test_nothing_is_good_in_a_run_that_has_learned_nothing(run):
    lines = [json.loads(line) | {"loss": 1.67} for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", lines)
    knn = [json.loads(line) | {"knn_top1": 0.34} for line in (run / "knn.jsonl").read_text().splitlines()]
    write_lines(run / "knn.jsonl", knn)
    found = {text.partition(" ")[0]: kind for kind, text in findings(read_run_folder(run))}
    assert found["The"] == found["kNN"] == "bad"


@pytest.mark.parametrize("value", ["many", [1], {}, True, False, 10**400, float("nan")])
def test_a_recipe_edited_by_hand_does_not_stop_a_report(run, value):
    keys = yaml.safe_load((run / "recipe.yaml").read_text()).keys()
    (run / "recipe.yaml").write_text(yaml.safe_dump({key: copy.deepcopy(value) for key in keys}))
    (run / "config.json").unlink()
    folder = read_run_folder(run)
    assert folder.notes == []
    assert lead(folder).startswith("MoCo v3 pre-training of ")
    assert dict(facts(folder))["Steps"] == "40 of 40 (10 epochs)"
    assert [kind for kind, text in findings(folder) if "Instability" in text] == ["bad"]
    assert len(results_section(folder).parts) == 1
