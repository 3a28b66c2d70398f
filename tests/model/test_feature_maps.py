"""Feature maps of any vision model: which hidden states they are, their channels and strides, and what is refused."""

import pytest
import torch
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation

from mocov3_hf import MoCoV3Backbone, MoCoV3Config, dense
from mocov3_hf.model import modeling_mocov3_backbone
from mocov3_hf.model.backbone_mocov3 import UnsupportedBackboneError
from tests.dense.matrix import RESNET, VIT
from tests.model.test_backbones import CONFIGS


SIZE = 64
LEVELS = ["stem", "stage1", "stage2", "stage3", "stage4"]
HIERA = {"model_type": "hiera", "image_size": [SIZE, SIZE], "depths": [1, 1, 1, 1], "embed_dim": 8}
SAM2 = {
    "model_type": "sam2_hiera_det_model",
    "image_size": [SIZE, SIZE],
    "hidden_size": 8,
    "embed_dim_per_stage": [8, 16, 32, 64],
    "blocks_per_stage": [1, 1, 2, 1],
    "global_attention_blocks": [],
}
SWIN = {"model_type": "maskformer-swin", "image_size": SIZE, "depths": [2, 1, 1, 1], "embed_dim": 12, "window_size": 2}
# By stage: index of the hidden state, channels and stride.
EXPECTED = {
    "cvt": {"stage1": (0, 16, 4), "stage2": (1, 48, 8), "stage3": (2, 96, 16)},
    "dinov3_convnext": dict(zip(LEVELS, [(0, 3, 1), (1, 24, 4), (2, 48, 8), (3, 96, 16), (4, 192, 32)], strict=True)),
    "efficientnet": dict(zip(LEVELS, [(1, 8, 2), (2, 8, 4), (3, 16, 8), (7, 32, 16), (10, 80, 32)], strict=True)),
    "hgnet_v2": dict(zip(LEVELS, [(0, 48, 4), (1, 128, 4), (2, 512, 8), (3, 1024, 16), (4, 2048, 32)], strict=True)),
    "hiera": dict(zip(LEVELS, [(0, 8, 4), (1, 8, 4), (2, 16, 8), (3, 32, 16), (4, 64, 32)], strict=True)),
    "levit": {"stem": (0, 32, 16), "stage1": (1, 64, 32), "stage2": (2, 96, 64), "stage3": (3, 96, 64)},
    "maskformer-swin": dict(zip(LEVELS, [(0, 12, 4), (1, 12, 4), (2, 24, 8), (3, 48, 16), (4, 96, 32)], strict=True)),
    "mobilevit": dict(zip(LEVELS, [(0, 8, 2), (1, 16, 4), (2, 24, 8), (3, 32, 16), (4, 40, 32)], strict=True)),
    "pvt": dict(zip(LEVELS, [(0, 16, 4), (1, 32, 8), (2, 80, 16), (3, 128, 32), (4, 128, 32)], strict=True)),
    "pvt_v2": dict(zip(LEVELS[1:], [(0, 8, 4), (1, 16, 8), (2, 40, 16), (3, 64, 32)], strict=True)),
    "sam2_hiera_det_model": dict(zip(LEVELS[1:], [(1, 8, 4), (2, 16, 8), (4, 32, 16), (5, 64, 32)], strict=True)),
    "sam_vision_model": {"stem": (0, 96, 16), "stage1": (1, 96, 16), "stage2": (2, 96, 16)},
    "segformer": dict(zip(LEVELS[1:], [(0, 8, 4), (1, 16, 8), (2, 40, 16), (3, 64, 32)], strict=True)),
    "swiftformer": dict(zip(LEVELS[1:], [(1, 12, 4), (3, 14, 8), (5, 28, 16), (7, 55, 32)], strict=True)),
    "timm_wrapper": dict(zip(LEVELS, [(0, 64, 2), (1, 64, 4), (2, 128, 8), (3, 256, 16), (4, 512, 32)], strict=True)),
    "yolos": {"stem": (0, 96, 16), "stage1": (1, 96, 16), "stage2": (2, 96, 16)},
}
CONFIGS = CONFIGS | {"hiera": HIERA, "sam2_hiera_det_model": SAM2, "maskformer-swin": SWIN}
CHANNELS_LAST = ("sam_vision_model", "sam2_hiera_det_model")


def make(model_type, **options):
    torch.manual_seed(0)
    return MoCoV3Backbone(MoCoV3Config(backbone_config=CONFIGS[model_type], **options)).eval()


def images(height=SIZE, width=SIZE):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", EXPECTED)
@torch.no_grad()
def test_maps_are_hidden_states(model_type):
    model, expected = make(model_type, apply_layernorm=False), EXPECTED[model_type]
    assert model.out_features == list(expected)[-1:]  # the last one by default
    assert {name: width for name, width in model.out_feature_channels.items() if width is not None} == {
        name: channels for name, (_, channels, _) in expected.items()
    }
    model.out_features = list(expected)
    maps = model(images()).feature_maps
    states = model.mocov3.backbone(images(), output_hidden_states=True, return_dict=True).hidden_states
    for feature_map, (index, channels, stride) in zip(maps, expected.values(), strict=True):
        cells = max(SIZE // stride, 1)
        assert feature_map.shape == (2, channels, cells, cells)
        state = states[index]
        if model_type == "maskformer-swin" and index > 0:
            state = state[-1]  # of the last block
        if state.dim() == 3:
            before = 1 if model_type == "yolos" or state.shape[1] == 5 else 0  # PVT has a CLS token in its last stage
            state = state[:, before : before + cells * cells].mT.unflatten(2, (cells, cells))
        elif model_type in CHANNELS_LAST:
            state = state.permute(0, 3, 1, 2)
        torch.testing.assert_close(feature_map, state)


@torch.no_grad()
def test_tokens_of_images_that_are_not_square():
    model = make("pvt_v2", out_features=["stage1", "stage4"])
    assert [each.shape[2:] for each in model(images(96, 64)).feature_maps] == [(24, 16), (3, 2)]
    model = make("hiera")
    maps, level = model.maps, model.levels["stage2"]
    tokens = torch.arange(12.0).reshape(1, 12, 1)
    for size, grid in (((32, 24), (4, 3)), ((35, 25), (4, 3)), ((30, 17), (4, 3)), ((16, 48), (2, 6))):
        found = maps.to_map(tokens, level, size)
        assert found.shape == (1, 1, *grid)
        assert torch.equal(found.flatten(), tokens.flatten())
    with pytest.raises(ValueError, match="images of 40×24 pixels give 12 tokens, which are not a grid of the strides"):
        maps.to_map(tokens, level, (40, 24))


def test_known_backbones_are_not_measured(monkeypatch):
    monkeypatch.setattr(modeling_mocov3_backbone, "feature_maps_of", lambda *_: pytest.fail("a forward pass"))
    channels = [MoCoV3Backbone(MoCoV3Config(backbone_config=dict(each))).channels for each in (VIT, RESNET)]
    assert channels == [[32], [32]]


def test_models_without_maps_are_refused():
    with pytest.raises(
        UnsupportedBackboneError, match=r"shape \(192, 28, 56\) is not a map of images of 224×224; docs"
    ):
        make("pp_ocrv6_tiny_rec")
    with pytest.raises(ValueError, match="a cvt backbone has no map 'stage4': choose out_features among stage1, stag"):
        make("cvt", out_features=["stage2", "stage4"])
    model = make("cvt")
    model.out_features = ["stem"]
    with pytest.raises(ValueError, match="a cvt backbone has no map 'stem'"):
        model(images())


@torch.no_grad()
def test_saved_configurations_load(tmp_path):
    # A run of pre-training chooses no maps, and its configuration stays as it was.
    config = MoCoV3Config(backbone_config=CONFIGS["timm_wrapper"])
    assert (config.stage_names, config.out_features, config.out_indices) == (["stem"], ["stem"], [0])
    values = config.to_dict()
    assert MoCoV3Backbone(MoCoV3Config.from_dict(values)).out_features == ["stage4"]
    assert MoCoV3Config.from_dict(values, out_indices=[-2]).out_features == ["stage3"]
    # One with all names of the stages of a deep network, which its stages never were.
    config = MoCoV3Config(backbone_config=CONFIGS["efficientnet"])
    assert config.out_features == ["stage64"]
    assert MoCoV3Backbone(MoCoV3Config.from_dict(config.to_dict())).out_features == ["stage4"]

    for chosen in (["stem"], ["stage1", "stage2", "stage3", "stage4"]):
        model = make("timm_wrapper", out_features=chosen)
        model.save_pretrained(tmp_path)
        loaded = MoCoV3Backbone.from_pretrained(tmp_path).eval()
        assert (loaded.out_features, loaded.stage_names) == (chosen, LEVELS)
        assert AutoBackbone.from_config(loaded.config).out_features == chosen
        torch.testing.assert_close(loaded(images()).feature_maps, model(images()).feature_maps)


def test_decoder_on_timm(tmp_path):
    model = make("timm_wrapper")
    model.save_pretrained(tmp_path)
    config = dense.backbone_config(tmp_path, out_features=LEVELS[1:])
    decoder = UperNetConfig(backbone_config=config, hidden_size=16, auxiliary_channels=8, num_labels=3)
    whole = UperNetForSemanticSegmentation(decoder)
    dense.load_backbone(whole, tmp_path)
    assert whole.eval()(images()).logits.shape == (2, 3, SIZE, SIZE)


@torch.no_grad()
def test_images_of_the_size_of_fixed_position_embeddings_are_not_padded():
    backbone = {**CONFIGS["aimv2_vision_model"], "patch_size": 15, "num_hidden_layers": 1}
    model = MoCoV3Backbone(MoCoV3Config(backbone_config=backbone)).eval()
    assert model(images()).feature_maps[0].shape[2:] == (4, 4)


def test_states_that_are_recorded_twice_count_once():
    maps = make("mobilevit").maps
    states = [torch.zeros(1) for _ in range(5)]
    assert maps.check(states) is states
    repeated = [state for state in states for _ in range(2)]
    assert all(a is b for a, b in zip(maps.check(repeated), states, strict=True))
    with pytest.raises(ValueError, match="returned 3 hidden states, expected 5"):
        maps.check(states[:3])
