"""Tiny checkpoints of every layout, written down here by themselves rather than by the code under test."""

import re
from pathlib import Path

import pytest
import torch

from tests.fixtures.fill import fill, filled_state_dict


FIXTURES = Path(__file__).parent.parent / "fixtures"
OVERRIDES = {"vit": {"num_attention_heads": 2}, "resnet": {"image_size": 64}}
IMAGE_SIZES = {"vit": 32, "resnet": 64}
WIDTHS = {"vit": 32, "resnet": 2048}

# The official names of a part and mmpretrain's, as its own code names them.
TO_MMPRETRAIN = {
    "vit": [
        (r"patch_embed\.proj\.", "patch_embed.projection."),
        (r"^blocks\.", "layers."),
        (r"\.norm1\.", ".ln1."),
        (r"\.norm2\.", ".ln2."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
        (r"^norm\.", "ln1."),
    ],
    "resnet": [],
}
HEAD_LAYERS = {"0": "fc0", "1": "bn0", "3": "fc1", "4": "bn1", "6": "fc2", "7": "bn2"}


def official(body):
    """The tiny official checkpoint of which the reference outputs were computed."""
    return filled_state_dict(FIXTURES / f"official_{body}_tiny.layout.json")


def encoder_of(state_dict, body):
    """The base encoder alone, without a head, as `convert_to_deit` of the official code leaves it."""
    head = "head." if body == "vit" else "fc."
    names = {key.removeprefix("base_encoder."): value for key, value in state_dict.items()}
    return {k: v for k, v in names.items() if not k.startswith((head, "momentum_encoder.", "predictor."))}


def with_classifier(encoder, name, body, classes=5):
    weight, bias = classifier_values(body, classes)
    return encoder | {f"{name}.weight": weight, f"{name}.bias": bias}


def classifier_values(body, classes=5):
    return fill("classifier.weight", [classes, WIDTHS[body]]), fill("classifier.bias", [classes])


def mmpretrain_name(key, body):
    for pattern, name in TO_MMPRETRAIN[body]:
        key = re.sub(pattern, name, key)
    return key


def mmpretrain_pretraining(body):
    head = "head." if body == "vit" else "fc."
    renamed = {}
    for key, value in official(body).items():
        branch, rest = key.split(".", 1)
        if branch == "predictor":
            layer, tensor = rest.split(".")
            renamed[f"head.predictor.{HEAD_LAYERS[layer]}.{tensor}"] = value
        elif rest.startswith(head):
            layer, tensor = rest.removeprefix(head).split(".")
            place = "neck" if branch == "base_encoder" else "momentum_encoder.module.1"
            renamed[f"{place}.{HEAD_LAYERS[layer]}.{tensor}"] = value
        else:
            place = "backbone" if branch == "base_encoder" else "momentum_encoder.module.0"
            renamed[f"{place}.{mmpretrain_name(rest, body)}"] = value
    renamed["momentum_encoder.steps"] = torch.tensor(7)
    renamed["data_preprocessor.mean"] = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    renamed["data_preprocessor.std"] = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    return renamed


def mmpretrain_classification(body):
    encoder = {f"backbone.{mmpretrain_name(k, body)}": v for k, v in encoder_of(official(body), body).items()}
    return with_classifier(encoder, "head.layers.head" if body == "vit" else "head.fc", body)


def solo_learn(body):
    """The same weights as solo-learn names them, with the linear classifier that it trains on the side."""
    head = {"vit": "head.", "resnet": "fc."}[body]
    places = {
        f"base_encoder.{head}": "projector.",
        f"momentum_encoder.{head}": "momentum_projector.",
        "base_encoder.": "backbone.",
        "momentum_encoder.": "momentum_backbone.",
        "predictor.": "predictor.",
    }
    renamed = {}
    for key, value in official(body).items():
        prefix = next(prefix for prefix in places if key.startswith(prefix))
        renamed[places[prefix] + key.removeprefix(prefix)] = value
    return with_classifier(renamed, "classifier", body)


@pytest.fixture(params=["vit", "resnet"])
def body(request):
    return request.param


@pytest.fixture
def official_file(tmp_path):
    """A pre-training file as the official code saves it."""
    state_dict = {f"module.{key}": value for key, value in official("vit").items()}
    path = tmp_path / "vit-s-300ep.pth.tar"
    torch.save(
        {"epoch": 300, "arch": "vit_small", "state_dict": state_dict, "optimizer": {"state": {0: torch.ones(3)}}}, path
    )
    return path
