"""Conversion of state dicts against the outputs of the official code, and there and back again, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mocov3_hf.interop import convert_state_dict
from tests.fixtures.fill import filled_state_dict, reference_views


FIXTURES = Path(__file__).parent.parent / "fixtures"
OVERRIDES = {"vit": {"num_attention_heads": 2}, "resnet": {"image_size": 64}}
IMAGE_SIZES = {"vit": 32, "resnet": 64}


@pytest.fixture(params=["vit", "resnet"])
def body(request):
    return request.param


def official(body):
    return filled_state_dict(FIXTURES / f"official_{body}_tiny.layout.json")


def test_pretraining_reproduces_the_official_outputs(body):
    model = convert_state_dict(official(body), **OVERRIDES[body]).build_model().double()
    reference = np.load(FIXTURES / f"official_{body}_tiny.npz")
    views = reference_views(8, IMAGE_SIZES[body])
    with torch.no_grad():
        outputs = model(pixel_values=views[0], pixel_values_2=views[1])
        projection = model.projector(outputs.pooler_output)
        momentum_features = model.momentum_encoder.encoder(views[0]).pooler_output
    for name, value in {
        "features": outputs.pooler_output,
        "projection": projection,
        "prediction": outputs.prediction,
        "momentum_projection": outputs.projection,
        "momentum_features": momentum_features,
    }.items():
        np.testing.assert_allclose(value.numpy(), reference[name], rtol=0, atol=1e-6, err_msg=name)
    assert sum(parameter.numel() for parameter in model.parameters()) == reference["num_parameters"]
