"""One way to load models with their image processors, and one policy: what is missing is refused or reported."""

import json
import logging
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BitImageProcessor,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ForPreTraining, MoCoV3Model, loading
from mocov3_hf.data.labeled import EvaluationTransform
from mocov3_hf.loading import (
    base_encoder,
    image_size_of,
    load_classifier,
    load_config,
    load_encoder,
    load_processor,
    num_channels_of,
    pooled_features,
    resolve_model,
)
from mocov3_hf.processing import ProcessorTransform, build_image_processor
from mocov3_hf.reporting import UsageError
from mocov3_hf.weights import weights_hash
from tests.factories import VIT, pretraining_model, save_classifier


PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TINY_VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A pre-training checkpoint of a tiny ViT with its image processor."""
    folder = tmp_path_factory.mktemp("model")
    pretraining_model().save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def features_of_encoder(model_folder):
    model = MoCoV3ForPreTraining.from_pretrained(model_folder).eval()
    with torch.no_grad():
        found = model.mocov3(PIXELS).pooler_output
        # The whole model computes its last block only for the CLS token: equal up to the order of sums.
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
def test_heads_and_wrappers_are_ignored(model_folder, features_of_encoder):
    model = MoCoV3ForPreTraining.from_pretrained(model_folder)
    assert torch.equal(features(base_encoder(model)), features_of_encoder)
    assert torch.equal(features(base_encoder(torch.nn.DataParallel(model))), features_of_encoder)
    assert base_encoder(torch.compile(model)) is model.mocov3


def test_native_resnet_is_flattened(tmp_path):
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path)
    assert features(load_encoder(tmp_path)).shape == (3, 16)


def test_native_vit_classifier_without_pooling_layer_returns_its_cls_token(tmp_path):
    """Plain `AutoModel` would put a random pooling layer on top."""
    torch.manual_seed(0)
    classifier = ViTForImageClassification(TINY_VIT).eval()
    classifier.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = classifier.vit(PIXELS).last_hidden_state[:, 0]
    assert torch.equal(features(load_encoder(tmp_path)), expected)


def test_native_vit_with_pooling_layer_returns_its_output(tmp_path):
    torch.manual_seed(0)
    model = ViTModel(TINY_VIT).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(PIXELS).pooler_output
    assert torch.equal(features(load_encoder(tmp_path)), expected)


def test_missing_weights_are_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["mocov3.backbone.layernorm.weight"], weights["mocov3.backbone.layernorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights of MoCoV3Model \(backbone.layernorm.bias, "):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist: pass a folder written by save_pretrained"),
        ("file.pth", "is a file: pass a folder"),
        ("empty", r"holds no model \(no config.json\)"),
        ("broken", "cannot be loaded"),
        ("typeless", "cannot be loaded"),
        ("weightless", "cannot be loaded"),
        ("truncated", "cannot be loaded"),
        ("garbage", "cannot be loaded"),
    ],
)
@pytest.mark.parametrize("load", [load_encoder, load_classifier])
def test_damaged_models_are_named_in_one_line(tmp_path, model_folder, name, message, load):
    (tmp_path / "file.pth").write_bytes(b"weights")
    for folder in ("empty", "broken", "typeless", "weightless", "truncated", "garbage"):
        (tmp_path / folder).mkdir()
    weights = (model_folder / "model.safetensors").read_bytes()
    for folder, content in (("truncated", weights[: len(weights) // 2]), ("garbage", b"weights")):
        shutil.copy(model_folder / "config.json", tmp_path / folder)
        (tmp_path / folder / "model.safetensors").write_bytes(content)
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "typeless" / "config.json").write_text("{}")
    shutil.copy(model_folder / "config.json", tmp_path / "weightless")
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def transform_of(folder, model, **options):
    return ProcessorTransform(load_processor(folder, model.config, **options))


def test_preprocessing_is_the_one_saved_with_the_model(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(do_resize=True, do_center_crop=True, **sizes, **settings).save_pretrained(folder)
    image = torch.randint(256, (3, 70, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = EvaluationTransform(32, 40, "bicubic", settings["image_mean"], settings["image_std"])(image)
    found = transform_of(folder, load_encoder(folder))(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_without_a_processor_it_is_the_default_with_a_warning(tmp_path):
    pretraining_model().save_pretrained(tmp_path)
    image = torch.randint(256, (3, 74, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    encoder = load_encoder(tmp_path)
    expected = EvaluationTransform(32)(image)
    torch.testing.assert_close(transform_of(None, encoder)(image), expected, rtol=0, atol=1e-5)
    (message,) = warnings_of(lambda: load_processor(tmp_path, encoder.config))
    assert f"{str(tmp_path)!r} has no image processor: resizing to 37, cropping to 32, normalizing" in message
    torch.testing.assert_close(transform_of(tmp_path, encoder)(image), expected, rtol=0, atol=1e-5)
    assert load_processor(None, encoder.config, image_size=64).size == {"shortest_edge": 73}, "not 2 x 37"
    assert load_processor(None, encoder.config, interpolation="bicubic").resample == 3


def warnings_of(call):
    """The messages that the loader logs."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    loading.logger.addHandler(handler)
    try:
        call()
    finally:
        loading.logger.removeHandler(handler)
    return messages


@pytest.mark.parametrize("content", ["{", "[]", '{"image_processor_type": "NoSuchProcessor"}'])
def test_a_damaged_processor_is_not_replaced_by_the_default(model_folder, tmp_path, content):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"the image processor of .* cannot be loaded") as error:
        load_processor(folder, load_config(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_channels", [1, 4])
def test_other_numbers_of_channels(tmp_path, num_channels):
    torch.manual_seed(0)
    model = MoCoV3Model(MoCoV3Config(backbone_config=VIT | {"num_channels": num_channels}))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert num_channels_of(encoder.config) == num_channels
    processor = load_processor(tmp_path, encoder.config)
    assert [*processor.image_mean, *processor.image_std] == [0.5] * 2 * num_channels
    pixels = ProcessorTransform(processor)(torch.full((num_channels, 40, 50), 255, dtype=torch.uint8))
    torch.testing.assert_close(pixels, torch.ones(num_channels, 32, 32))
    assert features_of(encoder, pixels[None]).shape == (1, 32)


def features_of(encoder, pixels):
    with torch.no_grad():
        return pooled_features(encoder, pixels)


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
    transform = transform_of(tmp_path, pretraining_model(), image_size=64)
    assert transform(torch.zeros(3, 90, 120, dtype=torch.uint8)).shape == (3, 64, 64)
    size = transform.processor.to_dict()["size"]
    assert size.get("shortest_edge", size.get("height")) == expected[1]
    assert repr(transform) != repr(transform_of(tmp_path, pretraining_model()))


def test_image_size_and_interpolation_are_checked(model_folder):
    config = pretraining_model().config
    for folder in (model_folder, None):
        with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
            load_processor(folder, config, image_size=0)
        with pytest.raises(UsageError, match="--image_size 7 is smaller than a patch of the model: pass 8 or more"):
            load_processor(folder, config, image_size=7)
        with pytest.raises(ValueError, match=r"must be one of bi.*, got 'lanczos'"):
            load_processor(folder, config, interpolation="lanczos")


def test_other_image_sizes_interpolate_positions(model_folder):
    encoder = load_encoder(model_folder)
    assert image_size_of(encoder.config) == 32
    with torch.no_grad():
        large = pooled_features(encoder, torch.randn(2, 3, 48, 48))
    assert large.shape == (2, 32)


def test_hash_changes_with_weights_and_architecture(model_folder, tmp_path):
    reference = weights_hash(load_encoder(model_folder))
    copied = shutil.copytree(model_folder, tmp_path / "copy")
    assert weights_hash(load_encoder(copied)) == reference, "the name of the folder does not matter"
    assert weights_hash(base_encoder(MoCoV3ForPreTraining.from_pretrained(model_folder))) == reference

    changed = load_encoder(model_folder)
    with torch.no_grad():
        changed.backbone.layernorm.bias[3] += 1e-6
    assert weights_hash(changed) != reference

    config = json.loads((copied / "config.json").read_text())
    config["backbone_config"]["num_attention_heads"] = 4
    (copied / "config.json").write_text(json.dumps(config))
    assert weights_hash(load_encoder(copied)) != reference, "equal weights, other features"


def test_hash_is_that_of_before_a_key_was_added(model_folder, monkeypatch):
    model = load_encoder(model_folder)
    reference, whole = weights_hash(model), model.config.to_dict()
    assert (whole["pooling"], whole["backbone_config"]["mlp_norm"]) == ("auto", "layer_norm")
    later = ("pooling", "mlp_norm", "add_fpn", "apply_layernorm", "reshape_hidden_states")
    before = {key: value for key, value in whole.items() if key not in later}
    before["backbone_config"] = {key: value for key, value in whole["backbone_config"].items() if key not in later}
    monkeypatch.setattr(type(model.config), "to_dict", lambda _: before)
    assert weights_hash(model) == reference
    before["pooling"] = "mean"
    assert weights_hash(model) != reference


# Names


def test_a_published_name_is_fetched_unless_a_folder_has_it(model_folder, tmp_path, monkeypatch):
    name = "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k"
    monkeypatch.setattr(loading, "fetch", {name: str(model_folder)}.__getitem__)
    assert resolve_model(name) == str(model_folder)
    reference = weights_hash(load_encoder(model_folder))
    assert weights_hash(load_encoder(name)) == reference
    assert load_processor(name, load_config(name)).crop_size.height == 32
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / name)
    assert resolve_model(name) == name


def test_a_hub_id_is_left_as_it_is_and_its_errors_are_one_line(monkeypatch):
    assert resolve_model("someone/model") == "someone/model"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (load_encoder, load_classifier, load_config):
        with pytest.raises(ValueError, match="folder 'someone/no-such-model' does not exist, and as a Hub") as error:
            load("someone/no-such-model")
        assert "\n" not in str(error.value)


def test_hub_repository_without_a_processor_has_the_default(model_folder, monkeypatch):
    def missing(name, **options):
        raise OSError(f"{name} does not appear to have a file named preprocessor_config.json")

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", missing)
    (message,) = warnings_of(lambda: load_processor("someone/model", AutoConfig.from_pretrained(model_folder)))
    assert "'someone/model' has no image processor" in message


# Classifiers


def test_a_classifier_is_loaded_whole(tmp_path):
    folder = save_classifier(tmp_path / "classifier")
    expected = MoCoV3ForImageClassification.from_pretrained(folder).eval()
    found = load_classifier(folder)
    assert not found.training
    with torch.no_grad():
        assert torch.equal(found(PIXELS).logits, expected(PIXELS).logits)


def test_what_is_not_a_classifier_is_refused(model_folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"is an encoder without a classification head .*: train one with mocov3 linear"
    ):
        load_classifier(model_folder)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a 'bert' model, which has no image classifier"):
        load_classifier(tmp_path)
    folder = save_classifier(tmp_path / "classifier")
    config = json.loads((tmp_path / "classifier" / "config.json").read_text())
    config["id2label"] = {str(number): f"c{number}" for number in range(5)}
    config["label2id"] = {}
    (tmp_path / "classifier" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"holds classifier\.\w+ of shape \(7.*, but its config.json \(5 classes\) expects"
    ):
        load_classifier(folder)
