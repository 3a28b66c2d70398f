"""Classifiers: put together from an encoder and a head, loaded whole, and held against the classes of a data set."""

import copy
import os
from collections.abc import Sequence

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..data.labelled import LabelledImages
from ..model.configuration_mocov3 import MoCoV3Config, MoCoV3ViTConfig
from ..model.modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model, freeze_unused_parameters
from .encoder import base_encoder, check_model_path, load_any, load_encoder, quiet_transformers, size_options
from .linear import LinearClassifier


# Legend: B batch, H W image, C classes.

MATCH_CLASSES = ("name", "number")


def build_classifier(
    model: MoCoV3Model, linear: LinearClassifier, class_names: list[str]
) -> MoCoV3ForImageClassification:
    """
    The model that `pipeline("image-classification")` runs: `linear` on the pooled vector of a copy of `model`.

    Raises:
        ValueError: a classifier whose sizes are not those of the encoder and the names.
    """
    num_classes, width = linear.weight.shape
    if width != model.pooled_width or num_classes != len(class_names):
        raise ValueError(
            f"the linear classifier takes {width} features for {num_classes} classes, the encoder gives"
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


def load_classifier(model: str | os.PathLike) -> PreTrainedModel:
    """A saved classifier, in eval mode, on the CPU, complete: no weight is drawn at random.

    Args:
        model: folder or Hub id that `AutoModelForImageClassification` loads.

    Raises:
        ValueError: no such folder or repository, no classifier, no head (a folder of pre-training or of a bare
            encoder), weights that are missing or of other shapes than `config.json` says.
    """
    name = check_model_path(model)
    with quiet_transformers():
        classifier, info = load_any(name, AutoModelForImageClassification, ignore_mismatched_sizes=True)
    missing = sorted(info["missing_keys"])
    body = f"{classifier.base_model_prefix}."
    if missing and not any(key.startswith(body) for key in missing):
        raise ValueError(
            f"{name!r} is an encoder without a head ({', '.join(missing[:2])} missing): train one with"
            " scripts/linear_probe.py, or evaluate the encoder with scripts/knn.py"
        )
    if missing:
        raise ValueError(
            f"{name!r} lacks {len(missing)} weights of {type(classifier).__name__} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): it was saved from another model than its config.json says"
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise ValueError(
            f"{name!r} holds {key} of shape {tuple(found)}, its config.json ({classifier.config.num_labels} classes)"
            f" expects {tuple(expected)}: restore the config.json it was saved with"
        )
    return classifier.eval()


def load_with_new_head(
    model: str | os.PathLike, class_names: Sequence[str], *, std: float = 0.01, seed: int = 0
) -> PreTrainedModel:
    """A classifier with the body of a model and a head that knows nothing yet: weights normal, biases 0.

    Args:
        model: folder or Hub id of pre-training, of a bare encoder, or of a classifier (its head is drawn anew). An
            encoder whose architecture has no classifier becomes the backbone of a `MoCoV3ForImageClassification`.
        class_names: by label.
        std: deviation of the head's weights (0.01: linear protocol).
        seed: of the draw.

    Raises:
        ValueError: as `load_encoder`; an architecture that has no head for classification apart from its body.
    """
    name = check_model_path(model)
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: number for number, name in enumerate(class_names)},
    }
    if _has_classifier(name):
        with quiet_transformers():
            classifier, info = load_any(name, AutoModelForImageClassification, ignore_mismatched_sizes=True, **labels)
    else:
        encoder = load_encoder(name)
        config = MoCoV3Config(backbone_config=encoder.config.to_dict(), **labels)
        classifier, info = MoCoV3ForImageClassification(config), {"missing_keys": (), "mismatched_keys": ()}
        classifier.mocov3.backbone.load_state_dict(encoder.state_dict())
    body = f"{classifier.base_model_prefix}."
    wrong = sorted({*info["missing_keys"], *(str(found[0]) for found in info["mismatched_keys"])})
    wrong = [key for key in wrong if key.startswith(body)]
    if wrong:
        raise ValueError(
            f"{name!r} lacks {len(wrong)} weights of {type(classifier).__name__} ({', '.join(wrong[:3])}"
            f"{', ...' if len(wrong) > 3 else ''}): it was saved from another model than its config.json says"
        )
    head = head_parameters(classifier)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.values():
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(drawn if parameter.ndim > 1 else torch.zeros_like(drawn))
    # Saved in half precision or not: SGD needs all digits of the head.
    return classifier.float()


def with_fresh_body(classifier: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The same network with a body of fresh weights, as its pre-training would have started; the head stays."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(classifier)(classifier.config)
    head = head_parameters(classifier)
    with torch.no_grad():
        for name, parameter in head_parameters(fresh).items():
            parameter.copy_(head[name])
    return fresh


def unfrozen(classifier: PreTrainedModel, drop_path_rate: float | None = None) -> PreTrainedModel:
    """The same classifier with everything trainable: MoCo v3's ViT gets a trained patch projection and position table.

    Args:
        classifier: its weights are taken over.
        drop_path_rate: stochastic depth of the last block, in [0, 1); None for the configuration's own.

    Raises:
        ValueError: a rate out of range, or for an architecture without stochastic depth.
    """
    config = copy.deepcopy(classifier.config)
    body = getattr(config, "backbone_config", None) or config
    if body.model_type == MoCoV3ViTConfig.model_type:
        body.freeze_patch_projection, body.position_embedding = False, "learned"
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must lie in [0, 1), got {drop_path_rate}")
    if hasattr(body, "drop_path_rate") and drop_path_rate is not None:
        body.drop_path_rate = drop_path_rate
    elif drop_path_rate:
        raise ValueError(f"a {body.model_type} has no stochastic depth: pass --drop_path_rate 0")
    trained = type(classifier)(config)
    trained.load_state_dict(classifier.state_dict())
    trained.requires_grad_(True)
    freeze_unused_parameters(trained)
    return trained


def _has_classifier(name: str) -> bool:
    try:
        return type(AutoConfig.from_pretrained(name)) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    # Not a configuration: loading the model reports what is wrong with it.
    except (OSError, ValueError, KeyError, StrictDataclassError):
        return True


def head_parameters(classifier: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters outside the body, by name: a linear layer. ValueError where there is another head, or none."""
    body = f"{classifier.base_model_prefix}."
    head = {name: value for name, value in classifier.named_parameters() if not name.startswith(body)}
    if sorted(value.ndim for value in head.values()) != [1, 2]:
        raise ValueError(
            f"{type(classifier).__name__} has no linear head apart from its body (it has"
            f" {', '.join(head) or 'nothing'}): convert the encoder to one of this package, or probe it with --cached"
        )
    return head


def class_logits(classifier: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits (B, C) float32 of images (B, 3, H, W), in the sizes that the encoder accepts."""
    options = size_options(base_encoder(classifier), pixel_values)
    return classifier(pixel_values=pixel_values, **options).logits.float()


def saved_class_names(config: PreTrainedConfig) -> list[str] | None:
    """Names of the classes in order, None where a configuration has only the numbered ones of transformers."""
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def match_classes(
    images: LabelledImages, config: PreTrainedConfig, by: str = "name"
) -> tuple[LabelledImages, str, list[str] | None]:
    """The split with its labels numbered as the outputs of a classifier are.

    Names decide: a class of the data set is the class of the checkpoint with the same name, wherever it stands in
    either; a data set may hold fewer classes than the checkpoint. Where one of the two has no names, and with
    `by="number"`, numbers are taken as they are, and must then agree in their number.

    Args:
        images: the labelled split.
        config: of the classifier: its `id2label` counts.
        by: "name" or "number".

    Returns:
        The split; how the classes were matched, in words; the names of the classifier's classes, or None.

    Raises:
        ValueError: a class of the data set that the checkpoint does not know, names that occur twice, another number
            of classes, labels beyond the head, another `by`.
    """
    if by not in MATCH_CLASSES:
        raise ValueError(f"match_classes must be one of {', '.join(MATCH_CLASSES)}, got {by!r}")
    names, own = saved_class_names(config), images.class_names
    if by == "name" and names is not None and own is not None and names != own:
        return _matched_by_name(images, names)
    if own is not None and len(own) != config.num_labels:
        raise ValueError(
            f"the data set has {len(own)} classes, the head {config.num_labels}, and there are no names to match"
            " them by: evaluate on the data set that the head was trained for"
        )
    if own is None and images.labels.max() >= config.num_labels:
        beyond = images.labels >= config.num_labels
        first = int(beyond.argmax())
        raise ValueError(
            f"{beyond.sum()} labels lie beyond the head's {config.num_labels} classes, 0..{config.num_labels - 1}"
            f" (first in row {first}: {images.labels[first]}): was the head trained for another data set?"
        )
    if names is not None and names == own:
        return images, "by name", names
    return images, "by number", names or own


def _matched_by_name(images: LabelledImages, names: list[str]) -> tuple[LabelledImages, str, list[str]]:
    own = images.class_names
    for whose, listed in (("checkpoint", names), ("data set", own)):
        twice = _first_duplicate(listed)
        if twice is not None:
            raise ValueError(
                f"the {whose} has the class {twice!r} twice, so that names do not tell classes apart: if both number"
                " their classes alike, add --match_classes number"
            )
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [name for name in own if name not in numbers]
    if unknown:
        some, others = (", ".join(map(repr, listed[:3])) for listed in (unknown, names))
        raise ValueError(
            f"{len(unknown)} of {len(own)} classes of the data set are not among the {len(names)} of the checkpoint"
            f" (such as {some}; the checkpoint has {others}, ...): evaluate on the data set that"
            " the head was trained for, or add --match_classes number if both number them alike"
        )
    labels = np.asarray([numbers[name] for name in own], dtype=np.int64)[images.labels]
    how = "by name, in another order" if len(own) == len(names) else f"by name, {len(own)} of {len(names)}"
    return LabelledImages(images.source, labels, names), how, names


def _first_duplicate(names: Sequence[str]) -> str | None:
    seen = set()
    return next((name for name in names if name in seen or seen.add(name)), None)
