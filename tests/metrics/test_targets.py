"""Metrics of multi-label classification, regression and calibration against scikit-learn and slow derivations."""

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    mean_absolute_error,
    precision_recall_curve,
    r2_score,
)

from mocov3_hf.metrics import (
    best_thresholds,
    expected_calibration_error,
    knn_average,
    knn_predict,
    multilabel_metrics,
    nearest_neighbors,
    regression_metrics,
    reliability,
    selective_accuracy,
)


@pytest.fixture(scope="module")
def data():
    """Probabilities (300, 6), with equal ones among them, and labels that are often likely; class 5 has no image."""
    draw = np.random.default_rng(0)
    labels = draw.random((300, 6)) < np.array([0.5, 0.3, 0.2, 0.05, 0.02, 0.0])
    return np.round(0.4 * labels + 0.6 * draw.random((300, 6)), 2), labels.astype(np.uint8)


def test_multilabel_metrics_are_those_of_scikit_learn(data):
    probabilities, labels = data
    thresholds = [0.5, 0.4, 0.6, 0.7, 0.55, 0.5]
    found = multilabel_metrics(probabilities, labels, list("abcdef"), thresholds)
    expected = average_precision_score(labels[:, :5], probabilities[:, :5], average=None)
    assert list(found["per_class"].values()) == [*(pytest.approx(value) for value in expected), None]
    assert found["map"] == pytest.approx(expected.mean())
    predicted = probabilities >= np.array(thresholds)
    assert found["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    # Of the classes that have images, as is the mean accuracy per class.
    assert found["macro_f1"] == pytest.approx(f1_score(labels[:, :5], predicted[:, :5], average="macro"))
    assert multilabel_metrics(probabilities, labels)["micro_f1"] == pytest.approx(
        f1_score(labels, probabilities >= 0.5, average="micro")
    )


def test_thresholds_have_the_best_f1(data):
    probabilities, labels = data
    thresholds = best_thresholds(probabilities, labels)
    assert thresholds[5] == 0.5
    for column in range(5):
        precision, recall, _ = precision_recall_curve(labels[:, column], probabilities[:, column])
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
        assert f1_score(labels[:, column], probabilities[:, column] >= thresholds[column]) == pytest.approx(best)
        assert thresholds[column] not in probabilities[:, column], "between two probabilities: noise does not matter"


def test_regression_metrics_are_those_of_scikit_learn():
    draw = np.random.default_rng(1)
    targets = draw.normal(size=(80, 3)) * [1, 50, 0.01] + [0, 2000, 1]
    predictions = targets + draw.normal(size=(80, 3)) * [1, 5, 0.1]
    found = regression_metrics(predictions, targets, ["a", "b", "c"])
    assert found["r2"] == pytest.approx(r2_score(targets, predictions))
    assert list(found["per_class"].values()) == pytest.approx(r2_score(targets, predictions, multioutput="raw_values"))
    assert found["mae"] == pytest.approx(mean_absolute_error(targets, predictions))
    assert found["rmse"] == pytest.approx(np.sqrt(np.square(targets - predictions).mean(axis=0)).mean())
    constant = np.ones((4, 1))
    for shift in (0, 1):
        assert regression_metrics(constant + shift, constant)["r2"] == r2_score(constant, constant + shift)


def test_calibration_is_a_mean_over_bins():
    draw = np.random.default_rng(2)
    confidence = np.append(draw.random(500), [0.0, 0.2, 1.0])
    correct = draw.random(503) < confidence**2
    bins = reliability(confidence, correct, 5)
    assert (bins["count"][0], sum(bins["count"])) == ((confidence <= 0.2).sum(), 503)
    slow = 0.0
    for low in (0, 0.2, 0.4, 0.6, 0.8):
        inside = (confidence > low) & (confidence <= low + 0.2 + 1e-12) | ((low == 0) & (confidence == 0))
        slow += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(bins) == pytest.approx(slow)
    assert reliability(np.array([0.9]), np.array([True]))["accuracy"].count(None) == 14


def test_selective_accuracy_accepts_the_most_confident_first():
    curve = selective_accuracy(np.array([0.9, 0.5, 0.7, 0.5]), np.array([True, True, False, False]))
    assert curve == {"coverage": [0.25, 0.5, 1.0], "accuracy": [1.0, 0.5, 0.5]}
    draw = np.random.default_rng(3)
    confidence, correct = draw.random(1000), draw.random(1000) < 0.5
    curve = selective_accuracy(confidence, correct)
    assert len(curve["coverage"]) == 50
    assert curve["accuracy"][-1] == correct.mean()
    for coverage, accuracy in zip(curve["coverage"], curve["accuracy"], strict=True):
        assert accuracy == pytest.approx(correct[confidence >= np.sort(confidence)[-round(1000 * coverage)]].mean())


def test_the_shares_of_neighbors_are_the_votes():
    draw = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(rows, 8, generator=draw, dtype=torch.float64) for rows in (60, 20))
    labels = torch.randint(4, (60,), generator=draw)
    shares = knn_average(queries, bank, torch.nn.functional.one_hot(labels), [1, 7])
    for k, predicted in knn_predict(queries, bank, labels, [1, 7]).items():
        assert torch.equal(shares[k].argmax(dim=1), predicted[:, 0])
        torch.testing.assert_close(shares[k].sum(dim=1), torch.ones(20, dtype=torch.float64))
    similarities, rows = nearest_neighbors(queries, bank, 7)
    weights = (similarities / 0.07).exp()
    values = torch.randn(60, 2, generator=draw, dtype=torch.float64)
    slow = torch.stack([(weights[q, :, None] * values[rows[q]]).sum(0) / weights[q].sum() for q in range(20)])
    torch.testing.assert_close(knn_average(queries, bank, values, [7])[7], slow)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multilabel_metrics(np.ones((3, 2)), np.zeros((3, 2))), "none of the 3 images has a class"),
        (lambda: multilabel_metrics(np.full((3, 2), np.nan), np.ones((3, 2))), "3 of 3 images have NaN scores"),
        (lambda: multilabel_metrics(np.ones((3, 2)), np.ones((3, 3))), "expected probabilities and labels"),
        (lambda: regression_metrics(np.full((3, 1), np.nan), np.ones((3, 1))), "the model has diverged"),
        (lambda: regression_metrics(np.ones(3), np.ones(3)), "expected predictions and targets"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
