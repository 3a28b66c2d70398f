"""Linear classifiers against scikit-learn on the same features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mocov3_hf.evaluation import linear
from mocov3_hf.evaluation.linear import fit_linear_classifier


@pytest.fixture(scope="module")
def data():
    """Overlapping clusters in badly scaled dimensions, one of them constant: (300, 10) and (200, 10), 4 classes."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 10, generator=generator)
    scale, offset = torch.logspace(-2, 2, 10), torch.linspace(-50, 50, 10)
    sides = []
    for rows in (300, 200):
        labels = torch.randint(4, (rows,), generator=generator)
        features = (centers[labels] + 1.5 * torch.randn(rows, 10, generator=generator)) * scale + offset
        features[:, 4] = 7.25
        sides += [features, labels]
    return sides


def centered(logits):
    """Softmax does not see what all classes have in common, and scikit-learn leaves it open."""
    return logits - logits.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_it_is_the_logistic_regression_of_scikit_learn(data, l2):
    features, labels, test_features, test_labels = data
    fitted = fit_linear_classifier(features, labels, l2=l2, tolerance=1e-8)
    scaler = StandardScaler().fit(features.double().numpy())
    reference = LogisticRegression(C=1 / (l2 * len(features)), tol=1e-10, max_iter=10000)
    reference.fit(scaler.transform(features.double().numpy()), labels.numpy())
    rows = scaler.transform(test_features.double().numpy())
    expected = centered(reference.decision_function(rows))
    np.testing.assert_allclose(centered(fitted.logits(test_features).numpy()), expected, atol=2e-3)
    assert fitted.converged
    assert fitted.accuracy(test_features, test_labels) == reference.score(rows, test_labels.numpy())
    assert 0.4 < reference.score(rows, test_labels.numpy()) < 0.99, "neither chance nor trivial"


def test_gradient_vanishes_at_the_solution(data):
    """Optimality from autograd, independent of the gradient in closed form that the fit uses."""
    features, labels, _, _ = data
    fitted = fit_linear_classifier(features, labels, l2=1e-2, tolerance=1e-9)
    rows = features.double()
    mean, scale = rows.mean(0), rows.std(0, correction=0)
    scale[4] = 1
    weight = (fitted.weight.double() * scale).requires_grad_()
    bias = (fitted.bias.double() + fitted.weight.double() @ mean).requires_grad_()
    logits = (rows - mean) / scale @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, labels) + 0.5e-2 * weight.square().sum()
    loss.backward()
    assert loss.item() == pytest.approx(fitted.loss, rel=1e-6)
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5  # weights went through float32


def test_chunks_change_nothing(data, monkeypatch):
    features, labels, test_features, _ = data
    whole = fit_linear_classifier(features, labels)
    expected = whole.predict(test_features, 2)
    monkeypatch.setattr(linear, "_ROWS", 37)
    for kept in (0, 10**6):
        monkeypatch.setattr(linear, "_KEPT_VALUES", kept)
        pieces = fit_linear_classifier(features, labels)
        torch.testing.assert_close(pieces.weight, whole.weight, rtol=1e-3, atol=1e-5)
    assert torch.equal(whole.predict(test_features, 2), expected)


def test_it_is_deterministic(data):
    features, labels, _, _ = data
    first, second = fit_linear_classifier(features, labels), fit_linear_classifier(features, labels)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_scale_of_the_features_is_of_no_matter(data):
    features, labels, test_features, _ = data
    factor = torch.logspace(3, -3, 10)
    scaled = fit_linear_classifier(features * factor, labels, tolerance=1e-8)
    plain = fit_linear_classifier(features, labels, tolerance=1e-8)
    torch.testing.assert_close(
        scaled.logits(test_features * factor), plain.logits(test_features), rtol=1e-3, atol=1e-3
    )


def test_more_penalty_means_smaller_weights(data):
    features, labels, _, _ = data
    norms = [fit_linear_classifier(features, labels, l2=l2).weight.norm().item() for l2 in (1e-4, 1e-2, 1.0)]
    assert norms[0] > 1.2 * norms[1] > 1.2 * 1.2 * norms[2]


def test_separable_features_end_and_are_learnt():
    features = torch.eye(5).repeat(4, 1)
    fitted = fit_linear_classifier(features, torch.arange(5).repeat(4), l2=1e-6)
    assert fitted.accuracy(features, torch.arange(5).repeat(4)) == 1
    assert fitted.weight.isfinite().all()


def test_classes_without_examples_have_a_row_and_are_never_chosen(data):
    features, labels, test_features, _ = data
    fitted = fit_linear_classifier(features, labels, num_classes=6)
    assert fitted.weight.shape == (6, 10)
    assert fitted.predict(test_features).max() < 4


def test_top_k_accuracy_is_counted(data):
    features, labels, test_features, test_labels = data
    fitted = fit_linear_classifier(features, labels)
    order = np.argsort(-fitted.logits(test_features).numpy(), axis=1)
    for top in (1, 2, 4):
        hits = [label in row[:top] for row, label in zip(order, test_labels.numpy(), strict=True)]
        assert fitted.accuracy(test_features, test_labels, top) == pytest.approx(sum(hits) / 200)


def test_a_fit_that_is_cut_short_says_so(data):
    features, labels, _, _ = data
    assert not fit_linear_classifier(features, labels, max_iterations=2).converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l2": 0.0}, "l2 must be positive, got 0.0"),
        ({"labels": torch.zeros(299, dtype=torch.int64)}, r"one integer for each of the 300 features, got \(299,\)"),
        ({"labels": torch.zeros(300)}, "one integer for each"),
        ({"num_classes": 3}, r"labels must be in 0\.\.2, got 0\.\.3"),
        ({"labels": torch.full((300,), -1)}, r"got -1\.\.-1"),
        ({"features": torch.zeros(300)}, r"\(n, D\) with n ≥ 1, got \(300,\)"),
        ({"features": torch.full((300, 2), torch.nan)}, "NaN or infinity"),
    ],
)
def test_bad_input_is_one_line(data, change, message):
    with pytest.raises(ValueError, match=message) as error:
        fit_linear_classifier(**({"features": data[0], "labels": data[1]} | change))
    assert "\n" not in str(error.value)
