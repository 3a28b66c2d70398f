"""A frozen encoder and a linear classifier on its features, as one model."""

import torch

from ..model.configuration_mocov3 import MoCoV3Config
from ..model.modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model
from .linear import LinearClassifier


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
