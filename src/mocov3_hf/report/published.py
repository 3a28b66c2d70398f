"""Published accuracies to compare a folder with: those of its own recipe, and others of its backbone."""

from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import ResNetConfig

from ..model.configuration_mocov3 import MoCoV3Config, build_backbone_config
from ..model.configuration_mocov3_vit import MoCoV3ViTConfig
from ..recipe_files import RECIPES
from ..run_folder import RunFolder, read_recipe
from ..zoo import VIT_SIZES, ZooEntry, load_zoo
from .curves import number
from .parts import mapping


# Options of pre-training that shape the weights, with the values of recipes that do not name them.
SHAPING_OPTIONS = (
    {"image_size": 224, "crop_scale": [0.08, 1.0], "crop_ratio": [3 / 4, 4 / 3], "flip_probability": 0.5}
    | {"jitter_probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    | {"grayscale_probability": 0.2, "blur_sigma": [0.1, 2.0], "blur_probability_1": 1.0, "blur_probability_2": 0.1}
    | {"solarize_probability_1": 0.0, "solarize_probability_2": 0.2}
    | {"projection_dim": 256, "head_hidden_size": 4096, "num_projector_layers": 3, "num_predictor_layers": 2}
    | {
        "pooling": "auto",
        "predictor_final_norm": True,
        "head_batch_norm": True,
        "zero_init_residual": True,
        "temperature": 0.2,
    }
    | {"optimizer": "adamw", "base_learning_rate": 1.5e-4, "learning_rate": None, "weight_decay": 0.1}
    | {"exclude_norms_and_biases": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    | {"lars_momentum": 0.9, "trust_coefficient": 0.001, "trust_clip": False, "max_grad_norm": None}
    | {"train_batch_size": 4096, "per_device_train_batch_size": None}
    | {"num_train_epochs": 300, "warmup_epochs": 40, "max_steps": None, "ema_decay": 0.99, "ema_schedule": "cosine"}
)
# Keys that identify a backbone: sizes, and what changes the output at equal sizes, such as the number of heads.
BACKBONE_KEYS = (
    *("model_type", "stem", "hidden_size", "hidden_sizes", "depths", "layer_type", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size", "image_size", "patch_size", "mlp_norm"),
)
MOST_LAYERS = 10_000
TASK_STAGES = {"linear": "linear", "linear_cached": "linear", "finetune": "finetuned"}


class Reference(NamedTuple):
    """An entry of the zoo with an ImageNet-1k accuracy, and whether it was pre-trained with the recipe of the folder,
    not just with the same backbone."""

    entry: ZooEntry
    is_same_recipe: bool


def find_references(folder: RunFolder) -> list[Reference]:
    """Published classifiers with the backbone of the folder, those of its own recipe first."""
    architecture, own = architecture_of(folder.backbone), own_names(folder)
    found = [entry for entry in load_zoo().values() if entry.architecture == architecture and entry.top1 is not None]
    references = [Reference(entry, entry.name in own or entry.pretrained in own) for entry in found]
    return sorted(references, key=lambda reference: not reference.is_same_recipe)


def reference_for(result: dict[str, Any], metric: str, references: list[Reference], kind: str) -> Reference | None:
    """The published counterpart of a measured metric: top-1 of the same protocol and recipe."""
    stage = TASK_STAGES.get(result.get("task"))
    if stage is None and result.get("task") == "evaluate" and kind == "classifier":
        stages = {reference.entry.stage for reference in references if reference.is_same_recipe}
        stage = stages.pop() if len(stages) == 1 else None
    if stage is None or metric not in ("top1", f"{result['task']}_top1", "linear_top1", "finetune_top1"):
        return None
    recipe = mapping(result.get("settings")).get("recipe")
    matching = [reference for reference in references if reference.entry.stage == stage]
    named = [reference for reference in matching if reference.entry.name == recipe]
    return next(iter(named + [reference for reference in matching if reference.is_same_recipe]), None)


def own_names(folder: RunFolder) -> set[str]:
    """Names in the zoo of the checkpoint that the folder was converted from and of the recipes that it was made by."""
    found = [mapping(folder.conversion.get("source")).get("name")]
    found += [mapping(result.get("settings")).get("recipe") for result in folder.results]
    names = {name for name in found if isinstance(name, str)}
    if folder.recipe and folder.state.get("global_batch_size", 4096) == 4096:
        names |= {name for name, entry in load_zoo().items() if entry.stage == "pretrained" and follows(folder, name)}
    return names


def follows(folder: RunFolder, name: str) -> bool:
    """Whether the folder was trained with a published recipe."""
    published = read_recipe(RECIPES / f"{name}.yaml", [])
    if not published:  # a published model whose recipe is not in the package
        return False
    own = folder.recipe
    is_same = all(own.get(key, usual) == published.get(key, usual) for key, usual in SHAPING_OPTIONS.items())
    return is_same and identity(own.get("backbone_config")) == identity(published["backbone_config"])


def architecture_of(backbone: dict[str, Any]) -> str | None:
    """Name of a backbone in the zoo; None for one without published models."""
    own = identity(backbone)
    known = {name: MoCoV3ViTConfig(**sizes) for name, sizes in VIT_SIZES.items()} | {"resnet50": ResNetConfig()}
    return next((name for name, config in known.items() if own and identity(config.to_dict()) == own), None)


def identity(backbone: Any) -> dict[str, Any] | None:
    """The `BACKBONE_KEYS` of a backbone configuration with defaults filled in; None if the configuration is not
    valid."""
    if not isinstance(backbone, dict):
        return None
    if not number(backbone.get("num_hidden_layers", 1)) <= MOST_LAYERS:  # some configurations list them
        return None
    try:
        config = build_backbone_config({key: value for key, value in backbone.items() if key in BACKBONE_KEYS})
    except (ValueError, TypeError, StrictDataclassError):
        return None
    values = config.to_dict()
    return None if isinstance(config, MoCoV3Config) else {key: values.get(key) for key in BACKBONE_KEYS}
