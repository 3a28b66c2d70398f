"""Any vision model as the backbone: width, pooling, frozen parameters, and what is refused."""

import json

import pytest
import torch
from transformers import AutoModel, ViTMAEConfig, ViTMAEModel

from benchmarks import backbones as sweep
from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ForPreTraining, MoCoV3Model
from mocov3_hf.loading import enable_gradient_checkpointing, load_encoder, pooled_features
from mocov3_hf.model.backbone_mocov3 import Pooling, UnsupportedBackboneError
from tests.factories import VIT


RESULTS = json.loads(sweep.RESULTS.read_text(encoding="utf-8"))
CONFIGS = {result["model_type"]: result["config"] for result in RESULTS["models"] if result["works"]}
REPRESENTATIVE = (
    *("convnext", "dinov2_with_registers", "efficientnet", "hgnet_v2", "ijepa", "mobilenet_v2", "mobilevit", "pvt"),
    *("segformer", "swin", "textnet", "timm_wrapper", "vit_mae"),
)
SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VITS = {
    "vit": {"model_type": "vit", **SMALL, "intermediate_size": 32},
    "deit": {"model_type": "deit", **SMALL, "intermediate_size": 32},
    "dinov2_with_registers": {"model_type": "dinov2_with_registers", **SMALL, "num_register_tokens": 3},
    "yolos": {"model_type": "yolos", **SMALL, "image_size": [32, 32], "num_detection_tokens": 5},
    "ijepa": {"model_type": "ijepa", **SMALL, "intermediate_size": 32},
    "vit_mae": {"model_type": "vit_mae", **SMALL, "intermediate_size": 32, "decoder_hidden_size": 16},
    "timm": {
        "model_type": "timm_wrapper",
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 32, "depth": 2},
    },
}
# Tokens before and after those of the 16 patches, 4 of timm's.
TOKENS = {"vit": (1, 0), "deit": (2, 0), "dinov2_with_registers": (4, 0), "yolos": (1, 5), "ijepa": (0, 0)}
TOKENS |= {"vit_mae": (1, 0), "timm": (1, 0)}


def encoder_of(backbone, **options):
    torch.manual_seed(0)
    return MoCoV3Model(MoCoV3Config(backbone_config=dict(backbone), **options)).eval()


def images(size=32, batch=2, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


# The short form of benchmarks/backbones.py


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_representative_backbones_train(model_type):
    config = MoCoV3Config(backbone_config=CONFIGS[model_type], head_hidden_size=16, projection_dim=8)
    torch.manual_seed(0)
    model = MoCoV3ForPreTraining(config)
    views = torch.stack([images(size=to_size(config)), images(size=to_size(config)).flip(0)])
    first = sweep.train_step(model, views)  # every trainable parameter has a gradient
    assert sweep.train_step(model, views) != first
    assert model(views[0]).pooler_output.shape == (2, model.mocov3.pooled_width) == (2, config.hidden_size)
    assert MoCoV3Config.from_dict(config.to_dict()).hidden_size == config.hidden_size


def to_size(config):
    size = config.image_size or 64
    return size if isinstance(size, int) else size[0]


@pytest.mark.parametrize("model_type", ["vit_mae", "timm_wrapper"])
def test_loading_gives_the_same_features(model_type):
    config = MoCoV3Config(backbone_config=CONFIGS[model_type], head_hidden_size=16, projection_dim=8)
    sweep.check_saving(MoCoV3ForPreTraining(config), images(size=to_size(config)))


def test_the_tables_are_those_of_the_results():
    assert sweep.PAGE.read_text(encoding="utf-8") == sweep.with_tables(RESULTS), (
        "run python -m benchmarks.backbones --table"
    )
    assert {*REPRESENTATIVE} <= CONFIGS.keys()
    assert f"on {len(CONFIGS)} model types of" in (sweep.ROOT / "README.md").read_text(encoding="utf-8")


# Width


@pytest.mark.parametrize("model_type", ["convnext", "dinov2_with_registers", "mobilevit", "timm_wrapper"])
def test_measuring_changes_neither_weights_nor_random_numbers(model_type, monkeypatch):
    measured = encoder_of(CONFIGS[model_type])
    after = torch.rand(3)
    monkeypatch.setattr(Pooling, "measure", lambda pooling, backbone: setattr(pooling, "width", 1))
    plain = encoder_of(CONFIGS[model_type])
    assert torch.equal(torch.rand(3), after)
    for name, value in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value), name


def test_known_backbones_are_not_measured(monkeypatch):
    monkeypatch.setattr(Pooling, "measured", lambda *_: pytest.fail("a forward pass at construction"))
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    assert [encoder_of(backbone).pooled_width for backbone in (VIT, resnet)] == [32, 16]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_width_in_any_context(context):
    with context():
        model = MoCoV3Model(MoCoV3Config(backbone_config={**VITS["vit"], "hidden_size": 48}, pooling="cls"))
    assert model.pooled_width == 48
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "backbone.pooler.dense.weight",
        "backbone.pooler.dense.bias",
    ]


def test_forward_passes_that_read_values():
    """Idefics3's vision transformer asks for the values of its attention mask: it is tried with data."""
    before = torch.random.get_rng_state()
    config = MoCoV3Config(backbone_config=CONFIGS["idefics3_vision"])
    with torch.device("meta"):
        model = MoCoV3Model(config)
    assert model.pooling.reads_values
    assert model.pooled_width == config.backbone_config.hidden_size
    assert torch.equal(torch.random.get_rng_state(), before)


# Pooling


@pytest.mark.parametrize("kind", VITS)
def test_the_mean_is_that_of_the_patches(kind):
    encoder = encoder_of(VITS[kind], pooling="mean")
    with torch.no_grad():
        outputs = encoder(images())
    tokens, (before, after) = outputs.last_hidden_state, TOKENS[kind]
    patches = tokens[:, before : tokens.shape[1] - after]
    assert patches.shape[1] == (4 if kind == "timm" else 16)
    torch.testing.assert_close(outputs.pooler_output, patches.mean(dim=1))


@pytest.mark.parametrize("kind", VITS)
def test_cls_is_the_first_token(kind):
    if kind == "ijepa":
        with pytest.raises(
            UnsupportedBackboneError, match=r"'ijepa' .*has no CLS token; use pooling 'mean' or 'auto'"
        ):
            encoder_of(VITS[kind], pooling="cls")
        return
    encoder = encoder_of(VITS[kind], pooling="cls")
    with torch.no_grad():
        outputs = encoder(images())
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])


@pytest.mark.parametrize(("kind", "source"), [("vit", "pooler_output"), ("vit_mae", "cls"), ("ijepa", "mean")])
def test_auto_prefers_the_own_pooler(kind, source):
    encoder = encoder_of(VITS[kind])
    with torch.no_grad():
        outputs = encoder.backbone(images())
        pooled = encoder(images()).pooler_output if kind != "vit_mae" else None
    assert encoder.pooling.source(outputs) == source
    if kind == "vit":
        assert torch.equal(pooled, outputs.pooler_output)
    elif kind == "ijepa":
        torch.testing.assert_close(pooled, outputs.last_hidden_state.mean(dim=1))


def test_pooling_of_the_own_vit():
    features = {}
    for pooling in ("auto", "cls", "mean"):
        model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=VIT, head_hidden_size=16, pooling=pooling))
        init_from_seed(model)
        outputs = model.eval().mocov3(images())
        features[pooling] = outputs.pooler_output
        # The pre-training forward, which by default computes the CLS token alone.
        torch.testing.assert_close(model(images(), images()).pooler_output, features[pooling])
    assert torch.equal(features["auto"], features["cls"])
    torch.testing.assert_close(features["mean"], outputs.last_hidden_state[:, 1:].mean(dim=1))


def init_from_seed(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)


def test_feature_maps_with_the_channels_last():
    pool = Pooling(ViTMAEModel(ViTMAEConfig(**SMALL, intermediate_size=32)), "mean")
    maps = torch.randn(2, 4, 4, 6)
    torch.testing.assert_close(pool({"last_hidden_state": maps}), maps.mean(dim=(1, 2)))
    maps = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(pool({"last_hidden_state": maps}), maps.mean(dim=(2, 3)))


def test_configurations_of_earlier_versions_load():
    values = MoCoV3Config(backbone_config=VIT).to_dict()
    assert values.pop("pooling") == "auto"
    assert MoCoV3Config.from_dict(values).pooling == "auto"
    with pytest.raises(Exception, match="pooling must be one of"):
        MoCoV3Config(backbone_config=VIT, pooling="max")


def test_parameters_without_gradient_stay_frozen(tmp_path):
    config = MoCoV3Config(backbone_config=VITS["vit"], pooling="mean", num_labels=2)
    MoCoV3ForImageClassification(config).save_pretrained(tmp_path)
    for model in (MoCoV3ForImageClassification.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert {name.rpartition("backbone.")[2] for name in frozen} == {"pooler.dense.weight", "pooler.dense.bias"}


# Masking


def test_vit_mae_sees_the_whole_image(tmp_path):
    config = ViTMAEConfig(**{key: value for key, value in VITS["vit_mae"].items() if key != "model_type"})
    assert config.mask_ratio == 0.75
    encoder = encoder_of(VITS["vit_mae"])
    assert (encoder.config.backbone_config.mask_ratio, config.mask_ratio) == (0.0, 0.75)
    state = torch.random.get_rng_state()
    pixels = images(batch=1).requires_grad_()
    outputs = encoder(pixels)
    outputs.pooler_output.square().sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (pixels.grad.abs().amax(dim=1)[0] > 0).float().mean() > 0.99  # no patch is hidden
    assert not encoder.backbone.embeddings.position_embeddings.requires_grad
    # Patches stay in order: a change of the last patch changes the last token most.
    changed = pixels.detach().clone()
    changed[..., -8:, -8:] += 1
    difference = (encoder(changed).last_hidden_state - outputs.last_hidden_state).abs().sum(dim=-1)[0]
    assert difference.argmax() == len(difference) - 1

    ViTMAEModel(config).save_pretrained(tmp_path)
    native = load_encoder(tmp_path)
    assert torch.equal(pooled_features(native, images()), pooled_features(native, images()))


# Refusals


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"model_type": "bert"}, "'bert' cannot be the backbone: it takes input_ids, not images"),
        ({"model_type": "blip-2"}, "it needs text (input_ids) besides the images"),
        (
            {"model_type": "timesformer", "num_hidden_layers": 1},
            "it takes videos or pairs of images, not single images",
        ),
        (
            {"model_type": "mgp-str", "num_hidden_layers": 1},
            "it returns no features of the image; docs/backbones.md",
        ),
        (
            {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 64},
            "its output is not one vector for each image",
        ),
    ],
)
def test_other_models_are_refused(backbone, message):
    with pytest.raises(UnsupportedBackboneError) as caught, torch.device("meta"):
        MoCoV3Model(MoCoV3Config(backbone_config=backbone))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpointing_of_timm_models():
    encoder = encoder_of(VITS["timm"])
    enable_gradient_checkpointing(encoder)
    assert encoder.backbone.timm_model.grad_checkpointing
    assert (encoder.config.image_size, encoder.config.num_channels, encoder.config.hidden_size) == (32, 3, 192)
