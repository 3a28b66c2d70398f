"""LARS compared with a scalar derivation, and with torch's conventions."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from mocov3_hf.optim import LARS
from mocov3_hf.pretraining.build import build_optimizer
from mocov3_hf.pretraining.recipe import load_recipe


def lars_in_scalars(weights, gradient_of, steps, lr, momentum, weight_decay, trust, adapted, trust_clip=False):
    """The update of the official code, for lists of numbers; `trust_clip` as in LARC."""
    buffer = [0.0] * len(weights)
    for _ in range(steps):
        update = list(gradient_of(weights))
        if adapted:
            update = [g + weight_decay * w for g, w in zip(update, weights, strict=True)]
            weight_norm, update_norm = math.hypot(*weights), math.hypot(*update)
            scale = trust * weight_norm / update_norm if weight_norm > 0 and update_norm > 0 else 1.0
            update = [(min(scale / lr, 1) if trust_clip else scale) * u for u in update]
        buffer = [momentum * b + u for b, u in zip(buffer, update, strict=True)]
        weights = [w - lr * b for w, b in zip(weights, buffer, strict=True)]
    return weights


@pytest.mark.parametrize(
    ("shape", "adapted", "clipped"),
    [
        ((2, 3), True, {}),
        ((6,), False, {}),
        ((3, 1, 2), True, {}),
        ((2, 3), True, {"lr": 0.7, "trust_clip": True}),  # the ratio over the learning rate is below 1
        ((2, 3), True, {"lr": 0.001, "trust_clip": True}),  # it is above
        ((6,), False, {"lr": 0.001, "trust_clip": True}),
    ],
)
def test_follows_the_scalar_derivation(shape, adapted, clipped):
    start = torch.linspace(-1, 2, 6, dtype=torch.float64)
    target = torch.tensor([3.0, 0.5, -1.0, 0.2, 0.9, -2.0], dtype=torch.float64)
    settings = {"lr": 0.7, "momentum": 0.9, "weight_decay": 0.01, **clipped}
    parameter = torch.nn.Parameter(start.reshape(shape).clone())
    optimizer = LARS([parameter], **settings, trust_coefficient=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        (0.5 * (parameter.flatten() - target).square().sum()).backward()
        optimizer.step()
    expected = lars_in_scalars(
        start.tolist(),
        lambda weights: [w - t for w, t in zip(weights, target.tolist(), strict=True)],
        steps=5,
        trust=0.02,
        adapted=adapted,
        **settings,
    )
    torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("weight", [torch.zeros(2, 2), torch.ones(2, 2)])
def test_a_zero_norm_leaves_the_update_unscaled(weight):
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = torch.ones(2, 2) if weight.sum() == 0 else torch.zeros(2, 2)
    expected = weight - 0.1 * parameter.grad
    LARS([parameter], lr=0.1).step()
    torch.testing.assert_close(parameter.detach(), expected)


def test_tensors_are_independent_of_each_other_and_of_missing_gradients():
    def parameters():
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 4), (4,), (2, 3), ()]]

    together, alone = parameters(), parameters()
    for first, second in zip(together, alone, strict=True):
        first.grad = torch.ones_like(first)
        second.grad = torch.ones_like(second)
    together[2].grad = alone[2].grad = None
    optimizer = LARS(together, lr=0.5, weight_decay=0.1)
    single = [LARS([parameter], lr=0.5, weight_decay=0.1) for parameter in alone]
    for _ in range(3):
        optimizer.step()
        for one in single:
            one.step()
    torch.testing.assert_close([p.detach() for p in together], [p.detach() for p in alone])
    torch.testing.assert_close(together[2].detach(), parameters()[2].detach())


def test_state_survives_a_round_trip():
    def train(parameter, optimizer, steps):
        for _ in range(steps):
            parameter.grad = parameter.detach() + 1
            optimizer.step()

    straight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = LARS([straight], lr=0.1)
    train(straight, optimizer, 2)
    resumed = torch.nn.Parameter(straight.detach().clone())
    again = LARS([resumed], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares what it can
    train(straight, optimizer, 3)
    train(resumed, again, 3)
    assert torch.equal(straight, resumed)


def test_the_options_of_a_run_reach_the_optimizer():
    options = {"lars_momentum": 0.8, "trust_coefficient": 0.02, "trust_clip": True}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    recipe = load_recipe("quickstart", ["--optimizer", "lars", *given])
    (group, *_) = build_optimizer(recipe, torch.nn.Linear(2, 2), SimpleNamespace(learning_rate=0.5)).param_groups
    assert [group[name] for name in ("lr", "momentum", "trust_coefficient", "trust_clip")] == [0.5, 0.8, 0.02, True]


def test_a_state_that_does_not_name_trust_clip_is_continued_without_it():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    state = LARS([parameter], lr=0.1).state_dict()
    del state["param_groups"][0]["trust_clip"]
    optimizer = LARS([parameter], lr=0.1)
    optimizer.load_state_dict(state)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), 1 - 0.1 * 0.001))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": 1.0, "momentum": 1.0}, "momentum"),
        ({"lr": 1.0, "weight_decay": -0.1}, "weight_decay"),
        ({"lr": 1.0, "trust_coefficient": 0.0}, "trust_coefficient"),
    ],
)
def test_refuses_impossible_settings(settings, named):
    with pytest.raises(ValueError, match=named):
        LARS([torch.nn.Parameter(torch.ones(2))], **settings)
