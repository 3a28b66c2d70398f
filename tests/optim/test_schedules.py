"""Schedules compared with their closed forms, and the EMA with a loop."""

import math

import pytest
import torch
from torch import nn

from mocov3_hf.optim import cosine_ema_decay, ema_update_, parameter_groups, warmup_cosine


def test_learning_rate_of_the_official_schedule():
    """300 epochs with 40 epochs of warmup, 10 steps each, compared with the official code at epochs."""
    for step in range(3000):
        epoch = step / 10
        if epoch < 40:
            expected = 2.4e-3 * epoch / 40
        else:
            expected = 2.4e-3 * 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 260))
        assert warmup_cosine(step, 3000, 400, 2.4e-3) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_learning_rate_at_the_corners():
    assert warmup_cosine(0, 100, 10, 1.0) == 0.0
    assert warmup_cosine(10, 100, 10, 1.0) == 1.0
    assert warmup_cosine(100, 100, 10, 1.0) == 0.0
    assert warmup_cosine(0, 100, 0, 1.0) == 1.0
    assert warmup_cosine(99, 100, 100, 1.0) == pytest.approx(0.99)


@pytest.mark.parametrize(("step", "warmup"), [(-1, 10), (0, 101), (0, -1)])
def test_learning_rate_refuses_impossible_positions(step, warmup):
    with pytest.raises(ValueError, match="must"):
        warmup_cosine(step, 100, warmup, 1.0)


def test_momentum_rises_from_base_to_one():
    values = [cosine_ema_decay(step, 1000, 0.99) for step in range(1001)]
    assert values[0] == pytest.approx(0.99)
    assert values[500] == pytest.approx(0.995)
    assert values[1000] == pytest.approx(1.0)
    assert values == sorted(values)


def test_moving_average_in_place():
    averages = [torch.randn(3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)]
    sources = [torch.randn(3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)]
    expected = [0.9 * average + 0.1 * source for average, source in zip(averages, sources, strict=True)]
    addresses = [average.data_ptr() for average in averages]
    ema_update_(averages, sources, 0.9)
    torch.testing.assert_close(averages, expected)
    assert [average.data_ptr() for average in averages] == addresses


def test_parameter_groups_hold_everything_trainable_once():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.1
    assert {id(p) for p in group["params"]} == {id(p) for p in [*model[0].parameters(), *model[1].parameters()]}

    decayed, kept = parameter_groups(model, 0.1, exclude_norms_and_biases=True)
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    assert kept["weight_decay"] == 0.0
    assert {id(p) for p in kept["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}


def test_parameter_groups_refuse_a_frozen_model():
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
