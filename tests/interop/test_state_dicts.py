"""Conversion of state dicts against the outputs of the official code, and there and back again, bit for bit."""

import json

import numpy as np
import pytest
import torch

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ForPreTraining, MoCoV3Model
from mocov3_hf.interop import ConversionError, convert_state_dict, revert_state_dict
from tests.factories import VIT
from tests.fixtures.fill import reference_views, sincos_position_embedding
from tests.interop.conftest import (
    FIXTURES,
    IMAGE_SIZES,
    OVERRIDES,
    classifier_values,
    encoder_of,
    mmpretrain_classification,
    mmpretrain_pretraining,
    official,
    with_classifier,
)


def official_encoder(body):
    return encoder_of(official(body), body)


LAYOUT_FILES = sorted((FIXTURES / "layouts").glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("make", [official, mmpretrain_pretraining])
def test_pretraining_reproduces_the_official_outputs(make, body):
    model = convert_state_dict(make(body), **OVERRIDES[body]).build_model().double()
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["timm", "mmpretrain_classification"])
def test_encoders_and_classifiers_reproduce_the_official_features(layout, body):
    encoder = encoder_of(official(body), body)
    head = "head" if body == "vit" else "fc"
    classifier = with_classifier(encoder, head, body) if layout == "timm" else mmpretrain_classification(body)
    without_head = {key: value for key, value in classifier.items() if not key.startswith(("head.", "fc."))}
    views = reference_views(8, IMAGE_SIZES[body])
    reference = np.load(FIXTURES / f"official_{body}_tiny.npz")["features"]

    converted = convert_state_dict(classifier, **OVERRIDES[body])
    assert (converted.layout, converted.model_class) == (layout, MoCoV3ForImageClassification)
    weight, bias = classifier_values(body)
    with torch.no_grad():
        logits = converted.build_model().double()(views[0]).logits
    expected = reference @ weight.double().numpy().T + bias.double().numpy()
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-6)

    plain = convert_state_dict(without_head, **OVERRIDES[body])
    assert plain.model_class is MoCoV3Model
    with torch.no_grad():
        features = plain.build_model().double()(views[0]).pooler_output
    np.testing.assert_allclose(features.numpy(), reference, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [official, mmpretrain_pretraining, mmpretrain_classification, lambda body: encoder_of(official(body), body)],
)
def test_there_and_back_is_bit_equal(make, body):
    source = make(body)
    converted = convert_state_dict(source, **OVERRIDES[body])
    back = revert_state_dict(converted.build_model().state_dict(), converted.config, layout=converted.layout)
    assert back.keys() == source.keys() - set(converted.ignored)
    assert all(torch.equal(back[key], source[key]) for key in back)
    again = convert_state_dict(back, **OVERRIDES[body])
    assert all(torch.equal(again.state_dict[key], value) for key, value in converted.state_dict.items())


def test_reverting_does_not_depend_on_the_order_of_keys():
    source = official("vit")
    converted = convert_state_dict(source, num_attention_heads=2)
    for order in (sorted, lambda keys: sorted(keys, reverse=True)):
        shuffled = {key: converted.state_dict[key] for key in order(converted.state_dict)}
        back = revert_state_dict(shuffled, converted.config, layout="official_pretraining")
        assert all(torch.equal(back[key], value) for key, value in source.items())


def test_pretraining_model_reverts_to_both_layouts_of_pretraining(body):
    converted = convert_state_dict(official(body), **OVERRIDES[body])
    mmpretrain = revert_state_dict(converted.state_dict, converted.config, layout="mmpretrain_pretraining")
    expected = mmpretrain_pretraining(body)
    assert mmpretrain.keys() == {key for key in expected if not key.endswith((".steps", "r.mean", "r.std"))}
    assert all(torch.equal(mmpretrain[key], expected[key]) for key in mmpretrain)


@pytest.mark.slow
@pytest.mark.parametrize("path", LAYOUT_FILES, ids=lambda path: path.stem)
def test_every_full_size_layout_converts_by_its_names_and_shapes(path):
    shapes = json.loads(path.read_text())
    state_dict = {
        name: torch.empty(shape, device="meta", dtype=torch.int64 if name.endswith(("tracked", "steps")) else None)
        for name, shape in shapes.items()
    }
    for name, shape in shapes.items():
        if name.endswith("pos_embed"):
            state_dict[name] = torch.from_numpy(sincos_position_embedding(shape[2], 14))
    converted = convert_state_dict(state_dict)
    back = revert_state_dict(converted.state_dict, converted.config, layout=converted.layout)
    assert {key: list(value.shape) for key, value in back.items()} == {
        key: shape for key, shape in shapes.items() if key not in converted.ignored
    }
    backbone, name = converted.config.backbone_config, path.stem
    if "resnet" in name:
        assert (backbone.model_type, backbone.depths) == ("resnet", [3, 4, 6, 3])
        assert backbone.hidden_sizes == [256, 512, 1024, 2048]
    else:
        size = next(size for size in ("small", "base", "large") if size in name)
        expected = {"small": (384, 12, 12), "base": (768, 12, 12), "large": (1024, 24, 16)}[size]
        depth = 11 if "conv" in name else expected[1]
        assert (backbone.hidden_size, backbone.num_hidden_layers) == (expected[0], depth)
        assert (backbone.num_attention_heads, backbone.image_size, backbone.patch_size) == (expected[2], 224, 16)
        assert backbone.stem == ("conv" if "conv" in name else "patch")
        assert backbone.position_embedding == "sincos2d"
    parameters = {
        "mocov3_resnet50": 68_012_160,
        "official_resnet50": 68_012_160,
        "mocov3_vit-small": 84_266_752,
        "official_vit_small": 84_266_752,
        "mocov3_vit-base": 215_678_464,
        "official_vit_base": 215_678_464,
        "mocov3_vit-large": 652_781_568,
    }
    if converted.model_class is MoCoV3ForPreTraining:
        config = converted.config
        expected = (2, False, 1.0) if "resnet" in name else (3, True, 0.2)
        assert (config.num_projector_layers, config.predictor_final_norm, config.temperature) == expected
        assert (config.head_hidden_size, config.projection_dim, config.num_predictor_layers) == (4096, 256, 2)
        counted = [count for key, count in parameters.items() if key in name]
        total = sum(parameter.numel() for parameter in converted.build_model().parameters())
        assert not counted or counted == [total]
    else:
        assert converted.config.num_labels == 1000


def test_layout_of_the_convolutional_stem_keeps_every_tensor_apart():
    shapes = json.loads((FIXTURES / "layouts" / "official_vit_conv_small.json").read_text())
    stem = {name: shape for name, shape in shapes.items() if name.startswith("base_encoder.patch_embed")}
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state_dict |= {name: torch.full(shape, float(index)) for index, (name, shape) in enumerate(stem.items())}
    state_dict["base_encoder.pos_embed"] = torch.from_numpy(sincos_position_embedding(384, 14))
    with pytest.raises(ConversionError, match=r"wrong type: base_encoder.patch_embed.proj.1.num_batches_tracked"):
        convert_state_dict(state_dict)
    state_dict = {k: v.to(torch.int64) if k.endswith("num_batches_tracked") else v for k, v in state_dict.items()}
    converted = convert_state_dict(state_dict).state_dict
    prefix = "mocov3.backbone.embeddings.patch_embeddings"
    for index, layer in enumerate((0, 3, 6, 9)):
        convolution = converted[f"{prefix}.layers.{index}.convolution.weight"]
        assert torch.equal(convolution, state_dict[f"base_encoder.patch_embed.proj.{layer}.weight"])
        for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            norm = converted[f"{prefix}.layers.{index}.normalization.{tensor}"]
            assert torch.equal(norm, state_dict[f"base_encoder.patch_embed.proj.{layer + 1}.{tensor}"])
    for tensor in ("weight", "bias"):
        projection = converted[f"{prefix}.projection.{tensor}"]
        assert torch.equal(projection, state_dict[f"base_encoder.patch_embed.proj.12.{tensor}"])


@torch.no_grad()
def test_convolutional_stem_computes_what_the_official_one_does():
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((3, 4), (4, 8), (8, 16), (16, 32)):
        layers += [torch.nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), torch.nn.BatchNorm2d(outputs)]
        layers += [torch.nn.ReLU(inplace=True)]
    stem = torch.nn.Sequential(*layers, torch.nn.Conv2d(32, 32, 1))
    stem(torch.randn(8, 3, 32, 32))  # running statistics of its own in every normalization
    encoder = {key: value for key, value in official_encoder("vit").items() if not key.startswith("patch_embed")}
    encoder["pos_embed"] = torch.from_numpy(sincos_position_embedding(32, 2))
    encoder |= {f"patch_embed.proj.{key}": value for key, value in stem.eval().state_dict().items()}
    converted = convert_state_dict(encoder, num_attention_heads=2)
    backbone = converted.config.backbone_config
    assert (backbone.stem, backbone.patch_size, backbone.image_size) == ("conv", 16, 32)
    images = torch.randn(2, 3, 32, 32)
    patches = converted.build_model().backbone.embeddings.patch_embeddings(images)
    torch.testing.assert_close(patches, stem(images), rtol=0, atol=1e-6)


def test_files_from_before_batch_counters_convert():
    encoder = encoder_of(official("resnet"), "resnet")
    old = {key: value for key, value in encoder.items() if not key.endswith("num_batches_tracked")}
    assert convert_state_dict(old).state_dict.keys() == convert_state_dict(encoder).state_dict.keys()
    old["bn1.num_batches_tracked"] = torch.tensor(5)
    with pytest.raises(ConversionError, match=r"missing keys: .*layer1\.0\.bn1\.num_batches_tracked"):
        convert_state_dict(old)


def test_parallel_prefix_is_taken_off(body):
    plain = convert_state_dict(official(body), **OVERRIDES[body])
    wrapped = convert_state_dict({f"module.{k}": v for k, v in official(body).items()}, **OVERRIDES[body])
    assert wrapped.state_dict.keys() == plain.state_dict.keys()


def test_frozen_parts_stay_frozen():
    model = convert_state_dict(official("vit"), num_attention_heads=2).build_model()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    momentum = {name for name, _ in model.named_parameters() if name.startswith("momentum_encoder.")}
    embeddings = "mocov3.backbone.embeddings."
    patches = {f"{embeddings}patch_embeddings.projection.{part}" for part in ("weight", "bias")}
    assert frozen == momentum | patches | {f"{embeddings}position_embeddings"}


def test_stage_follows_from_the_position_table():
    encoder = encoder_of(official("vit"), "vit")
    linear = convert_state_dict(with_classifier(encoder, "head", "vit"), num_attention_heads=2)
    assert (linear.stage, linear.config.backbone_config.position_embedding) == ("linear", "sincos2d")
    noise = 0.1 * torch.randn(1, 17, 32, generator=torch.manual_seed(0))
    trained = encoder | {"pos_embed": encoder["pos_embed"] + noise}
    finetuned = convert_state_dict(with_classifier(trained, "head", "vit"), num_attention_heads=2)
    backbone = finetuned.config.backbone_config
    assert (finetuned.stage, backbone.position_embedding) == ("finetuned", "learned")
    assert not backbone.freeze_patch_projection
    assert convert_state_dict(encoder, num_attention_heads=2).stage == "pretrained"
    assert convert_state_dict(with_classifier(encoder_of(official("resnet"), "resnet"), "fc", "resnet")).stage is None


def test_overrides_reach_their_configuration():
    converted = convert_state_dict(
        official("vit"), num_attention_heads=4, temperature=0.5, drop_path_rate=0.1, stage="pretrained"
    )
    backbone = converted.config.backbone_config
    assert (backbone.num_attention_heads, backbone.drop_path_rate) == (4, 0.1)
    assert converted.config.temperature == 0.5
    with pytest.raises(
        ConversionError,
        match=r"'temprature' is not an option of a model with a vit .*did you mean 'temperature'",
    ):
        convert_state_dict(official("vit"), temprature=0.1)
    with pytest.raises(ConversionError, match="pass --num_attention_heads"):
        convert_state_dict(official("vit"))


def broken(change):
    state_dict = official("vit")
    change(state_dict)
    return state_dict


def swap_heads(state_dict):
    for layer in ("0", "3"):
        a, b = f"predictor.{layer}.weight", f"base_encoder.head.{layer}.weight"
        state_dict[a], state_dict[b] = state_dict[b], state_dict[a]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("base_encoder.blocks.1.attn.qkv.bias"), "missing keys: base_encoder.blocks.1.attn.qkv.bias"),
        (lambda s: s.pop("base_encoder.cls_token"), "missing keys: base_encoder.cls_token"),
        (lambda s: s.update({"queue": torch.ones(2)}), "unexpected keys: queue"),
        (
            lambda s: s.update({"base_encoder.norm.weight": torch.ones(31)}),
            r"misshaped keys: base_encoder.norm.weight has \[31\], expected \[32\]",
        ),
        (swap_heads, r"misshaped keys: .*predictor\.0\.weight has \[64, 32\]"),
        (lambda s: s.update({"predictor.0.weight": "text"}), "'predictor.0.weight' is a str, expected a tensor"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("predictor")], "missing keys: predictor"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("momentum")],
            "momentum_encoder.cls_token.* and 26 more",
        ),
        (lambda s: [s.pop(k) for k in list(s)], "not one of the known layouts .* no tensors"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ConversionError, match=message) as error:
        convert_state_dict(broken(change), num_attention_heads=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["official_pretraining", "mmpretrain_pretraining", "solo_learn_pretraining"])
def test_no_layout_takes_a_vit_bn(layout):
    with torch.device("meta"):
        model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config={**VIT, "mlp_norm": "batch_norm"}))
    with pytest.raises(ConversionError, match=f"^the layout '{layout}' has no batch normalization in a ViT") as raised:
        revert_state_dict(model.state_dict(), model.config, layout=layout)
    assert "\n" not in str(raised.value)


def test_a_foreign_vit_bn_is_refused():
    state_dict = official("vit") | {"base_encoder.blocks.0.norm2.running_mean": torch.zeros(32)}
    with pytest.raises(ConversionError, match=r"unexpected keys: base_encoder\.blocks\.0\.norm2\.running_mean"):
        convert_state_dict(state_dict, **OVERRIDES["vit"])
    with pytest.raises(ConversionError, match="'official_pretraining' has no batch normalization in a ViT"):
        convert_state_dict(official("vit"), mlp_norm="batch_norm", **OVERRIDES["vit"])


def test_own_naming_and_wrong_layout_are_told():
    native = convert_state_dict(official("vit"), num_attention_heads=2).state_dict
    with pytest.raises(ConversionError, match="this package's own names, which from_pretrained loads"):
        convert_state_dict(native)
    with pytest.raises(ConversionError, match="those of the layout 'official_pretraining', not 'timm'"):
        convert_state_dict(official("vit"), layout="timm", num_attention_heads=2)
    with pytest.raises(ConversionError, match="unknown layout 'tim'"):
        convert_state_dict(official("vit"), layout="tim", num_attention_heads=2)
    config = convert_state_dict(official("vit"), num_attention_heads=2).config
    with pytest.raises(ConversionError, match="'timm' is for an encoder or a classifier, which"):
        revert_state_dict(native, config, layout="timm")
