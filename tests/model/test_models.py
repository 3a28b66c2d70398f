"""The classes as transformers' users meet them: construction, initial values, freezing, loading, pipelines."""

import math
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForPreTraining,
)

from mocov3_hf import (
    MoCoV3Backbone,
    MoCoV3Config,
    MoCoV3ForImageClassification,
    MoCoV3ForPreTraining,
    MoCoV3Model,
    MoCoV3ViTConfig,
    MoCoV3ViTModel,
)
from tests.factories import VIT


BACKBONES = {
    "mocov3_vit": VIT,
    "vit_bn": {**VIT, "mlp_norm": "batch_norm"},
    "conv_stem": {**VIT, "stem": "conv", "patch_size": 16},
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "bottleneck",
    },
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "convnext": {
        "model_type": "convnext",
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "image_size": 32,
    },
    "swin": {
        "model_type": "swin",
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
        "image_size": 32,
        "patch_size": 4,
    },
}
WIDTHS = {"mocov3_vit": 32, "vit_bn": 32, "conv_stem": 32, "resnet": 16, "dinov2": 32, "convnext": 32, "swin": 32}


def tiny_config(backbone="mocov3_vit", **overrides):
    return MoCoV3Config(backbone_config=dict(BACKBONES[backbone]), projection_dim=16, head_hidden_size=24, **overrides)


def two_views(batch=4, size=32):
    return torch.randn(2, batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return request.param


@pytest.mark.slow
def test_any_backbone_pretrains_and_loads(backbone, tmp_path):
    model = MoCoV3ForPreTraining(tiny_config(backbone))
    views = two_views()
    output = model(pixel_values=views[0], pixel_values_2=views[1])
    output.loss.backward()
    assert output.pooler_output.shape == (4, WIDTHS[backbone])
    assert output.prediction.shape == output.projection.shape == (4, 16)
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [], "DDP refuses trainable parameters without gradient"

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    features = AutoModel.from_pretrained(tmp_path)(views[0]).pooler_output
    model.eval()
    torch.testing.assert_close(features, model(views[0]).pooler_output)


@pytest.mark.parametrize("predictor_final_norm", [True, False])
def test_heads_without_batch_norm(predictor_final_norm, tmp_path):
    model = MoCoV3ForPreTraining(tiny_config(head_batch_norm=False, predictor_final_norm=predictor_final_norm))
    assert not [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.BatchNorm1d)]

    first, second, third = (layer.dense.weight for layer in model.projector.layers)
    features = torch.randn(4, 32)
    expected = torch.relu(torch.relu(features @ first.T) @ second.T) @ third.T
    torch.testing.assert_close(model.projector(features), expected)

    views = two_views()
    model(pixel_values=views[0], pixel_values_2=views[1]).loss.backward()
    model.save_pretrained(tmp_path)
    assert MoCoV3ForPreTraining.from_pretrained(tmp_path).config.head_batch_norm is False


def test_published_parameter_counts():
    heads = {"resnet": {"num_projector_layers": 2, "predictor_final_norm": False}}
    vit = {"model_type": "mocov3_vit"}
    for backbone, count in [
        ({"model_type": "resnet"}, 68_012_160),
        ({**vit, "hidden_size": 384, "intermediate_size": 1536}, 84_266_752),
        (vit, 215_678_464),
        (
            {**vit, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
            | {"num_attention_heads": 16},
            652_781_568,
        ),
    ]:
        with torch.device("meta"):
            model = MoCoV3ForPreTraining(
                MoCoV3Config(backbone_config=backbone, **heads.get(backbone["model_type"], {}))
            )
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_fresh_momentum_branch_is_a_frozen_copy(backbone):
    model = MoCoV3ForPreTraining(tiny_config(backbone))
    assert not any(parameter.requires_grad for parameter in model.momentum_encoder.parameters())
    for average, source in model.momentum_pairs(buffers=True):
        assert torch.equal(average, source)
        assert average.data_ptr() != source.data_ptr()


def test_update_moves_parameters_and_leaves_statistics():
    model = MoCoV3ForPreTraining(tiny_config("resnet"))
    with torch.no_grad():
        for tensor in [*model.mocov3.parameters(), *model.projector.parameters(), *model.mocov3.buffers()]:
            tensor += 1
    before = {name: value.clone() for name, value in model.momentum_encoder.state_dict().items()}
    model.update_momentum_encoder(0.75)
    parameters = dict(model.momentum_encoder.named_parameters())
    for name, value in model.momentum_encoder.state_dict().items():
        torch.testing.assert_close(value, before[name] + (0.25 if name in parameters else 0), msg=name)
    with pytest.raises(ValueError, match="between 0 and 1"):
        model.update_momentum_encoder(1.5)


def test_forward_is_pure():
    """No moving average inside: evaluation leaves everything as it is, twice the same."""
    model = MoCoV3ForPreTraining(tiny_config()).eval()
    views = two_views()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (model(pixel_values=views[0], pixel_values_2=views[1]).loss for _ in range(2))
    assert torch.equal(first, second)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_loss_is_symmetric_in_the_views():
    model = MoCoV3ForPreTraining(tiny_config()).double()
    views = two_views().double()
    forth = model(pixel_values=views[0], pixel_values_2=views[1])
    back = model(pixel_values=views[1], pixel_values_2=views[0])
    torch.testing.assert_close(forth.loss, back.loss)
    torch.testing.assert_close(forth.positive_similarity_1, back.positive_similarity_2)
    torch.testing.assert_close(forth.positive_top1_2, back.positive_top1_1)


def test_one_view_gives_features_and_no_loss():
    output = MoCoV3ForPreTraining(tiny_config()).eval()(two_views()[0])
    assert output.loss is None
    assert output.projection is None
    assert output.pooler_output.shape == (4, 32)


def test_batch_of_one_is_refused_in_training():
    model = MoCoV3ForPreTraining(tiny_config())
    views = two_views(batch=1)
    with pytest.raises(ValueError, match="batch of 1"):
        model(pixel_values=views[0], pixel_values_2=views[1])
    assert model.eval()(pixel_values=views[0]).prediction.shape == (1, 16)


def test_backbone_only_checkpoint_starts_a_pretraining(tmp_path, backbone):
    saved = MoCoV3Model(tiny_config(backbone))
    saved.save_pretrained(tmp_path)
    model = MoCoV3ForPreTraining.from_pretrained(tmp_path)
    for key, value in saved.state_dict().items():
        assert torch.equal(value, model.mocov3.state_dict()[key]), key
    for average, source in model.momentum_pairs(buffers=True):
        assert torch.equal(average, source)
    assert torch.isfinite(model(*two_views()).loss)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("mocov3_vit", {"hidden_size": 32, "image_size": 32, "patch_size": 8, "num_channels": 3}),
        ("resnet", {"hidden_size": 16, "image_size": None, "patch_size": None, "num_channels": 3}),
        ("dinov2", {"hidden_size": 32, "image_size": 32, "patch_size": 8, "num_channels": 3}),
        ("convnext", {"hidden_size": 32, "image_size": 32, "patch_size": 4, "num_channels": 3}),
        ("swin", {"hidden_size": 32, "image_size": 32, "patch_size": 4, "num_channels": 3}),
    ],
)
def test_configuration_has_the_sizes_of_the_backbone(backbone, expected, tmp_path):
    config = tiny_config(backbone)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.hidden_size == MoCoV3Model(config).pooled_width
    config.save_pretrained(tmp_path)
    loaded = MoCoV3Config.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in expected} == expected
    assert loaded.to_dict() == config.to_dict()


def test_attention_support_is_that_of_the_backbone(backbone):
    config = tiny_config(backbone)
    models = [
        model_class(config)
        for model_class in (MoCoV3Model, MoCoV3ForImageClassification, MoCoV3ForPreTraining, MoCoV3Backbone)
    ]
    for model in models:
        inner = model.base_model.backbone
        for flag in (
            "_supports_sdpa",
            "_supports_flash_attn",
            "_supports_flex_attn",
            "_supports_attention_backend",
            "supports_gradient_checkpointing",
        ):
            assert getattr(model, flag) is getattr(inner, flag), flag
    assert models[0]._supports_sdpa is (backbone not in ("resnet", "convnext"))
    assert MoCoV3Model._supports_sdpa is True


def test_unsupported_attention_is_refused():
    config = tiny_config("resnet")
    assert MoCoV3Model(config).config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"MoCoV3Model does not support .*scaled_dot_product_attention"):
        AutoModel.from_config(tiny_config("resnet"), attn_implementation="sdpa")
    assert MoCoV3Model(tiny_config()).config._attn_implementation == "sdpa"


def test_backbone_gives_feature_maps(backbone, tmp_path):
    config = tiny_config(backbone)
    MoCoV3ForPreTraining(config).save_pretrained(tmp_path)
    stages = list(range(len(config.stage_names)))
    model = MoCoV3Backbone.from_pretrained(tmp_path, out_indices=stages)
    maps = model(two_views()[0]).feature_maps
    assert [feature_map.shape[1] for feature_map in maps] == model.channels
    assert all(feature_map.dim() == 4 for feature_map in maps)
    assert isinstance(AutoBackbone.from_config(config), MoCoV3Backbone)


def test_other_image_sizes_and_drop_path():
    model = MoCoV3Model(tiny_config()).eval()
    images = torch.randn(2, 3, 48, 40)
    with pytest.raises(ValueError, match=r"48×40 do not match the model's 32×32"):
        model(images)
    assert model(images, interpolate_pos_encoding=True).last_hidden_state.shape == (2, 1 + 6 * 5, 32)
    rectangular = MoCoV3ViTModel(
        MoCoV3ViTConfig(
            hidden_size=8, num_attention_heads=2, num_hidden_layers=1, image_size=[32, 48], patch_size=[8, 16]
        )
    )
    assert rectangular(torch.randn(2, 3, 32, 48)).last_hidden_state.shape == (2, 1 + 4 * 3, 8)

    config = MoCoV3ViTConfig(**{**VIT, "drop_path_rate": 0.5})
    dropped = MoCoV3ViTModel(config)
    assert [layer.drop_path.rate for layer in dropped.encoder.layer] == [0.0, 0.5]
    views = two_views()[0]
    assert not torch.equal(dropped(views).pooler_output, dropped(views).pooler_output)
    dropped.eval()
    assert torch.equal(dropped(views).pooler_output, dropped(views).pooler_output)


# The name that every transformers of our range knows; later ones deprecate it.
old_name = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")


@old_name
def test_attention_implementations_and_checkpointing_agree():
    views = two_views()
    results = {}
    for name in ("eager", "sdpa", "checkpointing"):
        torch.manual_seed(0)
        config = tiny_config()
        config._attn_implementation = "eager" if name == "eager" else "sdpa"
        model = MoCoV3ForPreTraining(config).double()
        if name == "checkpointing":
            model.gradient_checkpointing_enable()
            assert model.mocov3.backbone.encoder.layer[0].gradient_checkpointing
        output = model(pixel_values=views[0].double(), pixel_values_2=views[1].double())
        output.loss.backward()
        results[name] = (output.loss, model.mocov3.backbone.embeddings.cls_token.grad)
    torch.testing.assert_close(results["eager"], results["sdpa"])
    torch.testing.assert_close(results["sdpa"], results["checkpointing"])
    eager = MoCoV3Model(tiny_config())
    eager.set_attn_implementation("eager")
    attentions = eager(views[0], output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in attentions.attentions] == [(4, 2, 17, 17)] * 2
    assert len(attentions.hidden_states) == 3


@old_name
def test_resnet_refuses_checkpointing():
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        MoCoV3ForPreTraining(tiny_config("resnet")).gradient_checkpointing_enable()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoCoV3ViTConfig(patch_size=0), "patch_size must be at least 1, got 0"),
        (lambda: MoCoV3ViTConfig(image_size=[32, -32]), "image_size must be at least 1, got [32, -32]"),
        (lambda: MoCoV3ViTConfig(num_attention_heads=0), "num_attention_heads must be at least 1, got 0"),
        (lambda: MoCoV3ViTConfig(drop_path_rate=math.nan), "drop_path_rate must be between 0 and 1, got nan"),
        (lambda: MoCoV3ViTConfig(hidden_dropout_prob=-0.1), "hidden_dropout_prob must be between 0 and 1, got -0.1"),
        (lambda: MoCoV3ViTConfig(num_channels="3"), "'num_channels' expected int, got str"),
        (lambda: MoCoV3Config(temperature=math.inf), "temperature must be positive, got inf"),
        (lambda: MoCoV3Config(temperature=math.nan), "temperature must be positive, got nan"),
        (lambda: MoCoV3Config(backbone_config={**VIT, "num_hidden_layers": 10**30}), "must be at most 10000, got 1"),
        (lambda: MoCoV3Config(backbone_config={**VIT, "hidden_size": 0}), "hidden_size of at least 1, got 0"),
        (lambda: MoCoV3Config(hidden_size=384), "hidden_size belongs to the backbone: pass backbone_config="),
        (lambda: MoCoV3Config(temprature=1.0), "no key 'temprature'. Did you mean 'temperature'?"),
        (lambda: MoCoV3ViTConfig(patchsize=8), "Did you mean 'patch_size'"),
        (lambda: MoCoV3ViTConfig(image_size=30, patch_size=8), "divisible by patch_size, got 30 and 8"),
        (lambda: MoCoV3ViTConfig(hidden_size=30, num_attention_heads=4), "multiple of num_attention_heads"),
        (lambda: MoCoV3ViTConfig(stem="convolution"), "stem must be one of"),
        (lambda: MoCoV3ViTConfig(stem="conv", patch_size=8), "patch_size must be 16"),
        (lambda: MoCoV3ViTConfig(position_embedding="sincos"), "position_embedding must be one of"),
        (lambda: MoCoV3Config(temperature=0), "temperature must be positive"),
        (lambda: MoCoV3Config(backbone_config={"hidden_size": 8}), "needs the key 'model_type'"),
        (lambda: MoCoV3Config(backbone_config={"model_type": "resnett"}), "Did you mean 'resnet'"),
        (lambda: MoCoV3Config(num_projector_layers=0), "num_projector_layers must be at least 1"),
    ],
)
def test_configurations_refuse_mistakes(build, message):
    with pytest.raises((ValueError, StrictDataclassError), match=re.escape(message)):
        build()


def test_validation_runs_on_saving(tmp_path):
    config = tiny_config()
    config.temperature = -1.0
    with pytest.raises(StrictDataclassError, match=r"validate_architecture[\s\S]*must be positive, got -1"):
        config.save_pretrained(tmp_path)


@pytest.mark.slow
def test_importing_a_room_registers_nothing_twice_and_needs_no_network(tmp_path):
    """A fresh process: import, build by name through the Auto classes, save, load."""
    code = f"""
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import mocov3_hf
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining
config = AutoConfig.for_model("mocov3", backbone_config={VIT!r}, projection_dim=8, head_hidden_size=8)
model = AutoModelForPreTraining.from_config(config)
model.save_pretrained({str(tmp_path)!r})
assert type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__ == "MoCoV3Model"
vit = AutoConfig.for_model("mocov3_vit", hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
assert type(AutoModel.from_config(vit)).__name__ == "MoCoV3ViTModel"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
