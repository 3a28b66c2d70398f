"""Few labels: the draws, and what is computed over them."""

import statistics

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mocov3_hf.evaluation.cached_linear import few_shot_metrics, few_shot_rows
from mocov3_hf.evaluation.features import Features


LABELS = torch.tensor([0] * 40 + [1] * 10 + [3] * 100)[torch.randperm(150, generator=torch.Generator().manual_seed(0))]


def counts(rows):
    return torch.bincount(LABELS[rows], minlength=4).tolist()


def test_draws_have_every_class():
    assert counts(few_shot_rows(LABELS, per_class=3)) == [3, 3, 0, 3]
    assert counts(few_shot_rows(LABELS, fraction=0.25)) == [10, 2, 0, 25]
    assert counts(few_shot_rows(LABELS, fraction=0.001)) == [1, 1, 0, 1], "at least one"
    rows = few_shot_rows(LABELS, per_class=10)
    assert rows.tolist() == sorted(set(rows.tolist())), "sorted, none twice"
    assert few_shot_rows(LABELS, fraction=1.0).tolist() == list(range(150))


def test_draws_depend_on_the_seed_and_nest():
    few, many = (set(few_shot_rows(LABELS, per_class=count, seed=5).tolist()) for count in (2, 9))
    assert few < many
    assert few == set(few_shot_rows(LABELS, per_class=2, seed=5).tolist())
    assert few != set(few_shot_rows(LABELS, per_class=2, seed=6).tolist())


def test_metrics_are_mean_and_deviation_of_scikit_learn_over_the_draws():
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(4, 8, generator=generator)
    test_labels = torch.randint(4, (120,), generator=generator)
    train = Features(centers[LABELS] + torch.randn(150, 8, generator=generator), LABELS, None, 4)
    test = Features(centers[test_labels] + torch.randn(120, 8, generator=generator), test_labels, None, 4)
    metrics = few_shot_metrics(train, test, per_class=[5], fractions=[0.2], num_draws=3, seed=11)
    assert set(metrics) == {"5shot_top1", "5shot_top1_std", "20percent_top1", "20percent_top1_std"}
    for name, amount in (("5shot", {"per_class": 5}), ("20percent", {"fraction": 0.2})):
        expected = []
        for seed in (11, 12, 13):
            rows = few_shot_rows(LABELS, seed=seed, **amount)
            scaler = StandardScaler().fit(train.features[rows].double().numpy())
            reference = LogisticRegression(tol=1e-8, max_iter=5000)
            reference.fit(scaler.transform(train.features[rows].double().numpy()), LABELS[rows].numpy())
            expected.append(reference.score(scaler.transform(test.features.double().numpy()), test_labels.numpy()))
        assert metrics[f"{name}_top1"] == pytest.approx(statistics.fmean(expected))
        assert metrics[f"{name}_top1_std"] == pytest.approx(statistics.stdev(expected))
        assert len(set(expected)) > 1, "draws differ"
    assert few_shot_metrics(train, test, per_class=[5], num_draws=1)["5shot_top1_std"] == 0


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({}, "either per_class or fraction"),
        ({"per_class": 1, "fraction": 0.1}, "either per_class or fraction"),
        ({"per_class": 0}, "per_class must be at least 1, got 0"),
        ({"fraction": 1.5}, "fraction must be above 0 and at most 1, got 1.5"),
        ({"per_class": 11}, "class 1 has 10 images, expected at least 11"),
    ],
)
def test_bad_amounts_are_one_line(amount, message):
    with pytest.raises(ValueError, match=message):
        few_shot_rows(LABELS, **amount)


def test_no_draws_is_an_error():
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        few_shot_metrics(None, None, per_class=[1], num_draws=0)
