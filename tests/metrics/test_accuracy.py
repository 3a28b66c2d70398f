"""Accuracies against scikit-learn, and the metric of `evaluate` without a network."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score

from mocov3_hf.metrics import accuracy_metrics
from mocov3_hf.metrics.evaluate_metric import ClassificationAccuracy


@pytest.fixture(scope="module")
def data():
    """Scores (500, 8) that are right often, and unevenly many labels of each class."""
    draw = np.random.default_rng(0)
    labels = draw.choice(8, 500, p=np.arange(1, 9) / 36)
    scores = draw.normal(size=(500, 8)).astype(np.float32)
    scores[np.arange(500), labels] += 1
    return scores, labels


def test_accuracies_are_those_of_scikit_learn(data):
    scores, labels = data
    found = accuracy_metrics(scores, labels, [f"class {number}" for number in range(8)])
    predicted = scores.argmax(axis=1)
    assert found["top1"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    assert found["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert list(found["per_class"]) == [f"class {number}" for number in range(8)]
    np.testing.assert_allclose(list(found["per_class"].values()), recall_score(labels, predicted, average=None))
    assert found["top1"] != pytest.approx(found["mean_per_class"], abs=1e-3), "the classes are uneven"


def test_classes_without_images_have_no_accuracy():
    found = accuracy_metrics(np.eye(4)[[0, 1, 1]], np.array([0, 1, 0]))
    assert found["per_class"] == {"0": 0.5, "1": 1.0, "2": None, "3": None}
    assert found["mean_per_class"] == 0.75
    assert "top5" not in found, "of 4 classes all are among the best 5"


def test_equal_scores_do_not_count_as_right():
    """A head of zeros is right where the label is class 0, not everywhere."""
    assert accuracy_metrics(np.zeros((8, 8)), np.arange(8))["top1"] == 1 / 8
    assert accuracy_metrics(np.zeros((8, 8)), np.arange(8))["top5"] == 5 / 8


def test_metric_of_evaluate_is_the_function_and_offline(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scores, labels = data
    metric = ClassificationAccuracy(top=(1, 3), cache_dir=str(tmp_path))
    for begin in range(0, 500, 64):
        metric.add_batch(predictions=scores[begin : begin + 64], references=labels[begin : begin + 64])
    assert metric.compute() == accuracy_metrics(scores, labels, top=(1, 3))
    assert metric.compute(predictions=scores[:20], references=labels[:20]) == accuracy_metrics(
        scores[:20], labels[:20], top=(1, 3)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.arange(9)[:9]}, r"expected scores \(n, C\) and labels \(n,\), n ≥ 1, got \(8, 8\) and \(9,\)"),
        (
            {"labels": np.full(8, 8)},
            r"labels must be in 0\.\.7, .* pass the data set that the classifier was trained for",
        ),
        ({"labels": np.full(8, -1)}, r"got -1\.\.-1"),
        ({"class_names": ["a"]}, "1 class names for scores of 8 classes"),
        ({"scores": np.full((8, 8), np.nan)}, "8 of 8 images have NaN scores"),
        ({"scores": np.zeros((0, 8)), "labels": np.zeros(0, dtype=int)}, "n ≥ 1"),
    ],
)
def test_bad_input_is_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        accuracy_metrics(**({"scores": np.zeros((8, 8)), "labels": np.arange(8)} | change))
    assert "\n" not in str(error.value)
