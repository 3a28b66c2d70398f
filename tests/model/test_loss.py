"""The loss against a derivation in loops, and its properties."""

import math

import pytest
import torch

from mocov3_hf.model.loss_mocov3 import chance_loss, contrastive_loss, floor_loss


def loss_in_loops(queries, keys, temperature):
    """`2T · mean over i of -log(exp(q_i·k_i / T) / sum over j of exp(q_i·k_j / T))`, term by term."""

    def cosine(first, second):
        return sum(a * b for a, b in zip(first, second, strict=True)) / (math.hypot(*first) * math.hypot(*second))

    total = 0.0
    for row, query in enumerate(queries):
        terms = [math.exp(cosine(query, key) / temperature) for key in keys]
        total -= math.log(terms[row] / sum(terms))
    return 2 * temperature * total / len(queries)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_is_the_one_written_in_loops(temperature):
    query, key = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = loss_in_loops(query.tolist(), key.tolist(), temperature)
    assert contrastive_loss(query, key, temperature).loss.item() == pytest.approx(expected, rel=1e-12)


def test_only_directions_count():
    query, key = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scaled = contrastive_loss(query * 7, key * torch.rand(6, 1, dtype=torch.float64).add(0.1), 0.2)
    torch.testing.assert_close(scaled.loss, contrastive_loss(query, key, 0.2).loss)


def test_no_gradient_reaches_the_keys():
    query, key = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    contrastive_loss(query, key, 0.2).loss.backward()
    assert query.grad is not None
    assert key.grad is None


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_chance_and_floor(temperature):
    batch = 16
    same = torch.ones(batch, 3, dtype=torch.float64)
    orthogonal = torch.eye(batch, dtype=torch.float64)
    assert 2 * contrastive_loss(same, same, temperature).loss.item() == pytest.approx(chance_loss(temperature, batch))
    assert 2 * contrastive_loss(orthogonal, orthogonal, temperature).loss.item() == pytest.approx(
        floor_loss(temperature, batch)
    )


@pytest.mark.parametrize(("temperature", "chance", "floor"), [(1.0, 33.27, 29.27), (0.2, 6.65, 2.68)])
def test_published_chance_and_floor_at_4096(temperature, chance, floor):
    assert chance_loss(temperature, 4096) == pytest.approx(chance, abs=0.01)
    assert floor_loss(temperature, 4096) == pytest.approx(floor, abs=0.01)


def test_top1_and_similarity_tell_what_the_retrieval_finds():
    key = torch.eye(4)
    found = contrastive_loss(key[[0, 1, 3, 2]], key, 0.2)  # two of four queries point at their own key
    assert found.positive_top1.item() == 0.5
    assert found.positive_similarity.item() == pytest.approx(0.5)


def test_half_precision_inputs_are_computed_in_float32():
    query, key = torch.randn(2, 8, 16).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(query, key, 0.2).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, contrastive_loss(query.float(), key.float(), 0.2).loss)
