"""What the cards know of the published models: the zoo's table, read as the data file that it is."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from ..model.configuration_mocov3 import MoCoV3Config, MoCoV3ViTConfig
from ..published_sizes import VIT_SIZES


LIBRARY = "transformers"
PAPER = "https://arxiv.org/abs/2104.02057"
CITATION = """```bibtex
@inproceedings{chen2021mocov3,
  title     = {An Empirical Study of Training Self-Supervised Vision Transformers},
  author    = {Chen, Xinlei and Xie, Saining and He, Kaiming},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021}
}
```"""
ARCHITECTURES = {
    "resnet50": "ResNet-50",
    "vit-small": "ViT-S/16 with 12 heads",
    "vit-base": "ViT-B/16",
    "vit-large": "ViT-L/16",
}
STAGES = {"pretrained": "pre-trained", "linear": "linear evaluation", "finetuned": "fine-tuned"}
FEATURE_WIDTHS = {"resnet50": 2048, "vit-small": 384, "vit-base": 768, "vit-large": 1024}


@dataclass(frozen=True)
class Published:
    """One row of `zoo.yaml` with its source's, by the file's own field names."""

    name: str
    row: dict[str, Any]
    source: dict[str, Any]

    @property
    def url(self) -> str:
        return self.source["url"] + self.row["path"]

    @property
    def is_classifier(self) -> bool:
        return self.row["stage"] != "pretrained"


@cache
def published_models() -> dict[str, Published]:
    """Every published model by name, in the order of the table."""
    # The file, not the room that owns it: rooms of one floor do not import each other.
    path = files("mocov3_hf").joinpath("interop", "zoo.yaml")
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Published(name, row, table["sources"][row["source"]]) for name, row in table["models"].items()}


def carded_models() -> list[Published]:
    """Those that have a model card: all published with mmpretrain's recipes."""
    return [model for model in published_models().values() if model.row["source"] == "openmmlab"]


def configuration(model: Published) -> MoCoV3Config:
    """The configuration of a published model, for counting its parameters and operations."""
    labels = {"num_labels": 1000} if model.is_classifier else {}
    if model.row["architecture"] == "resnet50":
        return MoCoV3Config(
            backbone_config={"model_type": "resnet"},
            num_projector_layers=2,
            predictor_final_norm=False,
            temperature=1.0,
            **labels,
        )
    return MoCoV3Config(backbone_config=MoCoV3ViTConfig(**VIT_SIZES[model.row["architecture"]]), **labels)
