"""The grid of linear classifiers against each of them trained alone by torch, and the choice among them."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mocov3_hf.evaluation.sweep import choose_linear_classifier, sweep_linear_classifiers


@pytest.fixture(scope="module")
def data():
    """Overlapping clusters of 5 classes: (403, 12) and (300, 12)."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 12, generator=generator)
    sides = []
    for rows in (403, 300):
        labels = torch.randint(5, (rows,), generator=generator)
        sides += [centers[labels] + 1.5 * torch.randn(rows, 12, generator=generator), labels]
    return sides


def train_alone(features, labels, rate, decay, num_epochs, batch_size, seed):
    """One classifier by `torch.optim.SGD` and autograd on the same batches."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(features.shape[1], 5, dtype=features.dtype)
    with torch.no_grad():
        model.weight.copy_(0.01 * torch.randn(5, features.shape[1], generator=generator, dtype=features.dtype))
        model.bias.zero_()
    groups = [{"params": [model.weight], "weight_decay": decay}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    steps = num_epochs * math.ceil(len(features) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for _ in range(num_epochs):
        losses = []
        for rows in torch.randperm(len(features), generator=generator).split(batch_size):
            loss = torch.nn.functional.cross_entropy(model(features[rows]), labels[rows])
            losses.append(loss.item() * len(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model, sum(losses) / len(features)


def test_each_classifier_is_trained_as_if_alone(data):
    features, labels = data[0].double(), data[1]
    options = {"num_epochs": 3, "batch_size": 64, "seed": 7}
    sweep = sweep_linear_classifiers(
        features, labels, learning_rates=[0.01, 0.5, 5.0], weight_decays=[0.0, 1e-2], **options
    )
    assert sweep.settings == [(0.01, 0.0), (0.01, 1e-2), (0.5, 0.0), (0.5, 1e-2), (5.0, 0.0), (5.0, 1e-2)]
    assert sweep.weight.shape == (6, 5, 12)
    for index, (rate, decay) in enumerate(sweep.settings):
        model, loss = train_alone(features, labels, rate, decay, **options)
        torch.testing.assert_close(sweep.weight[index], model.weight.detach().float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sweep.bias[index], model.bias.detach().float(), rtol=1e-5, atol=1e-6)
        assert sweep.loss[index].item() == pytest.approx(loss, rel=1e-9)
    assert not torch.allclose(sweep.weight[2], sweep.weight[3], rtol=1e-2), "decay has an effect"


def test_accuracies_are_those_of_each_classifier(data):
    features, labels, test_features, test_labels = data
    sweep = sweep_linear_classifiers(features, labels, num_epochs=2, batch_size=100)
    accuracies = sweep.accuracies(test_features, test_labels, batch_size=64)
    assert len(accuracies) == 18
    for index in range(18):
        assert accuracies[index].item() == pytest.approx(sweep.classifier(index).accuracy(test_features, test_labels))
    assert accuracies.max() - accuracies.min() > 0.01


def test_long_training_reaches_logistic_regression(data):
    """Without decay and long enough, SGD finds the optimum that scikit-learn finds."""
    features, labels, test_features, test_labels = data
    sweep = sweep_linear_classifiers(
        features, labels, learning_rates=[0.5], weight_decays=[0.0], num_epochs=2000, batch_size=403
    )
    reference = LogisticRegression(C=1e6, tol=1e-8, max_iter=5000).fit(features.numpy(), labels.numpy())
    logits = sweep.classifier(0).logits(test_features)
    expected = torch.from_numpy(reference.decision_function(test_features.numpy())).float()
    torch.testing.assert_close(
        logits - logits.mean(1, keepdim=True), expected - expected.mean(1, keepdim=True), rtol=0, atol=0.02
    )
    accuracy = sweep.accuracies(test_features, test_labels)[0].item()
    assert accuracy == pytest.approx(reference.score(test_features.numpy(), test_labels.numpy()), abs=0.01)


def test_it_is_a_function_of_the_seed(data):
    features, labels = data[:2]
    first, same, other = (
        sweep_linear_classifiers(features, labels, num_epochs=1, batch_size=100, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)


def test_choice_never_sees_the_test_set_and_trains_on_everything(data):
    features, labels, test_features, test_labels = data
    grid = {"learning_rates": [1e-5, 0.5], "weight_decays": [0.0, 1.0]}
    options = {"num_epochs": 20, "batch_size": 64, "seed": 3}
    chosen = choose_linear_classifier(features, labels, **grid, **options)
    assert chosen.learning_rate == 0.5
    assert set(chosen.validation_accuracies) == {"lr=1e-05 wd=0", "lr=1e-05 wd=1", "lr=0.5 wd=0", "lr=0.5 wd=1"}
    name = f"lr={chosen.learning_rate:g} wd={chosen.weight_decay:g}"
    assert (
        chosen.validation_accuracy == chosen.validation_accuracies[name] == max(chosen.validation_accuracies.values())
    )
    alone = sweep_linear_classifiers(
        features, labels, learning_rates=[0.5], weight_decays=[chosen.weight_decay], **options
    )
    assert torch.equal(chosen.classifier.weight, alone.weight[0]), "of all training features"
    assert chosen.classifier.accuracy(test_features, test_labels) > 0.5


def test_a_diverged_setting_is_not_chosen(data):
    features, labels = data[:2]
    chosen = choose_linear_classifier(
        features, labels, learning_rates=[1e30, 1e-3], weight_decays=[100.0], num_epochs=3, batch_size=32
    )
    assert chosen.learning_rate == 1e-3
    assert chosen.validation_accuracies["lr=1e+30 wd=100"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rates": []}, "learning_rates needs at least one"),
        ({"learning_rates": [0.0]}, "learning_rates must be positive, got 0.0"),
        ({"weight_decays": [-1.0]}, "weight_decays must be at least 0, got -1.0"),
        ({"weight_decays": [math.nan]}, "weight_decays must be at least 0, got nan"),
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction must be above 0 and below 1"),
        ({"validation_fraction": 1e-3}, "holds out 0 of 403 images"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "one integer for each of the 403 features"),
    ],
)
def test_bad_input_is_one_line(data, change, message):
    with pytest.raises(ValueError, match=message) as error:
        choose_linear_classifier(**({"features": data[0], "labels": data[1]} | change))
    assert "\n" not in str(error.value)
