"""The section about predictions: calibration and selective accuracy, average precision, predicted against true."""

import json

import numpy as np
import pytest
import torch

from mocov3_hf.evaluation.problems import confidence_metrics, target_metrics
from mocov3_hf.loading import load_classifier
from mocov3_hf.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from mocov3_hf.report import write
from mocov3_hf.report.measured import Measured, known_results
from mocov3_hf.report.predictions import predictions_section
from mocov3_hf.report.summary import facts
from mocov3_hf.results import append_result
from mocov3_hf.run_folder import read_run_folder
from mocov3_hf.weights import weights_hash
from tests.factories import AWKWARD_NAMES, save_classifier
from tests.report.browser import Browser, find_chromium
from tests.report.test_browser import CUT


CHARTS = {
    SINGLE_LABEL: ["reliability", "selective-accuracy"],
    MULTI_LABEL: ["average-precision"],
    REGRESSION: ["scatter-0", "scatter-1", "scatter-2"],
}


def evaluated(folder, problem_type):
    """A classifier with an evaluation of 200 images."""
    names = AWKWARD_NAMES if problem_type != MULTI_LABEL else [*AWKWARD_NAMES, *(f"class {n}" for n in range(40))]
    save_classifier(folder, names=names, problem_type=None if problem_type == SINGLE_LABEL else problem_type)
    draw = np.random.default_rng(0)
    logits = torch.from_numpy(draw.normal(size=(200, len(names)))).float()
    if problem_type == SINGLE_LABEL:
        found = confidence_metrics(2 * logits, draw.integers(0, len(names), 200))
    else:
        labels = logits.double().numpy() + draw.normal(size=logits.shape)
        labels = labels if problem_type == REGRESSION else (labels > 1).astype(np.uint8)
        found = target_metrics(logits, labels, names, None)
        del found["per_class"]
    plots = found.pop("plots")
    weights = weights_hash(load_classifier(folder))
    dataset = {"name": "pets", "split": "test", "size": 200, "num_classes": len(names), "problem_type": problem_type}
    model = {"name": "m", "weights": weights}
    append_result(
        folder, task="evaluate", dataset=dataset, metrics=found, settings={}, seconds=1.0, model=model, plots=plots
    )
    return folder


@pytest.mark.parametrize("problem_type", CHARTS)
def test_charts_of_the_newest_result(problem_type, tmp_path):
    folder = evaluated(tmp_path / "model", problem_type)
    run = read_run_folder(folder)
    section = predictions_section(run, known_results(run), tmp_path)
    assert run.notes == []
    text, charts = section.parts
    is_regression = problem_type == REGRESSION
    assert text.text.startswith(f"{'Test' if is_regression else 'Classification'} on pets, split test (200 images)")
    assert dict(facts(run))["Kind"] == ("Regression model" if is_regression else "Classifier")
    assert [chart.name for chart in charts.charts] == CHARTS[problem_type]
    assert all((tmp_path / f"{chart.name}.png").is_file() for chart in charts.charts)
    if problem_type == SINGLE_LABEL:
        ece = json.loads((folder / "results.json").read_text())["results"][0]["metrics"]["ece"]
        assert f"(ECE): {100 * ece:.1f} %" in charts.charts[0].caption
    if problem_type == MULTI_LABEL:
        assert "The 15 best and the 15 worst of 43 classes" in charts.charts[0].caption


def test_results_without_predictions_have_no_section(tmp_path):
    run = read_run_folder(evaluated(tmp_path / "model", SINGLE_LABEL))
    (measured,) = known_results(run)
    assert predictions_section(run, [measured._replace(is_current=False)], tmp_path) is None
    assert predictions_section(run, [Measured({"plots": [], "metrics": {}})], tmp_path) is None


@pytest.mark.parametrize(
    "plots",
    [
        {"reliability": 3},
        {"reliability": {"count": ["x"], "confidence": [0.1], "accuracy": [0.1]}},
        {"selective_accuracy": {"coverage": [], "accuracy": []}},
        {"average_precision": [[1]]},
        {"average_precision": []},
        {"scatter": {"names": ["a"], "true": [[None]], "predicted": [[1]]}},
    ],
)
def test_damaged_predictions_are_left_out(plots, tmp_path):
    run = read_run_folder(evaluated(tmp_path / "model", SINGLE_LABEL))
    (measured,) = known_results(run)
    damaged = measured._replace(result=measured.result | {"plots": plots})
    assert predictions_section(run, [damaged], tmp_path) is None
    assert len(run.notes) == 1


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome on the PATH to open the page in")
def test_pages_fit(tmp_path):
    with Browser() as browser:
        for problem_type in CHARTS:
            folder = evaluated(tmp_path / f"a {problem_type}", problem_type)
            write.main([str(folder)])
            for width in (390, 1400):
                browser.show(width)
                browser.open((folder / "report.html").as_uri())
                assert browser.complaints == []
                assert browser.run("document.documentElement.scrollWidth") <= width
                assert browser.run(CUT) == []
                assert browser.run("document.querySelector('#predictions figure svg') !== null")
