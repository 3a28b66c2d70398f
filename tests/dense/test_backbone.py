"""Feature maps of `MoCoV3Backbone`: those of the encoder, at any image size, as tokens, and as a pyramid."""

import json

import pytest
import torch
from torch.nn import functional
from transformers import AutoBackbone, AutoConfig

from mocov3_hf import MoCoV3Backbone, MoCoV3Config, MoCoV3ForPreTraining, MoCoV3Model
from mocov3_hf.weights import weights_hash
from tests.dense.matrix import RESNET, VIT
from tests.factories import randomize


CONV_STEM = VIT | {"stem": "conv"}
PYRAMID = ["stage1", "stage2", "stage3", "stage4"]


def make(backbone=VIT, **options):
    model = MoCoV3Backbone(MoCoV3Config(backbone_config=dict(backbone), **options)).eval()
    randomize(model)
    return model


def images(height=64, width=64):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def maps_of(model, pixel_values):
    return model(pixel_values).feature_maps


@pytest.mark.parametrize("backbone", [VIT, CONV_STEM], ids=["patch", "conv"])
@pytest.mark.parametrize("size", [(64, 64), (96, 48), (16, 16)])
def test_maps_are_the_hidden_states_of_the_encoder(backbone, size):
    model = make(backbone, out_indices=[0, 2, 4])
    encoder = model.mocov3
    with torch.no_grad():
        outputs = encoder(images(*size), interpolate_pos_encoding=True, output_hidden_states=True)
    rows, columns = size[0] // 16, size[1] // 16
    maps = maps_of(model, images(*size))
    assert len(maps) == 3
    for index, feature_map in zip([0, 2, 4], maps, strict=True):
        tokens = encoder.backbone.layernorm(outputs.hidden_states[index])
        for row in range(rows):
            for column in range(columns):
                assert torch.equal(feature_map[:, :, row, column], tokens[:, 1 + row * columns + column])
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), outputs.last_hidden_state[:, 1:])


def test_maps_without_normalization_and_as_tokens():
    model = make(out_indices=[2, 4])
    with torch.no_grad():
        outputs = model.mocov3(images(), output_hidden_states=True)
    model.config.apply_layernorm = False
    assert torch.equal(maps_of(model, images())[0].flatten(2).transpose(1, 2), outputs.hidden_states[2][:, 1:])
    model.config.reshape_hidden_states = False
    assert torch.equal(maps_of(model, images())[1], outputs.hidden_states[4])
    model.config.apply_layernorm = True
    assert torch.equal(maps_of(model, images())[1], outputs.last_hidden_state)


@pytest.mark.parametrize("backbone", [VIT, CONV_STEM], ids=["patch", "conv"])
def test_images_are_padded_to_whole_patches(backbone):
    model = make(backbone)
    (feature_map,) = maps_of(model, images(50, 81))
    assert feature_map.shape == (2, 32, 4, 6)
    padded = torch.zeros(2, 3, 64, 96)
    padded[:, :, :50, :81] = images(50, 81)
    assert torch.equal(feature_map, maps_of(model, padded)[0])
    model.config.reshape_hidden_states = False
    with pytest.raises(ValueError, match="images of 50×81 pixels are not a multiple of the patch size 16×16"):
        model(images(50, 81))


def test_native_size_uses_the_position_embeddings_themselves(monkeypatch):
    model = make()
    embeddings = model.mocov3.backbone.embeddings
    monkeypatch.setattr(functional, "interpolate", None)  # would raise
    (feature_map,) = maps_of(model, images())
    tokens = embeddings(images())
    assert torch.equal(maps_of(make(out_indices=[0], apply_layernorm=False), images())[0].flatten(2), tokens[:, 1:].mT)
    assert feature_map.shape == (2, 32, 4, 4)


def test_levels_of_the_pyramid():
    model = make(add_fpn=True)
    assert model.channels == [8, 16, 32, 32]
    maps = maps_of(model, images(96, 80))
    assert [feature_map.shape[1:] for feature_map in maps] == [(8, 24, 20), (16, 12, 10), (32, 6, 5), (32, 3, 3)]
    plain = MoCoV3Backbone(MoCoV3Config(backbone_config=dict(VIT))).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("fpn")})
    (last,) = maps_of(plain, images(96, 80))
    assert torch.equal(maps[2], last)
    # Half the grid: the largest of four, at the edge of two.
    assert torch.equal(maps[3][:, :, 1, 1], last[:, :, 2:4, 2:4].amax((2, 3)))
    assert torch.equal(maps[3][:, :, 1, 2], last[:, :, 2:4, 4:].amax((2, 3)))
    # Twice the grid: each position becomes four, without its neighbors.
    doubled = model.fpn["stage2"][0]
    four = torch.einsum("bc,cdij->bdij", last[:, :, 4, 3], doubled.weight) + doubled.bias[:, None, None]
    torch.testing.assert_close(maps[1][:, :, 8:10, 6:8], four)
    # Four times: twice that, with a normalization over the channels and a GELU between.
    first, norm, _, second = model.fpn["stage1"]
    between = torch.einsum("bc,cd->bd", last[:, :, 0, 0], first.weight[:, :, 1, 0]) + first.bias
    between = functional.gelu(functional.layer_norm(between, [16], norm.weight, norm.bias, norm.eps))
    expected = torch.einsum("bc,cd->bd", between, second.weight[:, :, 0, 1]) + second.bias
    torch.testing.assert_close(maps[0][:, :, 2, 1], expected)


@pytest.mark.parametrize(
    ("patch_size", "grids"),
    [(4, [16, 8, 4, 2]), (8, [16, 8, 4, 2]), (32, [16, 8, 4, 2]), (7, [18, 9, 5, 3]), (14, [20, 10, 5, 3])],
)
def test_strides_of_the_pyramid_for_patch_sizes(patch_size, grids):
    size = {7: 63, 14: 70}.get(patch_size, 64)
    model = make(VIT | {"patch_size": patch_size, "image_size": size, "hidden_size": 64}, add_fpn=True)
    assert [feature_map.shape[-1] for feature_map in maps_of(model, images(size, size))] == grids


def test_only_levels_with_a_reader_are_built():
    model = make(add_fpn=True, out_features=["stem", "stage2", "stage4"])
    assert set(model.fpn) == {"stage2", "stage4"}
    assert model.channels == [32, 16, 32]
    assert [feature_map.shape[1:] for feature_map in maps_of(model, images())] == [(32, 4, 4), (16, 8, 8), (32, 2, 2)]
    model.out_features = ["stage1"]
    with pytest.raises(ValueError, match="the pyramid was built without 'stage1'"):
        model(images())


def test_attention_weights_are_returned_where_there_are_any():
    vit = make()
    vit.config._attn_implementation = "eager"
    assert vit.has_attentions
    resnet = make(RESNET)
    assert not resnet.has_attentions
    assert resnet.forward_with_filtered_kwargs(images(), output_attentions=True).attentions is None


def test_options_of_maps_are_saved_and_loaded(tmp_path):
    MoCoV3ForPreTraining(MoCoV3Config(backbone_config=dict(VIT), head_hidden_size=16)).save_pretrained(tmp_path / "a")
    for options in (
        {"out_features": ["stage2", "stage4"], "add_fpn": True},
        {"add_fpn": True},
        {"apply_layernorm": False, "out_indices": [1, 3]},
        {"reshape_hidden_states": False, "out_indices": (1, 3)},
    ):
        model = MoCoV3Backbone.from_pretrained(tmp_path / "a", **options).eval()
        expected = MoCoV3Config(backbone_config=dict(VIT), **options)
        for name in ("out_features", "out_indices", "stage_names", "add_fpn", "apply_layernorm"):
            assert getattr(model.config, name) == getattr(expected, name), name
        assert model.config.num_hidden_layers == 4
        model.save_pretrained(tmp_path / "b")
        loaded = AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path / "b"))
        assert loaded.config.out_features == model.out_features
        again = MoCoV3Backbone.from_pretrained(tmp_path / "b").eval()
        torch.testing.assert_close(maps_of(again, images()), maps_of(model, images()))
        # An encoder does not depend on the maps of a backbone, so evaluations of one are found for the other.
        whole = MoCoV3Model.from_pretrained(tmp_path / "a")
        before = weights_hash(whole)
        for name in ("add_fpn", "apply_layernorm", "reshape_hidden_states"):
            setattr(whole.config, name, getattr(expected, name))
        assert weights_hash(whole) == before


def test_configurations_of_earlier_versions_load(tmp_path):
    config = MoCoV3Config(backbone_config=dict(VIT), out_indices=[2, 4])
    MoCoV3Backbone(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values["stage_names"] == ["stem", "stage1", "stage2", "stage3", "stage4"]
    for name in ("add_fpn", "apply_layernorm", "reshape_hidden_states"):
        del values[name]
    path.write_text(json.dumps(values))
    loaded = MoCoV3Backbone.from_pretrained(tmp_path)
    assert loaded.out_indices == [2, 4]
    loaded.config.save_pretrained(tmp_path / "again")
    new = json.loads((tmp_path / "again" / "config.json").read_text())
    assert all(new[name] == values[name] for name in values.keys() - {"backbone_config"})


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (RESNET, {"add_fpn": True}, "a resnet backbone has maps of several strides: leave it out"),
        (RESNET, {"reshape_hidden_states": False}, "returns the tokens of a ViT, and a resnet backbone has maps"),
        (VIT, {"add_fpn": True, "reshape_hidden_states": False}, "pass add_fpn or reshape_hidden_states=False"),
        (
            VIT | {"hidden_size": 6, "position_embedding": "learned"},
            {"add_fpn": True},
            "add_fpn needs a hidden_size that is a multiple of 4, got 6",
        ),
        (VIT, {"add_fpn": True, "out_features": ["stage5"]}, "must be a subset of stage_names"),
    ],
)
def test_maps_that_a_backbone_cannot_return_are_refused(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        MoCoV3Config(backbone_config=dict(backbone), **options)


def test_square_patches_are_one_number_for_decoders():
    config = MoCoV3Config(backbone_config={**VIT, "patch_size": [16, 16]})
    assert config.patch_size == 16
    assert MoCoV3Config(backbone_config={**VIT, "patch_size": [16, 8]}).patch_size == [16, 8]
