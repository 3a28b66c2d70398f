"""Three training steps against the official code's, in float64 on weights that depend on the tensors' names alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mocov3_hf.interop import convert_state_dict
from mocov3_hf.optim import LARS, parameter_groups
from mocov3_hf.pretraining.step import train_step
from tests.fixtures.fill import filled_state_dict, reference_views


FIXTURES = Path(__file__).parent.parent / "fixtures"
CASES = {
    "vit": {
        "overrides": {"num_attention_heads": 2},
        "image_size": 32,
        "learning_rate": 1e-3,
        "build_optimizer": lambda model: torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, fused=True),
    },
    "resnet": {
        "overrides": {"image_size": 64},
        "image_size": 64,
        "learning_rate": 0.5,
        "build_optimizer": lambda model: LARS(parameter_groups(model, 1e-6), lr=0.5, momentum=0.9),
    },
}


def official_model(name):
    official = filled_state_dict(FIXTURES / f"official_{name}_tiny.layout.json")
    return convert_state_dict(official, **CASES[name]["overrides"]).build_model().double()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_three_steps_follow_the_official_ones(name):
    case, reference = CASES[name], np.load(FIXTURES / f"official_{name}_tiny.npz")
    model = official_model(name)
    views = reference_views(8, case["image_size"])
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, case["build_optimizer"](model))
    model.train()
    losses, grad_norms = [], []
    for momentum in reference["momentum_per_step"]:
        output = train_step(
            model,
            optimizer,
            (views[0], views[1]),
            learning_rate=case["learning_rate"],
            ema_decay=float(momentum),
            max_grad_norm=None,
            accelerator=accelerator,
        )
        losses.append(output.loss.item())
        grad_norms.append(output.grad_norm.item())
    np.testing.assert_allclose(losses, reference["losses"], rtol=1e-6)
    np.testing.assert_allclose(grad_norms, reference["grad_norms"], rtol=1e-6)

    model.eval()
    with torch.no_grad():
        features = model.mocov3(views[0]).pooler_output
        momentum_features = model.momentum_encoder.encoder(views[0]).pooler_output
    np.testing.assert_allclose(features, reference["features_after_3_steps"], rtol=1e-6)
    np.testing.assert_allclose(momentum_features, reference["momentum_features_after_3_steps"], rtol=1e-6)
