"""kNN against scikit-learn, against loops, and against itself under other chunks."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mocov3_hf.metrics import knn_accuracy, knn_predict, nearest_neighbors


@pytest.fixture
def data():
    """Noisy clusters: (60, 8) queries and a bank of (211, 8) with labels of 7 classes."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(7, 8, generator=generator)
    bank_labels = torch.randint(7, (211,), generator=generator)
    query_labels = torch.randint(7, (60,), generator=generator)
    bank = centers[bank_labels] + 1.2 * torch.randn(211, 8, generator=generator)
    queries = centers[query_labels] + 1.2 * torch.randn(60, 8, generator=generator)
    return queries, query_labels, bank, bank_labels


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def predict_by_loop(queries, bank, bank_labels, k, temperature, num_classes):
    """Classes with a vote, the most voted first, one list per query, from the definition."""
    predictions = []
    for query in queries.tolist():
        similar = sorted(
            ((cosine(query, row), label) for row, label in zip(bank.tolist(), bank_labels.tolist(), strict=True)),
            reverse=True,
        )
        votes = [0.0] * num_classes
        for similarity, label in similar[:k]:
            votes[label] += math.exp(similarity / temperature)
        ranked = sorted(range(num_classes), key=lambda label: -votes[label])
        predictions.append([label for label in ranked if votes[label] > 0])
    return predictions


def test_search_finds_what_scikit_learn_finds(data):
    queries, _, bank, bank_labels = data
    similarities, rows = nearest_neighbors(queries.double(), bank.double(), 15)
    reference = KNeighborsClassifier(15, metric="cosine", algorithm="brute").fit(bank.numpy(), bank_labels.numpy())
    distances, expected_rows = reference.kneighbors(queries.double().numpy())
    assert np.array_equal(rows.numpy(), expected_rows)
    np.testing.assert_allclose(1 - similarities.numpy(), distances, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_are_those_of_scikit_learn(data, k, temperature):
    queries, _, bank, bank_labels = data
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    expected = reference.fit(bank.double().numpy(), bank_labels.numpy()).predict(queries.double().numpy())
    predicted = knn_predict(queries.double(), bank.double(), bank_labels, k, temperature=temperature)
    assert np.array_equal(predicted[k][:, 0].numpy(), expected)


def test_top_classes_are_those_of_a_loop(data):
    queries, _, bank, bank_labels = data
    predicted = knn_predict(queries.double(), bank.double(), bank_labels, [1, 3, 40], top=5)
    for k in (1, 3, 40):
        expected = predict_by_loop(queries.double(), bank.double(), bank_labels, k, 0.07, 7)
        padded = [(classes + [-1] * 5)[:5] for classes in expected]
        assert predicted[k].tolist() == padded
    assert (predicted[1][:, 1:] == -1).all(), "one neighbor votes for one class"


def test_weights_matter(data):
    queries, _, bank, bank_labels = data
    by_temperature = [knn_predict(queries, bank, bank_labels, 200, temperature=t)[200] for t in (0.02, 1000.0)]
    assert not torch.equal(*by_temperature)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [(1, 1), (7, 10), (60, 211), (1000, 64), (13, 5)])
def test_chunks_change_nothing(data, chunks):
    queries, _, bank, bank_labels = (tensor.double() if tensor.is_floating_point() else tensor for tensor in data)
    whole = nearest_neighbors(queries, bank, 20)
    similarities, rows = nearest_neighbors(queries, bank, 20, query_chunk=chunks[0], bank_chunk=chunks[1])
    assert torch.equal(rows, whole[1])
    torch.testing.assert_close(similarities, whole[0], rtol=0, atol=1e-14)
    predicted = knn_predict(queries, bank, bank_labels, [1, 20], top=3, query_chunk=chunks[0], bank_chunk=chunks[1])
    expected = knn_predict(queries, bank, bank_labels, [1, 20], top=3)
    assert all(torch.equal(predicted[k], expected[k]) for k in (1, 20))


def test_length_of_a_feature_is_of_no_matter(data):
    queries, _, bank, _ = data
    scaled = bank * torch.linspace(0.01, 100, len(bank))[:, None]
    assert torch.equal(nearest_neighbors(queries * 37, scaled, 9)[1], nearest_neighbors(queries, bank, 9)[1])


def test_low_temperature_is_the_nearest_neighbor(data):
    """exp(1 / 1e-4) overflows every float; the vote must not."""
    queries, _, bank, bank_labels = data
    cold = knn_predict(queries, bank, bank_labels, [1, 50], temperature=1e-6)
    assert torch.equal(cold[50], cold[1])


def test_half_precision_features_are_compared_in_float32(data):
    queries, _, bank, _ = data
    queries, bank = queries.bfloat16(), bank.bfloat16()
    similarities, rows = nearest_neighbors(queries, bank, 5)
    expected_similarities, expected_rows = nearest_neighbors(queries.float(), bank.float(), 5)
    assert similarities.dtype == torch.float32
    assert torch.equal(similarities, expected_similarities)
    assert torch.equal(rows, expected_rows)


def test_autocast_around_it_costs_no_precision(data):
    queries, _, bank, _ = data
    with torch.autocast("cpu", torch.bfloat16):
        similarities, _ = nearest_neighbors(queries, bank, 5)
    assert torch.equal(similarities, nearest_neighbors(queries, bank, 5)[0])


def test_accuracy_counts_agreement(data):
    queries, query_labels, bank, bank_labels = data
    accuracy = knn_accuracy(queries, query_labels, bank, bank_labels, [1, 20])
    for k in (1, 20):
        expected = predict_by_loop(queries, bank, bank_labels, k, 0.07, 7)
        agreed = [first[0] == label for first, label in zip(expected, query_labels.tolist(), strict=True)]
        assert accuracy[k] == pytest.approx(sum(agreed) / 60, abs=1e-12)
    assert 1 / 7 < accuracy[20] < 1, "the clusters overlap, and are clusters"


def test_classes_of_the_queries_only_are_wrong_not_an_error(data):
    queries, _, bank, bank_labels = data
    assert knn_accuracy(queries, torch.full((60,), 99), bank, bank_labels, 5) == {5: 0.0}


def test_features_of_zeros_are_similar_to_nothing(data):
    queries, _, bank, _ = data
    similarities, _ = nearest_neighbors(torch.zeros_like(queries), bank, 3)
    assert (similarities == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 212}, r"k must be in 1\.\.211, the rows of the bank, got 212"),
        ({"k": 0}, r"k must be in 1\.\.211"),
        ({"k": []}, "at least one number of neighbors"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive, got nan"),
        ({"top": 8}, r"top must be in 1\.\.7"),
        ({"num_classes": 3}, r"bank_labels must be in 0\.\.2, got 0\.\.6"),
        ({"bank_chunk": 0}, "bank_chunk must be at least 1"),
        ({"queries": torch.zeros(3, 9)}, "queries have 9 dimensions and the bank 8"),
        ({"queries": torch.zeros(0, 8)}, "queries must have at least one row"),
        ({"queries": torch.zeros(3, 8, 1)}, r"queries must be a floating point tensor .* got \(3, 8, 1\)"),
        ({"queries": torch.zeros(3, 8, dtype=torch.int64)}, "floating point"),
        ({"queries": torch.full((3, 8), math.nan)}, "3 of 3 rows of queries contain NaN"),
        ({"bank_labels": torch.zeros(210, dtype=torch.int64)}, "one integer for each of the 211 rows of bank"),
        ({"bank_labels": torch.zeros(211)}, "one integer for each"),
        ({"bank_labels": torch.full((211,), -1)}, r"got -1\.\.-1"),
    ],
)
def test_bad_input_is_one_line(data, change, message):
    queries, _, bank, bank_labels = data
    arguments = {"queries": queries, "bank": bank, "bank_labels": bank_labels, "k": 5} | change
    with pytest.raises(ValueError, match=message) as error:
        knn_predict(**arguments)
    assert "\n" not in str(error.value)
