"""The classes under test, with the arguments of tiny models."""

from dataclasses import dataclass, field

from mocov3_hf import (
    MoCoV3Backbone,
    MoCoV3Config,
    MoCoV3ForImageClassification,
    MoCoV3ForPreTraining,
    MoCoV3Model,
    MoCoV3ViTConfig,
    MoCoV3ViTModel,
)


@dataclass
class Case:
    """A configuration class and the model classes that it serves."""

    name: str
    config_class: type
    config_arguments: dict
    models: tuple[type, ...]
    # Attributes that the tests read: sizes of the images and of the model. `seq_length` and `hidden_size` are the last
    # two dimensions of the first hidden state, which are height and width in a convolutional network.
    sizes: dict
    config_attributes: list[str]
    has_attentions: bool = True
    overfit: dict[type, int] = field(default_factory=dict)  # model class to batch size


VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "bottleneck",
}
HEADS = {"projection_dim": 16, "head_hidden_size": 24}
MODELS = (MoCoV3Model, MoCoV3ForImageClassification, MoCoV3ForPreTraining)
IMAGES = {"batch_size": 5, "image_size": 32, "num_channels": 3}
VIT_SIZES = {**IMAGES, "num_hidden_layers": 2, "num_attention_heads": 4, "seq_length": 17, "hidden_size": 32}
RESNET_SIZES = {**IMAGES, "num_hidden_layers": 2, "expected_num_hidden_layers": 5, "seq_length": 8, "hidden_size": 8}
COMMON_ATTRIBUTES = ["hidden_size", "num_attention_heads", "num_hidden_layers"]

CASES = [
    Case(
        name="ViT",
        config_class=MoCoV3Config,
        config_arguments={"backbone_config": {"model_type": "mocov3_vit", **VIT}, **HEADS},
        models=(*MODELS, MoCoV3Backbone),
        sizes=VIT_SIZES,
        config_attributes=["backbone_config", "projection_dim"],
        overfit={MoCoV3ForImageClassification: 2, MoCoV3ForPreTraining: 4},
    ),
    Case(
        name="ResNet",
        config_class=MoCoV3Config,
        config_arguments={"backbone_config": RESNET, "num_projector_layers": 2, "temperature": 1.0, **HEADS},
        models=(*MODELS, MoCoV3Backbone),
        sizes=RESNET_SIZES,
        config_attributes=["backbone_config", "projection_dim"],
        has_attentions=False,
    ),
    Case(
        name="ViTBN",
        config_class=MoCoV3ViTConfig,
        config_arguments={**VIT, "mlp_norm": "batch_norm"},
        models=(MoCoV3ViTModel,),
        sizes=VIT_SIZES,
        config_attributes=COMMON_ATTRIBUTES,
    ),
    Case(
        name="BareViT",
        config_class=MoCoV3ViTConfig,
        config_arguments=VIT,
        models=(MoCoV3ViTModel,),
        sizes=VIT_SIZES,
        config_attributes=COMMON_ATTRIBUTES,
    ),
]
