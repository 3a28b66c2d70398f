"""CIFAR-10 study: command lines, tables and verdicts, checked on results with round numbers."""

import json
import math

import pytest

from benchmarks import study_report
from benchmarks.study_arms import ABLATION_BASELINE, ARMS, FAILURE, LONG_ARMS, arguments_of, without
from benchmarks.study_report import (
    ablation_table,
    interval,
    paired_differences,
    replace_section,
    sections,
    verdict,
)
from mocov3_hf.pretraining.auto import Facts, MemoryModel, choose
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.recipe import load_recipe


def result(arm: str, seed: int, linear: float, knn: float = 0.4) -> dict:
    return {
        "arm": arm,
        "seed": seed,
        "points": [{"step": 10, "epoch": 1.0, "knn_top1": knn, "linear_top1": linear}],
        "events": [{"step": 3, "event": "spike", "grad_norm": 2.5}],
        "metrics": [
            {"step": 10, "epoch": 1.0, "loss_normalized": 0.5, "positive_top1": 0.25, "first_layer_grad_max": 0.1}
            | {"projection_effective_rank": 7.0}
        ],
        "knn_while_training": [{"step": 10, "epoch": 1.0, "knn_top1": 0.3}],
        "cpu_seconds": {"pretraining": 90.0, "evaluation": 30.0},
    }


RUNS = {
    ABLATION_BASELINE: [result(ABLATION_BASELINE, seed, linear) for seed, linear in enumerate((0.40, 0.42, 0.44))],
    # 3 points below the baseline, with a standard deviation of 0.5
    "no predictor": [result("no predictor", seed, linear) for seed, linear in enumerate((0.375, 0.390, 0.405))],
    # above and below the baseline
    "EMA decay 0.9": [result("EMA decay 0.9", seed, linear) for seed, linear in enumerate((0.401, 0.420, 0.439))],
    # better here, worse in the paper
    "EMA decay 0": [result("EMA decay 0", seed, linear) for seed, linear in enumerate((0.421, 0.440, 0.459))],
    "ResNet-10": [result("ResNet-10", seed, 0.5) for seed in range(2)],
    FAILURE: [result(FAILURE, 0, 0.2)],
}


ABLATIONS = [arm for arm in ARMS if arm.group == "ablations"]


@pytest.mark.parametrize("arms", [ARMS, LONG_ARMS], ids=["short", "long"])
def test_arms_are_distinct_runs(arms):
    assert len({arm.key for arm in arms}) == len({arm.name for arm in arms}) == len(arms)
    command_lines = [arguments_of(arm) for arm in arms]
    assert len(set(map(tuple, command_lines))) == len(arms)
    for arm, arguments in zip(arms, command_lines, strict=True):
        recipe = load_recipe(arguments[1], arguments[2:])
        plan = make_plan(recipe, arm.num_images, 1)
        assert plan.total_steps == arm.steps
        assert arm.max_steps is not None or arm.steps == arm.epochs * (arm.num_images // arm.batch_size)
        assert math.ceil(plan.total_steps / recipe.run.save_steps) == arm.points


def test_an_arm_changes_the_setting_that_it_is_named_after():
    recipes = {}
    for arm in ARMS:
        arguments = arguments_of(arm)
        recipes[arm.name] = load_recipe(arguments[1], arguments[2:]).to_dict()
    baseline = recipes[ABLATION_BASELINE]
    changed = {
        arm.name: {name for name, value in recipes[arm.name].items() if value != baseline[name]}
        for arm in ARMS
        if arm.group == "ablations" and arm.name != ABLATION_BASELINE
    }
    batch = changed.pop("batch 256")
    assert batch == {"train_batch_size", "learning_rate", "save_steps"}
    assert changed.pop("EMA decay 0") == {"ema_decay", "ema_schedule"}
    for name, options in changed.items():
        assert len(options) == 1, name
    assert recipes["position learned"]["backbone_config"]["position_embedding"] == "learned"
    assert recipes["patch projection trained"]["backbone_config"]["freeze_patch_projection"] is False


def test_one_of_the_longer_arms_is_the_automatic_plan():
    facts = Facts(50_000, side=32, num_cores=2, precision_reason="")
    memory = MemoryModel(fixed=2**27, per_image=2**16, per_image_in_backbone=2**20)
    arguments = arguments_of(next(arm for arm in ARMS if arm.name == "EMA decay 0.9, 4 epochs"))
    recipe = load_recipe(arguments[1], arguments[2:]).to_dict()
    planned = {choice.option: choice.value for choice in choose(facts, {"num_train_epochs": 4}, lambda _: memory)}
    monitored = {option for option in planned if option.startswith("knn_")}
    assert {option: recipe[option] for option in planned.keys() - monitored} == {
        option: value for option, value in planned.items() if option not in monitored
    }


def test_without():
    assert without(("--a", "1", "--b", "2"), "--a") == ("--b", "2")
    assert without(("--b", "2"), "--a") == ("--b", "2")


def test_differences_are_paired_by_seed():
    differences = paired_differences(RUNS["no predictor"], RUNS[ABLATION_BASELINE], "linear_top1")
    assert differences == pytest.approx([-2.5, -3.0, -3.5])
    only_second = paired_differences(RUNS["no predictor"][1:2], RUNS[ABLATION_BASELINE], "linear_top1")
    assert only_second == pytest.approx([-3.0])


def test_interval():
    quantile = 3.182446  # of Student's t with 3 degrees of freedom, 97.5 %
    assert interval([[1.0, 3.0], [10.0, 10.0, 10.0], [5.0]]) == pytest.approx(quantile * (2.0 / 3.0) ** 0.5)
    assert math.isnan(interval([[1.0], [2.0]]))  # one value per sample: no estimate


@pytest.mark.parametrize(
    ("here", "half_width", "there", "expected"),
    [
        (-3.0, 0.1, -1.0, "yes"),
        (3.0, 0.1, -1.0, "no"),
        (0.05, 0.1, -1.0, "within noise"),
        (-0.05, 0.1, -1.0, "within noise"),
        (-3.0, float("nan"), -1.0, "one seed"),
    ],
)
def test_verdict(here, half_width, there, expected):
    assert verdict(here, half_width, there) == expected


def test_ablation_table():
    rows = {line.split(" | ")[0].strip("| "): line for line in ablation_table(RUNS, ABLATIONS).splitlines()[2:]}
    assert "| 42.0 ± 2.0 | | | | |" in rows[ABLATION_BASELINE]
    assert "| 40.0 ± 0.0 | +0.0 ± 0.0 |" in rows["no predictor"]
    # Pooled standard deviation 0.3, times 2.447 (Student's t, 6 degrees of freedom), over the root of 3 seeds.
    assert "| -3.0 ± 0.4 | 75.5 (ViT-B, 300 epochs) | -1.0 | yes |" in rows["no predictor"]
    assert rows["EMA decay 0.9"].endswith("| within noise |")
    assert "| +2.0 ± 0.4 |" in rows["EMA decay 0"]
    assert rows["EMA decay 0"].endswith("| -2.2 | no |")
    assert set(rows) == {ABLATION_BASELINE, "no predictor", "EMA decay 0.9", "EMA decay 0"}
    with pytest.raises(KeyError, match=ABLATION_BASELINE):  # no other arm takes its place
        ablation_table({name: RUNS[name] for name in ("no predictor", "EMA decay 0.9")}, ABLATIONS)


@pytest.mark.slow
def test_the_report_is_written_and_deterministic(tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    for runs in RUNS.values():
        for run in runs:
            (results / f"{run['arm'].replace(' ', '_').replace('/', '_')}_seed{run['seed']}.json").write_text(
                json.dumps(run)
            )
    document = tmp_path / "study.md"
    document.write_text("".join(f"<!-- {name} -->\n<!-- end {name} -->\n" for name in sections(RUNS)) + "kept\n")
    monkeypatch.setattr("sys.argv", ["study_report.py", "--results", str(results), "--document", str(document)])
    study_report.main()
    first, plot = document.read_text(), (tmp_path / "study" / "failure.svg").read_bytes()
    assert "| no predictor | 3 |" in first
    assert f"| {FAILURE} | 10 | 0.500 | 0.250 | 0.1 | 7.0 | 30.0 |" in first
    assert f"{FAILURE}: 1 (spike)" in first
    assert first.endswith("kept\n")
    study_report.main()
    assert document.read_text() == first
    assert (tmp_path / "study" / "failure.svg").read_bytes() == plot


def test_a_document_without_markers_is_an_error():
    with pytest.raises(ValueError, match="no section between '<!-- curves -->' and '<!-- end curves -->'"):
        replace_section("text", "curves", "table")
