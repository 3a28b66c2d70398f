"""`dense.load_backbone`: the features of the encoder inside a dense model, from every kind of folder, or one line."""

import pytest
import torch
from transformers import AutoConfig, DetrForObjectDetection, ResNetModel, UperNetForSemanticSegmentation

from mocov3_hf import (
    MoCoV3Backbone,
    MoCoV3Config,
    MoCoV3ForImageClassification,
    MoCoV3ForPreTraining,
    MoCoV3Model,
    dense,
)
from mocov3_hf.model import MoCoV3ViTModel
from tests.dense.matrix import ALL_MAPS, DECODERS, RESNET, VIT, detr, upernet, vitmatte
from tests.factories import randomize


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def save(folder, kind="pretraining", backbone=VIT):
    config = MoCoV3Config(backbone_config=dict(backbone), head_hidden_size=16, projection_dim=8)
    if kind == "bare":
        is_vit = backbone["model_type"] == "mocov3_vit"
        model = (MoCoV3ViTModel if is_vit else ResNetModel)(config.backbone_config)
    else:
        classes = {"pretraining": MoCoV3ForPreTraining, "encoder": MoCoV3Model}
        model = classes.get(kind, MoCoV3ForImageClassification)(config)
    randomize(model)
    model.save_pretrained(folder)
    return str(folder)


def build(folder, **options):
    config = dense.backbone_config(folder, **ALL_MAPS, **options)
    torch.manual_seed(0)
    return UperNetForSemanticSegmentation(upernet(config, [])).eval()


@pytest.mark.parametrize("kind", ["pretraining", "encoder", "classifier", "bare"])
@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_features_are_those_of_the_encoder(kind, backbone, tmp_path, capsys):
    folder = save(tmp_path, kind, backbone)
    model = build(folder)
    head = {name: value.clone() for name, value in model.decode_head.state_dict().items()}
    loaded = dense.load_backbone(model, folder)
    assert loaded is model.backbone
    what = {"encoder": "encoder", "bare": "encoder"}.get(kind, kind)
    assert f"weights of {folder!r} ({what}, {backbone['model_type']})" in capsys.readouterr().out
    assert all(torch.equal(value, head[name]) for name, value in model.decode_head.state_dict().items())
    encoder = MoCoV3Model(MoCoV3Config(backbone_config=dict(backbone)))
    if kind == "bare":
        encoder.backbone = type(encoder.backbone).from_pretrained(folder)
    else:
        encoder = MoCoV3Model.from_pretrained(folder)
    with torch.no_grad():
        expected = encoder.eval()(IMAGES).last_hidden_state
        found = loaded(IMAGES).feature_maps[-1]
    if expected.dim() == 3:
        expected = expected[:, 1:].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(found, expected)
    source = encoder.backbone.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in loaded.mocov3.backbone.state_dict().items())


def test_frozen_batch_norms_get_the_statistics(tmp_path):
    folder = save(tmp_path, backbone=RESNET)
    model = DetrForObjectDetection(detr(dense.backbone_config(folder), [])).eval()
    backbone = dense.load_backbone(model, folder)
    assert "Frozen" in type(backbone.mocov3.backbone.embedder.embedder.normalization).__name__
    with torch.no_grad():
        expected = MoCoV3Model.from_pretrained(folder).eval()(IMAGES).last_hidden_state
        torch.testing.assert_close(backbone(IMAGES).feature_maps[-1], expected)


def test_frozen_parameters_stay_frozen_and_a_fixed_table_initializes_a_learned_one(tmp_path):
    folder = save(tmp_path)
    model = build(folder)
    backbone = dense.load_backbone(model, folder)
    embeddings = backbone.mocov3.backbone.embeddings
    assert not embeddings.position_embeddings.requires_grad
    config = dense.backbone_config(folder)
    config.backbone_config.position_embedding, config.backbone_config.freeze_patch_projection = "learned", False
    trained = dense.load_backbone(MoCoV3Backbone(config), folder).mocov3.backbone.embeddings
    assert trained.position_embeddings.requires_grad
    assert torch.equal(trained.position_embeddings, embeddings.position_embeddings)


def test_added_channels_start_at_zero(tmp_path, capsys):
    folder = save(tmp_path)
    config = dense.backbone_config(folder)
    config.backbone_config.num_channels = 4
    vit_matte = DECODERS["ViTMatte"].model_class
    with pytest.raises(ValueError, match=r"are frozen: set backbone_config\.backbone_config\.freeze_patch_projection"):
        dense.load_backbone(vit_matte(vitmatte(config, [32])), folder)
    config.backbone_config.freeze_patch_projection = False
    model = vit_matte(vitmatte(config, [32])).eval()
    backbone = dense.load_backbone(model, folder)
    assert "zeros for the channels after the first 3" in capsys.readouterr().out
    trimap = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        expected = MoCoV3Model.from_pretrained(folder).eval()(IMAGES).last_hidden_state[:, 1:]
        found = backbone(torch.cat([IMAGES, trimap], dim=1)).feature_maps[-1]
    torch.testing.assert_close(found.flatten(2).mT, expected)


def test_published_names_and_wrapped_encoders_have_a_configuration(tmp_path):
    folder = save(tmp_path, "bare", RESNET)
    config = dense.backbone_config(folder, out_indices=[2, 3])
    assert isinstance(config, MoCoV3Config)
    assert config.out_features == ["stage2", "stage3"]
    assert config.backbone_config.to_dict() == AutoConfig.from_pretrained(folder).to_dict()


def test_mistakes_are_named_in_one_line(tmp_path):
    folder = save(tmp_path / "vit")
    wide = save(tmp_path / "wide", backbone=VIT | {"hidden_size": 48})
    large = save(tmp_path / "large", backbone=VIT | {"image_size": 96})
    resnet = save(tmp_path / "resnet", backbone=RESNET)
    model = build(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for other, difference in (
        (wide, "hidden_size is 48 there and 32 here"),
        (large, "image_size is 96 there and 64 here"),
        (resnet, "model_type is 'resnet' there and 'mocov3_vit' here"),
    ):
        with pytest.raises(ValueError, match=f"{difference}; build the model with mocov3_hf.dense.backbone_config"):
            dense.load_backbone(model, other)
    with pytest.raises(ValueError, match="did you mean"):
        dense.load_backbone(model, tmp_path / "vti")
    with pytest.raises(ValueError, match="ResNetModel has no MoCoV3Backbone, expected one: build it with"):
        dense.load_backbone(ResNetModel(AutoConfig.for_model(**RESNET)), folder)
    with pytest.raises(ValueError, match="has no option 'out_feature': use add_fpn, apply_layernorm"):
        dense.backbone_config(folder, out_feature=["stage1"])
    with pytest.raises(ValueError, match="upernet takes maps, not tokens"):
        dense.load_backbone(build(folder, reshape_hidden_states=False), folder)
    (tmp_path / "wide" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be loaded"):
        dense.load_backbone(build(wide), wide)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
