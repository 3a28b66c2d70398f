"""Loading models as encoders, their preprocessing, and telling them apart."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BitImageProcessor,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from mocov3_hf import MoCoV3ForImageClassification, MoCoV3ForPreTraining
from mocov3_hf.data.labelled import EvaluationTransform
from mocov3_hf.evaluation.encoder import (
    base_encoder,
    image_size_of,
    load_encoder,
    load_transform,
    pooled_features,
    weights_hash,
)
from tests.factories import pretraining_model


PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TINY_VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)


@pytest.fixture(scope="module")
def features_of_encoder(model_folder):
    model = MoCoV3ForPreTraining.from_pretrained(model_folder).eval()
    with torch.no_grad():
        found = model.mocov3(PIXELS).pooler_output
        # The whole model computes its last block for the CLS token alone: the same up to the order of sums.
        torch.testing.assert_close(model(PIXELS).pooler_output, found)
    return found


def features(model):
    with torch.no_grad():
        return pooled_features(model.eval(), PIXELS)


def test_pretraining_base_and_classifier_folders_give_one_encoder(model_folder, features_of_encoder, tmp_path):
    AutoModel.from_pretrained(model_folder).save_pretrained(tmp_path / "base")
    classifier = MoCoV3ForImageClassification.from_pretrained(model_folder, num_labels=4)
    classifier.save_pretrained(tmp_path / "classifier")
    for folder in (model_folder, tmp_path / "base", tmp_path / "classifier"):
        encoder = load_encoder(folder)
        assert not encoder.training
        assert torch.equal(features(encoder), features_of_encoder)


@pytest.mark.slow
def test_heads_and_wrappers_are_looked_through(model_folder, features_of_encoder):
    model = MoCoV3ForPreTraining.from_pretrained(model_folder)
    assert torch.equal(features(base_encoder(model)), features_of_encoder)
    assert torch.equal(features(base_encoder(torch.nn.DataParallel(model))), features_of_encoder)
    assert base_encoder(torch.compile(model)) is model.mocov3


def test_native_resnet_is_flattened(tmp_path):
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path)
    assert features(load_encoder(tmp_path)).shape == (3, 16)


def test_native_vit_classifier_without_pooling_layer_gives_its_cls_token(tmp_path):
    """Plain `AutoModel` would put a random pooling layer on top."""
    torch.manual_seed(0)
    classifier = ViTForImageClassification(TINY_VIT).eval()
    classifier.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = classifier.vit(PIXELS).last_hidden_state[:, 0]
    assert torch.equal(features(load_encoder(tmp_path)), expected)


def test_native_vit_with_pooling_layer_gives_the_pooled_vector(tmp_path):
    torch.manual_seed(0)
    model = ViTModel(TINY_VIT).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(PIXELS).pooler_output
    assert torch.equal(features(load_encoder(tmp_path)), expected)


def test_weights_that_are_missing_are_not_drawn_at_random(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["mocov3.backbone.layernorm.weight"], weights["mocov3.backbone.layernorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights of MoCoV3Model \(backbone.layernorm.bias, "):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist: give a folder written by save_pretrained"),
        ("file.pth", "is a file: give a folder"),
        ("empty", "is no model, it has no config.json"),
        ("broken", "cannot be loaded"),
        ("typeless", "cannot be loaded"),
        ("weightless", "cannot be loaded"),
    ],
)
def test_what_is_no_model_is_named_in_one_line(tmp_path, model_folder, name, message):
    (tmp_path / "file.pth").write_bytes(b"weights")
    for folder in ("empty", "broken", "typeless", "weightless"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "typeless" / "config.json").write_text("{}")
    shutil.copy(model_folder / "config.json", tmp_path / "weightless")
    with pytest.raises(ValueError, match=message) as error:
        load_encoder(tmp_path / name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_preprocessing_is_the_one_saved_with_the_model(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(do_resize=True, do_center_crop=True, **sizes, **settings).save_pretrained(folder)
    image = torch.randint(256, (3, 70, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = EvaluationTransform(32, 40, "bicubic", settings["image_mean"], settings["image_std"])(image)
    torch.testing.assert_close(load_transform(folder, load_encoder(folder))(image), expected, rtol=0, atol=1e-5)


def test_without_saved_preprocessing_it_is_ours_at_the_size_of_the_model(model_folder, tmp_path):
    pretraining_model().save_pretrained(tmp_path)
    image = torch.randint(256, (3, 74, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    encoder = load_encoder(tmp_path)
    expected = EvaluationTransform(32)(image)
    for transform in (load_transform(tmp_path, encoder), load_transform(None, encoder)):
        torch.testing.assert_close(transform(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}), (64, 73)),
        (ViTImageProcessor(size={"height": 224, "width": 224}), (64, 64)),
    ],
)
def test_image_size_keeps_the_proportion_of_the_crop(model_folder, tmp_path, processor, expected):
    processor.save_pretrained(tmp_path)
    shutil.copy(model_folder / "config.json", tmp_path)
    transform = load_transform(tmp_path, pretraining_model(), image_size=64)
    assert transform(torch.zeros(3, 90, 120, dtype=torch.uint8)).shape == (3, 64, 64)
    size = transform.processor.to_dict()["size"]
    assert size.get("shortest_edge", size.get("height")) == expected[1]
    assert repr(transform) != repr(load_transform(tmp_path, pretraining_model()))


def test_image_size_must_be_positive(model_folder):
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load_transform(model_folder, pretraining_model(), image_size=0)


def test_other_image_sizes_interpolate_positions(model_folder):
    encoder = load_encoder(model_folder)
    assert image_size_of(encoder) == 32
    with torch.no_grad():
        large = pooled_features(encoder, torch.randn(2, 3, 48, 48))
    assert large.shape == (2, 32)


def test_hash_tells_models_apart(model_folder, tmp_path):
    reference = weights_hash(load_encoder(model_folder))
    copied = shutil.copytree(model_folder, tmp_path / "copy")
    assert weights_hash(load_encoder(copied)) == reference, "the name of a folder says nothing"
    assert weights_hash(base_encoder(MoCoV3ForPreTraining.from_pretrained(model_folder))) == reference

    changed = load_encoder(model_folder)
    with torch.no_grad():
        changed.backbone.layernorm.bias[3] += 1e-6
    assert weights_hash(changed) != reference

    config = json.loads((copied / "config.json").read_text())
    config["backbone_config"]["num_attention_heads"] = 4
    (copied / "config.json").write_text(json.dumps(config))
    assert weights_hash(load_encoder(copied)) != reference, "equal weights, other features"
