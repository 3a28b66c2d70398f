"""The plan of a run: published numbers from our own count, and memory from the tensors that autograd saves."""

import json

import pytest
import torch

from mocov3_hf.pretraining.build import build_config, build_model
from mocov3_hf.pretraining.dry_run import describe
from mocov3_hf.pretraining.estimate import estimate
from mocov3_hf.pretraining.recipe import load_recipe


# name: (parameters of the pre-training model, GFLOPs of the backbone), as published with mmpretrain.
PUBLISHED = {
    "mocov3_resnet50_8xb512-amp-coslr-100e_in1k": (68_012_160, 4.11),
    "mocov3_resnet50_8xb512-amp-coslr-300e_in1k": (68_012_160, 4.11),
    "mocov3_resnet50_8xb512-amp-coslr-800e_in1k": (68_012_160, 4.11),
    "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k": (84_266_752, 4.61),
    "mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k": (215_678_464, 17.58),
    "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k": (652_781_568, 61.60),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_ones(name):
    recipe = load_recipe(name)
    costs = estimate(build_config(recipe), 224, 2, recipe.optimization.optimizer, "bf16")
    parameters, gflops = PUBLISHED[name]
    assert costs.num_parameters == parameters
    assert round(costs.backbone_macs / 1e9, 2) == gflops


@pytest.mark.slow
@pytest.mark.parametrize(("size", "backbone"), [(32, {}), (28, {"patch_size": 7, "mlp_norm": "batch_norm"})])
def test_activations_are_those_of_a_real_step(size, backbone):
    """Counted on tensors without data, and on real ones by what autograd keeps alive."""
    recipe = load_recipe("quickstart", ["--image_size", str(size), "--backbone_config", json.dumps(backbone)])
    costs = estimate(build_config(recipe), size, 16, "adamw", "no")
    model = build_model(recipe)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(pixel_values=torch.randn(16, 3, size, size), pixel_values_2=torch.randn(16, 3, size, size))
    real = sum(storage.nbytes() for storage in kept.values())
    assert torch.isfinite(output.loss)
    assert costs.activation_bytes == pytest.approx(real, rel=0.02)


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_shrinks_with_the_precision():
    config = build_config(load_recipe("quickstart"))
    small, large, half = (
        estimate(config, 32, batch, "adamw", precision) for batch, precision in [(16, "no"), (32, "no"), (32, "bf16")]
    )
    assert large.activation_bytes == pytest.approx(2 * small.activation_bytes, rel=0.05)
    assert 0.45 < half.activation_bytes / large.activation_bytes < 0.8
    assert small.weight_bytes == large.weight_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        (
            "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k",
            [
                "84,266,752",
                "4.61",
                "4,096 (4,096 per process)",
                "93,600 (312 per epoch, 300 epochs)",
                "12,480",
                "0.0024",
            ],
        ),
        ("mocov3_resnet50_8xb512-amp-coslr-100e_in1k", ["68,012,160", "4.11", "31,200", "3,120", "9.6"]),
        ("vit-huge-p14", ["1,309,805,056", "167.40", "93,600", "0.0024"]),
        ("vit-bn-large-p7", ["653,205,504", "361.52", "93,600", "mlp_norm: batch_norm"]),
    ],
)
def test_dry_run_prints_the_plan(name, numbers):
    text = describe(load_recipe(name))
    for number in [*numbers, "temperature: ", "estimated memory", "GiB"]:
        assert number in text
    assert "warning" not in text
