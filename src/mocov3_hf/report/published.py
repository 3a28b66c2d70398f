"""Published accuracies to compare a folder with: those of its own recipe, and others of its backbone."""

from functools import cache
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml
from transformers import ResNetConfig

from ..model.configuration_mocov3 import MoCoV3Config, MoCoV3ViTConfig, build_backbone_config
from ..published_sizes import VIT_SIZES
from ..recipe import RecipeError, load_recipe
from .folder import ModelFolder


# Options of the model, the views and the optimization that do not change what is learned.
NEUTRAL_OPTIONS = {"backbone_config", "model_name_or_path", "gradient_cache_chunk_size"}
# Keys that identify a backbone: sizes, and what changes the output at equal sizes, such as the number of heads.
BACKBONE_KEYS = (
    *("model_type", "stem", "hidden_size", "hidden_sizes", "depths", "layer_type", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size", "image_size", "patch_size"),
)
TASK_STAGES = {"linear": "linear", "linear_cached": "linear", "finetune": "finetuned"}


class Reference(NamedTuple):
    """An entry of the zoo with an ImageNet-1k accuracy, and whether it was pre-trained with the recipe of the folder,
    not just with the same backbone."""

    entry: SimpleNamespace
    is_same_recipe: bool


def find_references(folder: ModelFolder) -> list[Reference]:
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
    recipe = (result.get("settings") or {}).get("recipe")
    matching = [reference for reference in references if reference.entry.stage == stage]
    named = [reference for reference in matching if reference.entry.name == recipe]
    return next(iter(named + [reference for reference in matching if reference.is_same_recipe]), None)


def own_names(folder: ModelFolder) -> set[str]:
    """Names in the zoo of the checkpoint that the folder was converted from and of the recipes that it was made by."""
    names = {folder.conversion.get("source", {}).get("name")}
    names |= {(result.get("settings") or {}).get("recipe") for result in folder.results}
    if folder.recipe and folder.state.get("global_batch_size", 4096) == 4096:
        names |= {name for name, entry in load_zoo().items() if entry.stage == "pretrained" and follows(folder, name)}
    return names - {None}


def follows(folder: ModelFolder, name: str) -> bool:
    """Whether the folder was trained with a published recipe."""
    try:
        published = load_recipe(name)
    except RecipeError:  # a published model whose recipe is not in the package
        return False
    options = vars(published.model) | vars(published.views) | vars(published.optimization)
    is_same = all(folder.recipe.get(key) == options[key] for key in options.keys() - NEUTRAL_OPTIONS)
    return is_same and identity(folder.recipe.get("backbone_config") or {}) == identity(options["backbone_config"])


def architecture_of(backbone: dict[str, Any]) -> str | None:
    """Name of a backbone in the zoo; None for one without published models."""
    own = identity(backbone)
    known = {name: MoCoV3ViTConfig(**sizes) for name, sizes in VIT_SIZES.items()} | {"resnet50": ResNetConfig()}
    return next((name for name, config in known.items() if own and identity(config.to_dict()) == own), None)


def identity(backbone: dict[str, Any]) -> dict[str, Any] | None:
    """The `BACKBONE_KEYS` of a backbone configuration with defaults filled in; None if the configuration is not
    valid."""
    try:
        config = build_backbone_config({key: value for key, value in backbone.items() if key in BACKBONE_KEYS})
    except ValueError:
        return None
    values = config.to_dict()
    return None if isinstance(config, MoCoV3Config) else {key: values.get(key) for key in BACKBONE_KEYS}


@cache
def load_zoo() -> dict[str, SimpleNamespace]:
    """The published models by name."""
    table = yaml.safe_load(files("mocov3_hf").joinpath("interop", "zoo.yaml").read_text(encoding="utf-8"))
    zoo = {}
    for name, row in table["models"].items():
        source = table["sources"][row["source"]]["title"]
        zoo[name] = SimpleNamespace(**{"top1": None, "pretrained": None} | row | {"name": name, "source": source})
    return zoo
