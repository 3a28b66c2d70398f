"""Groups and schedules of fine-tuning against closed forms."""

import math

import pytest
import torch
from transformers import ResNetConfig, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.optimization import get_scheduler

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification
from mocov3_hf.evaluation.classifier import unfrozen
from mocov3_hf.evaluation.finetune import (
    FinetuneOptions,
    fine_tuning_groups,
    parameter_depths,
    schedule_options,
    warn_of_young_average,
)
from tests.factories import VIT


def vit(**values):
    return unfrozen(MoCoV3ForImageClassification(MoCoV3Config(backbone_config=VIT | values, num_labels=3)))


def resnet():
    body = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    return MoCoV3ForImageClassification(MoCoV3Config(backbone_config=body.to_dict(), num_labels=3))


def groups_by_name(classifier, groups):
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_groups_of_a_vit_are_those_of_the_closed_form(layer_decay):
    """Two blocks: the head and the last norm have the full rate, block 1 decay, block 0 decay², embeddings decay³."""
    classifier = vit()
    groups = groups_by_name(classifier, fine_tuning_groups(classifier, 0.5, 0.05, layer_decay))
    assert groups.keys() == dict(classifier.named_parameters()).keys(), "everything is trained, once"
    powers = {
        "classifier.weight": 0,
        "mocov3.backbone.layernorm.weight": 0,
        "mocov3.backbone.encoder.layer.1.mlp.fc1.weight": 1,
        "mocov3.backbone.encoder.layer.0.attention.q_proj.bias": 2,
        "mocov3.backbone.embeddings.cls_token": 3,
        "mocov3.backbone.embeddings.position_embeddings": 3,
        "mocov3.backbone.embeddings.patch_embeddings.projection.weight": 3,
    }
    for name, power in powers.items():
        assert groups[name]["lr"] == pytest.approx(0.5 * layer_decay**power), name
    for name, parameter in classifier.named_parameters():
        kept = parameter.ndim <= 1 or "cls_token" in name or "position" in name
        assert groups[name]["weight_decay"] == (0.0 if kept else 0.05), name
    first = fine_tuning_groups(classifier, 0.5, 0.05, layer_decay)[0]
    assert first["lr"] == 0.5, "the first group's rate is what the log shows"


def test_depths_of_stages_stems_and_native_models():
    depths = parameter_depths(resnet())
    assert depths["mocov3.backbone.embedder.embedder.convolution.weight"] == 0
    assert depths["mocov3.backbone.encoder.stages.0.layers.0.layer.0.convolution.weight"] == 1
    assert depths["mocov3.backbone.encoder.stages.1.layers.1.layer.0.convolution.weight"] == 2
    assert depths["classifier.bias"] == 3
    stem = parameter_depths(vit(stem="conv", patch_size=16))
    assert stem["mocov3.backbone.embeddings.patch_embeddings.layers.3.convolution.weight"] == 0
    native = parameter_depths(
        ViTForImageClassification(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=16,
                image_size=32,
                patch_size=16,
            )
        )
    )
    assert set(native.values()) == {0, 1, 2, 3, 4}
    assert {depth for name, depth in native.items() if "classifier" in name} == {4}


def test_what_cannot_be_decayed_by_layer_is_refused():
    with pytest.raises(ValueError, match=r"layer_decay must be above 0 and at most 1, got 1\.5"):
        fine_tuning_groups(vit(), 1.0, 0.0, 1.5)
    one_layer = vit(num_hidden_layers=1)
    with pytest.raises(ValueError, match="MoCoV3ForImageClassification has no list of layers"):
        fine_tuning_groups(one_layer, 1.0, 0.0, 0.5)


@pytest.mark.parametrize(("max_steps", "total", "warmup"), [(None, 60, 10), (30, 30, 5)])
def test_schedule_is_the_closed_form(max_steps, total, warmup):
    """From a thousandth of the rate in a line, then half a cosine that ends at the floor with the last step."""
    given = FinetuneOptions(
        model="m", dataset_name="d", num_train_epochs=6, warmup_epochs=1.0, min_learning_rate=1e-5, max_steps=max_steps
    )
    options = schedule_options(given, 5e-4, max_steps or 60)
    assert options["warmup_steps"] == warmup
    layer = torch.nn.Linear(1, 1)
    groups = [{"params": [layer.weight], "lr": 5e-4}, {"params": [layer.bias], "lr": 5e-4 * 0.65}]
    optimizer = torch.optim.SGD(groups)
    scheduler = get_scheduler(
        options["lr_scheduler_type"],
        optimizer,
        TrainingArguments("o", warmup_steps=options["warmup_steps"], use_cpu=True).get_warmup_steps(total),
        total,
        options["lr_scheduler_kwargs"],
    )
    for step in range(total):
        if step < warmup:
            expected = 5e-4 * (1e-3 + (1 - 1e-3) * step / (warmup - 1))
        else:
            share = (step - warmup + 1) / (total - warmup)
            expected = 1e-5 + (5e-4 - 1e-5) * 0.5 * (1 + math.cos(math.pi * share))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9), step
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.65 * expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_a_floor_above_the_rate_is_refused():
    with pytest.raises(ValueError, match="min_learning_rate 1e-05 exceeds the peak learning rate 1e-06"):
        schedule_options(FinetuneOptions(model="m", dataset_name="d"), 1e-6, 100)


def test_an_ema_that_is_too_slow_for_the_run_is_reported():
    with pytest.warns(UserWarning, match="after 100 steps .* consist of 100 % initial weights: .* such as 0.9,"):
        warn_of_young_average(0.99996, 100)
    warn_of_young_average(0.99996, 100_000)
    warn_of_young_average(0.0, 100)
