"""Export to transformers' own ViT and ResNet classes, which load without this package and without remote code."""

from pathlib import Path

import torch
from transformers import (
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from ..model.configuration_mocov3 import MoCoV3Config
from ..model.modeling_mocov3 import MoCoV3ForImageClassification, MoCoV3Model
from ..reporting import RunError
from .checkpoints import backbone_of
from .layouts import ConversionError


def require_backbone(config: MoCoV3Config, backbone: str, format: str) -> None:
    """
    Raises:
        ConversionError: The format cannot hold the model.
    """
    if backbone_of(config) != backbone:
        raise ConversionError(
            f"--format {format} is for a {backbone} backbone, but this model has a {backbone_of(config)}"
        )
    if backbone == "vit" and config.pooling == "mean":
        raise ConversionError(
            f"--format {format} returns the CLS token, but this model is pooled by the mean of its patches: pass"
            " --format onnx or --format torch_export"
        )
    if backbone == "vit" and config.backbone_config.stem == "conv":
        raise ConversionError(
            f"--format {format} has no convolutional stem: pass --format onnx or --format torch_export"
        )
    if backbone == "vit" and config.backbone_config.mlp_norm == "batch_norm":
        raise ConversionError(
            f"--format {format} has no batch normalization in a ViT (mlp_norm): pass --format onnx or --format"
            " torch_export"
        )


def backbone_state(model: MoCoV3Model | MoCoV3ForImageClassification) -> dict[str, torch.Tensor]:
    """Tensors of the encoder with the backbone's own names."""
    encoder = model.mocov3 if isinstance(model, MoCoV3ForImageClassification) else model
    return dict(encoder.backbone.state_dict())


def write_vit(model: MoCoV3Model | MoCoV3ForImageClassification, processor: BaseImageProcessor, folder: Path) -> tuple:
    """`ViTModel`, whose pooler returns the CLS token unchanged, or `ViTForImageClassification`."""
    require_backbone(model.config, "vit", "vit")
    ours = model.config.backbone_config
    config = ViTConfig(
        hidden_size=ours.hidden_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        intermediate_size=ours.intermediate_size,
        hidden_act=ours.hidden_act,
        layer_norm_eps=ours.layer_norm_eps,  # the default of the class is 1e-12
        image_size=ours.image_size,
        patch_size=ours.patch_size,
        num_channels=ours.num_channels,
        qkv_bias=ours.qkv_bias,
        encoder_stride=ours.patch_size if isinstance(ours.patch_size, int) else ours.patch_size[0],
        pooler_act="linear",  # with the identity as its dense layer: the feature of MoCo v3 is the CLS token itself
    )
    names = {
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.k_proj.": ".attention.attention.key.",
        ".attention.v_proj.": ".attention.attention.value.",
        ".attention.o_proj.": ".attention.output.dense.",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".mlp.fc1.": ".intermediate.dense.",
        ".mlp.fc2.": ".output.dense.",
    }
    state_dict = {}
    for key, value in backbone_state(model).items():
        for ours_name, theirs in names.items():
            key = key.replace(ours_name, theirs)
        state_dict[key] = value
    if isinstance(model, MoCoV3ForImageClassification):
        state_dict = {f"vit.{key}": value for key, value in state_dict.items()}
        state_dict |= {f"classifier.{key}": value for key, value in model.classifier.state_dict().items()}
        return write_folder(ViTForImageClassification, config, state_dict, model, processor, folder)
    state_dict |= {
        "pooler.dense.weight": torch.eye(ours.hidden_size),
        "pooler.dense.bias": torch.zeros(ours.hidden_size),
    }
    return write_folder(ViTModel, config, state_dict, model, processor, folder)


def write_resnet(
    model: MoCoV3Model | MoCoV3ForImageClassification, processor: BaseImageProcessor, folder: Path
) -> tuple:
    """`ResNetModel` or `ResNetForImageClassification`: the backbone is already one."""
    require_backbone(model.config, "resnet", "resnet")
    config = ResNetConfig.from_dict(model.config.backbone_config.to_dict())
    state_dict = backbone_state(model)
    if isinstance(model, MoCoV3ForImageClassification):
        state_dict = {f"resnet.{key}": value for key, value in state_dict.items()}
        state_dict |= {f"classifier.1.{key}": value for key, value in model.classifier.state_dict().items()}
        return write_folder(ResNetForImageClassification, config, state_dict, model, processor, folder)
    return write_folder(ResNetModel, config, state_dict, model, processor, folder)


def write_folder(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state_dict: dict[str, torch.Tensor],
    model: MoCoV3Model | MoCoV3ForImageClassification,
    processor: BaseImageProcessor,
    folder: Path,
) -> tuple:
    """Save and load back; return what runs the loaded model, and the line of Python that loads it."""
    config.id2label, config.label2id = model.config.id2label, model.config.label2id
    native = model_class.from_pretrained(None, config=config, state_dict=state_dict)
    native.save_pretrained(folder)
    processor.save_pretrained(folder)
    loaded, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        raise RunError(f"the written {model_class.__name__} does not load back: {problems}")
    loaded.eval()

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        outputs = loaded(pixel_values)
        return outputs.logits if "logits" in outputs else outputs.pooler_output.flatten(1)

    return run, f"{model_class.__name__}.from_pretrained({str(folder)!r})"
