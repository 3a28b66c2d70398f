"""Backbones that cannot work are refused before images are read, and timm models get the size of the images."""

import json

import pytest
import torch

from mocov3_hf.pretraining import build
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe
from mocov3_hf.reporting import UsageError


TIMM = {"model_type": "timm_wrapper"}


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            {"model_type": "bert"},
            "'bert' cannot be the backbone: it takes input_ids, not images (pixel_values); docs/ba",
        ),
        ({"model_type": "vivit", "num_hidden_layers": 1}, "'vivit' cannot be the backbone: it takes videos"),
        ({"model_type": "resnet", "pooling": "cls"}, "it has no CLS token; use pooling 'mean' or 'auto'"),
        (TIMM | {"architecture": "resnet5o"}, "has no architecture 'resnet5o'; did you mean 'resnet50'?"),
        (
            TIMM | {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 96}},
            "img_size 96, and the images",
        ),
        (TIMM | {"architecture": "inception_v4"}, "a 'timm_wrapper' backbone does not take images of 16×16 pixels"),
    ],
)
def test_a_backbone_is_refused_before_images_are_read(backbone, message, tmp_path, capsys):
    backbone = dict(backbone)
    options = ["--pooling", backbone.pop("pooling", "auto"), "--image_size", "16"]
    options += ["--backbone_config", json.dumps(backbone)]
    folder = str(tmp_path / "images that do not exist")
    with pytest.raises(SystemExit) as stop:
        main(["--recipe", "quickstart", "--dataset_name", folder, "--output_dir", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.rstrip("\n").splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]


def recipe_with(backbone, *options):
    return load_recipe("quickstart", ["--backbone_config", json.dumps(backbone), *options])


def test_timm_models_get_the_size_and_the_channels_of_the_images():
    vit = TIMM | {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1}}
    config = build.build_config(recipe_with(vit, "--num_channels", "4", "--image_size", "64"))
    assert config.timm_arguments == {"depth": 1, "in_chans": 4, "img_size": 64}
    assert (config.image_size, config.num_channels) == (64, 4)
    model = build.check_buildable(config)
    build.check_images(model, 64)
    with pytest.raises(UsageError, match="does not take images of 80×80 pixels: pass another --image_size"):
        build.check_images(model, 80)
    assert model.mocov3.backbone.timm_model.patch_embed.proj.weight.shape == (192, 4, 16, 16)

    resnet = build.build_config(recipe_with(TIMM | {"architecture": "resnet18"}, "--image_size", "64"))
    assert resnet.timm_arguments == {}  # takes any size


def test_the_option_pooling_reaches_the_model():
    recipe = recipe_with({}, "--pooling", "mean")
    model = build.build_model(recipe)
    assert model.config.pooling == "mean"
    images = torch.randn(2, 3, 32, 32)
    outputs = model.mocov3(images)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 1:].mean(dim=1))
