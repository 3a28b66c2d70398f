"""Classifiers to train: an encoder with a new linear head."""

import copy
import os
from collections.abc import Sequence

import torch
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification, PreTrainedModel

from ..loading import from_pretrained, load_config, load_encoder, refuse_missing, resolve_model
from ..model.configuration_mocov3 import MoCoV3Config
from ..model.configuration_mocov3_vit import MoCoV3ViTConfig
from ..model.modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model, freeze_unused_parameters
from ..problem_types import SINGLE_LABEL, STANDARDIZED, SUPERCLASSES, THRESHOLDS
from .linear import LinearClassifier


def load_with_new_head(
    model: str | os.PathLike,
    class_names: Sequence[str],
    *,
    std: float = 0.01,
    seed: int = 0,
    problem_type: str = SINGLE_LABEL,
) -> PreTrainedModel:
    """
    A classifier of the encoder of a model and a new linear head: weights normal, biases 0.

    Args:
        model: As `resolve_model`: of pre-training, a bare encoder, or a classifier (its head is replaced). An encoder
            whose architecture has no classifier becomes the backbone of a `MoCoV3ForImageClassification`.
        class_names: By label.
        std: Standard deviation of the head's weights (0.01 in the linear protocol).
        seed: Of the head's weights.
        problem_type: Saved as `config.problem_type`, unless it is that of a single label, the default of transformers.

    Raises:
        ValueError: As `load_encoder`; an architecture whose classification head is not a separate linear layer.
    """
    name = resolve_model(model)
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: number for number, name in enumerate(class_names)},
        "problem_type": None if problem_type == SINGLE_LABEL else problem_type,
    }
    if type(load_config(name)) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        classifier, info = from_pretrained(
            AutoModelForImageClassification, name, output_loading_info=True, ignore_mismatched_sizes=True, **labels
        )
        wrong = {*info["missing_keys"], *(str(found[0]) for found in info["mismatched_keys"])}
        backbone = f"{classifier.base_model_prefix}."
        refuse_missing(name, classifier, sorted(key for key in wrong if key.startswith(backbone)))
    else:
        encoder = load_encoder(name)
        classifier = MoCoV3ForImageClassification(MoCoV3Config(backbone_config=encoder.config.to_dict(), **labels))
        classifier.mocov3.backbone.load_state_dict(encoder.state_dict())
    for name in (THRESHOLDS, SUPERCLASSES, STANDARDIZED):  # of the classes of an earlier head
        classifier.config.__dict__.pop(name, None)
    head = head_parameters(classifier)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.values():
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(drawn if parameter.ndim > 1 else torch.zeros_like(drawn))
    # Also for weights saved in half precision: SGD needs float32 weights of the head.
    return classifier.float()


def with_fresh_backbone(classifier: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The same network with newly initialized weights, as its pre-training would have started; the head is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(classifier)(classifier.config)
    head = head_parameters(classifier)
    with torch.no_grad():
        for name, parameter in head_parameters(fresh).items():
            parameter.copy_(head[name])
    return fresh


def unfrozen(classifier: PreTrainedModel, drop_path_rate: float | None = None) -> PreTrainedModel:
    """
    The same classifier with all weights trainable, also the patch projection and position embeddings of MoCo v3's ViT.

    Args:
        classifier: Its weights are copied.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); None for that of the configuration.

    Raises:
        ValueError: A rate out of range, or for an architecture without stochastic depth.
    """
    config = copy.deepcopy(classifier.config)
    backbone = getattr(config, "backbone_config", None) or config
    if backbone.model_type == MoCoV3ViTConfig.model_type:
        backbone.freeze_patch_projection, backbone.position_embedding = False, "learned"
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise ValueError(f"--drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
    if hasattr(backbone, "drop_path_rate") and drop_path_rate is not None:
        backbone.drop_path_rate = drop_path_rate
    elif drop_path_rate:
        raise ValueError(f"a {backbone.model_type} model has no stochastic depth: pass --drop_path_rate 0")
    trained = type(classifier)(config)
    trained.load_state_dict(classifier.state_dict())
    trained.requires_grad_(True)
    freeze_unused_parameters(trained)
    return trained


def head_parameters(classifier: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters of the linear head, by name; ValueError for any other head."""
    backbone = f"{classifier.base_model_prefix}."
    head = {name: value for name, value in classifier.named_parameters() if not name.startswith(backbone)}
    if sorted(value.ndim for value in head.values()) != [1, 2]:
        raise ValueError(
            f"{type(classifier).__name__} has no linear head apart from its backbone (found"
            f" {', '.join(head) or 'nothing'}): pass --cached to mocov3 linear-probe, which needs only features"
        )
    return head


def build_classifier(
    model: MoCoV3Model, linear: LinearClassifier, class_names: list[str]
) -> MoCoV3ForImageClassification:
    """
    The model for `pipeline("image-classification")`: `linear` on the pooled features of a copy of `model`.

    Raises:
        ValueError: The sizes of classifier, encoder and names differ.
    """
    num_classes, width = linear.weight.shape
    if width != model.pooled_width or num_classes != len(class_names):
        raise ValueError(
            f"the linear classifier takes {width} features for {num_classes} classes, but the encoder returns"
            f" {model.pooled_width} and there are {len(class_names)} names"
        )
    config = MoCoV3Config.from_dict(model.config.to_dict())
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}
    classifier = MoCoV3ForImageClassification(config)
    classifier.mocov3.load_state_dict(model.state_dict())
    with torch.no_grad():
        classifier.classifier.weight.copy_(linear.weight)
        classifier.classifier.bias.copy_(linear.bias)
    return classifier.eval()
