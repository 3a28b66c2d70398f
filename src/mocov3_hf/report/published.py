"""Published figures that a folder may be held against: those of its own recipe, or else of its backbone."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import ResNetConfig

from ..model.configuration_mocov3 import MoCoV3Config, MoCoV3ViTConfig, build_backbone_config
from ..published_sizes import VIT_SIZES
from ..recipe import RecipeError, load_recipe
from .folder import ModelFolder


# What makes two runs one recipe: what is learned from and how long, not on how many devices or in which folder.
RECIPE_KEYS = (
    "projection_dim",
    "head_hidden_size",
    "num_projector_layers",
    "num_predictor_layers",
    "predictor_final_norm",
    "head_batch_norm",
    "temperature",
    "image_size",
    "crop_scale",
    "optimizer",
    "base_learning_rate",
    "learning_rate",
    "weight_decay",
    "train_batch_size",
    "per_device_train_batch_size",
    "num_train_epochs",
    "warmup_epochs",
    "max_steps",
    "momentum",
    "momentum_schedule",
)
# What makes two bodies one backbone: those of the same shapes whose outputs differ included (number of heads).
BODY_KEYS = (
    "model_type",
    "stem",
    "hidden_size",
    "hidden_sizes",
    "depths",
    "layer_type",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
)
TASK_STAGES = {"linear": "linear", "linear_cached": "linear", "finetune": "finetuned"}


@dataclass(frozen=True)
class Published:
    """
    One published accuracy, ImageNet-1k top-1.

    Attributes:
        name: of the published model.
        source: who published it.
        stage: "linear" or "finetuned".
        pretraining: name and epochs of the pre-training before it, in words.
        top1: between 0 and 1.
        same_recipe: whether the folder is of this very recipe; else only its backbone is the same.
    """

    name: str
    source: str
    stage: str
    pretraining: str
    top1: float
    same_recipe: bool


def published_figures(folder: ModelFolder) -> list[Published]:
    """Accuracies of classifiers with the folder's backbone, those of its own recipe first; none for others."""
    architecture = architecture_of(folder.backbone)
    if architecture is None:
        return []
    models = zoo()["models"]
    own = own_names(folder)
    found = []
    for name, row in models.items():
        if row["architecture"] != architecture or "top1" not in row:
            continue
        pretrained = row["pretrained"]
        found.append(
            Published(
                name=name,
                source=zoo()["sources"][row["source"]]["title"],
                stage=row["stage"],
                pretraining=f"{models[pretrained]['epochs']} epochs",
                top1=round(row["top1"] / 100, 6),
                same_recipe=name in own or pretrained in own,
            )
        )
    return sorted(found, key=lambda figure: not figure.same_recipe)


def figure_for(result: dict[str, Any], metric: str, figures: list[Published], kind: str) -> Published | None:
    """The published figure that a metric of a result stands beside: top-1 of the same protocol and recipe."""
    stage = TASK_STAGES.get(result.get("task"))
    if stage is None and result.get("task") == "evaluate" and kind == "classifier":
        stages = {figure.stage for figure in figures if figure.same_recipe}
        stage = stages.pop() if len(stages) == 1 else None
    if stage is None or metric not in ("top1", f"{result['task']}_top1", "linear_top1", "finetune_top1"):
        return None
    recipe = (result.get("settings") or {}).get("recipe")
    matching = [figure for figure in figures if figure.stage == stage]
    named = [figure for figure in matching if figure.name == recipe]
    own = [figure for figure in matching if figure.same_recipe]
    return next(iter(named or own), None)


def own_names(folder: ModelFolder) -> set[str]:
    """Names in the zoo of what the folder was made from or by."""
    names = {folder.conversion.get("source", {}).get("name")} if folder.conversion else set()
    names |= {(result.get("settings") or {}).get("recipe") for result in folder.results}
    if folder.recipe and folder.state.get("global_batch_size", 4096) == 4096:
        names |= {name for name, row in zoo()["models"].items() if row["stage"] == "pretrained" and _ran(folder, name)}
    return names - {None}


def _ran(folder: ModelFolder, name: str) -> bool:
    try:
        published = load_recipe(name).to_dict()
    except RecipeError:  # a published model whose recipe does not come with the package
        return False
    same = all(folder.recipe.get(key) == published[key] for key in RECIPE_KEYS)
    return same and body_of(folder.recipe.get("backbone_config") or {}) == body_of(published["backbone_config"])


def architecture_of(backbone: dict[str, Any]) -> str | None:
    """The zoo's name of a backbone; None for one that nothing was published for."""
    body = body_of(backbone)
    known = {name: MoCoV3ViTConfig(**sizes) for name, sizes in VIT_SIZES.items()} | {"resnet50": ResNetConfig()}
    return next((name for name, config in known.items() if body and body_of(config.to_dict()) == body), None)


def body_of(backbone: dict[str, Any]) -> dict[str, Any] | None:
    """The keys of a backbone's configuration that decide what it is, with defaults; None where it cannot be built."""
    try:
        config = build_backbone_config({key: value for key, value in backbone.items() if key in BODY_KEYS})
    except (ValueError, StrictDataclassError):
        return None
    if isinstance(config, MoCoV3Config):
        return None
    values = config.to_dict()
    return {key: values.get(key) for key in BODY_KEYS}


@cache
def zoo() -> dict[str, Any]:
    """The table of published models, read as a file: rooms of one floor do not import each other."""
    path = files("mocov3_hf").joinpath("interop", "zoo.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))
