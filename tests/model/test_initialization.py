"""Initial weights, what stays frozen, and what loading reports about weights that a file lacks."""

import io
import logging
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
)

from mocov3_hf import (
    MoCoV3Config,
    MoCoV3ForImageClassification,
    MoCoV3ForPreTraining,
    MoCoV3Model,
    MoCoV3ViTConfig,
    MoCoV3ViTModel,
)
from tests.factories import VIT
from tests.model.test_models import tiny_config, two_views


def test_initial_values_of_the_vit():
    config = MoCoV3ViTConfig(**{name: value for name, value in VIT.items() if name != "model_type"}, qkv_bias=True)
    torch.manual_seed(0)
    model = MoCoV3ViTModel(config)
    layer = model.encoder.layer[0]
    assert_uniform(layer.attention.q_proj.weight, math.sqrt(6 / (32 + 32)))
    assert_uniform(layer.mlp.fc1.weight, math.sqrt(6 / (32 + 64)))
    assert_uniform(model.embeddings.patch_embeddings.projection.weight, math.sqrt(6 / (3 * 8 * 8 + 32)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
    assert 0 < model.embeddings.cls_token.std() < 2e-6


def assert_uniform(weight, bound):
    """Within the bound, and spread over all of it."""
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.95 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_position_table_is_that_of_the_method():
    model = MoCoV3ViTModel(MoCoV3ViTConfig(hidden_size=8, num_attention_heads=2, image_size=32, patch_size=16))
    table = model.embeddings.position_embeddings[0]
    assert not table[0].any()
    for row in range(2):
        for column in range(2):
            expected = []
            for position in (row, column):
                angles = [position * 10000 ** (-i / 2) for i in range(2)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            torch.testing.assert_close(table[1 + 2 * row + column], torch.tensor(expected))


def test_heads_start_as_torch_starts_them_and_resnet_as_the_identity():
    torch.manual_seed(0)
    model = MoCoV3ForPreTraining(tiny_config("resnet", zero_init_residual=True))
    assert_uniform(model.projector.layers[0].dense.weight, 1 / math.sqrt(16))
    norms = [
        block.layer[-1].normalization.weight
        for stage in model.mocov3.backbone.encoder.stages
        for block in stage.layers
    ]
    assert not any(norm.any() for norm in norms)
    kept = MoCoV3ForPreTraining(tiny_config("resnet", zero_init_residual=False)).mocov3.backbone.encoder
    assert (kept.stages[0].layers[0].layer[-1].normalization.weight == 1).all()


@pytest.mark.parametrize("position_embedding", ["sincos2d", "learned"])
@pytest.mark.parametrize("freeze", [True, False])
def test_freezing_survives_loading(tmp_path, position_embedding, freeze):
    backbone = {**VIT, "position_embedding": position_embedding, "freeze_patch_projection": freeze}
    model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone, projection_dim=16, head_hidden_size=24))
    model.save_pretrained(tmp_path)
    for instance in (model, MoCoV3ForPreTraining.from_pretrained(tmp_path), MoCoV3Model.from_pretrained(tmp_path)):
        embeddings = instance.base_model.backbone.embeddings
        assert embeddings.patch_embeddings.projection.weight.requires_grad is not freeze
        assert embeddings.position_embeddings.requires_grad is (position_embedding == "learned")
        assert embeddings.cls_token.requires_grad
        if hasattr(instance, "momentum_encoder"):
            assert not any(parameter.requires_grad for parameter in instance.momentum_encoder.parameters())


def test_fixed_positions_load_as_the_start_of_learned_ones(tmp_path):
    MoCoV3Model(tiny_config()).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.backbone_config.position_embedding = "learned"
    config.backbone_config.freeze_patch_projection = False
    model, info = MoCoV3ForImageClassification.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    table = model.mocov3.backbone.embeddings.position_embeddings
    torch.testing.assert_close(table.detach(), MoCoV3Model(tiny_config()).backbone.embeddings.position_embeddings)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_classifier_from_pretraining_reports_the_new_classifier_only(tmp_path):
    MoCoV3ForPreTraining(tiny_config()).save_pretrained(tmp_path)
    with report_of_loading() as report:
        model, info = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert info["unexpected_keys"] == set()
    assert "classifier.weight" in report.getvalue()
    assert "projector" not in report.getvalue()
    assert len(report.getvalue().splitlines()) < 12
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.3)
    output = model(two_views()[0], labels=torch.tensor([0, 1, 2, 6]))
    expected = nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2, 6]))
    torch.testing.assert_close(output.loss, expected)


@contextmanager
def report_of_loading():
    """What transformers logs about missing and unexpected keys."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield stream
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize("model_class", [MoCoV3ForPreTraining, MoCoV3ForImageClassification])
def test_whole_models_report_their_own_weights(model_class, tmp_path):
    """The keys that the inner encoder ignores are weights of the models around it: none may be lost silently."""
    model = model_class(tiny_config())
    state_dict = model.state_dict()
    head = "classifier" if model_class is MoCoV3ForImageClassification else "projector.layers.0.dense"
    state_dict[f"{head}.extra"] = torch.zeros(1)
    state_dict["mocov3.backbone.extra"] = torch.zeros(1)
    model.save_pretrained(tmp_path, state_dict=state_dict)
    _, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {f"{head}.extra", "mocov3.backbone.extra"}
    assert info["missing_keys"] == set()
