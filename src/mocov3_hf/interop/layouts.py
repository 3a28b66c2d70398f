"""
The names of a MoCo v3 model's tensors in the checkpoints of other codebases: one mapping for both directions.

A layout maps native module names to foreign ones; the names of the tensors in a module (`weight`, `running_mean`, ...)
are the same everywhere. Only the fused `qkv` of a ViT block, (3·D, D), is split: into q, k and v.
"""

from collections.abc import Iterable
from dataclasses import dataclass


# Legend of dimensions: D width of the ViT.

LISTED_KEYS = 20  # an error message names this many keys of a kind and counts the rest

DIALECTS = {
    # Names of the parts of a ViT: block, first norm, second norm, MLP layers, final norm, patch projection.
    "timm": ("blocks", "norm1", "norm2", "mlp.fc1", "mlp.fc2", "norm", "patch_embed.proj"),
    "mmpretrain": ("layers", "ln1", "ln2", "ffn.layers.0.0", "ffn.layers.1", "ln1", "patch_embed.projection"),
}


class ConversionError(ValueError):
    """A file, state dict or model that cannot be converted or exported; the message says why and what to do."""


def brief(text: str, limit: int = 100) -> str:
    """A name for a message, however long and whatever characters it has: one short line."""
    end = "..." if len(text) > limit else ""
    text = text[:limit]
    return (text if text.isprintable() else repr(text)[1:-1]) + end


def enumerate_keys(keys: list[str], limit: int = LISTED_KEYS) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(keys) - limit
    return ", ".join(map(brief, keys[:limit])) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class Layout:
    """
    One naming scheme of checkpoints.

    Attributes:
        name: A key of `LAYOUTS`.
        dialect: A key of `DIALECTS`: the names of the parts of a ViT.
        base: Prefix of the encoder.
        momentum: Prefix of the momentum encoder; None where the file holds one encoder.
        heads: Style of projector and predictor: `"official"`, `"solo-learn"` or `"mmpretrain"`; None without them.
        ignored: Entries of the layout that no model needs; those that end in a dot are prefixes.
    """

    name: str
    dialect: str
    base: str = ""
    momentum: str | None = None
    heads: str | None = None
    ignored: tuple[str, ...] = ()

    def ignores(self, key: str) -> bool:
        return any(key.startswith(name) if name.endswith(".") else key == name for name in self.ignored)

    def projectors(self, backbone: str) -> dict[str, str]:
        """Foreign module names of the heads by native ones, for a backbone `"vit"` or `"resnet"`."""
        if self.heads == "official":
            head = "head" if backbone == "vit" else "fc"
            return {
                "projector": f"{self.base}{head}",
                "predictor": "predictor",
                "momentum_encoder.projector": f"{self.momentum}{head}",
            }
        if self.heads == "solo-learn":
            return {
                "projector": "projector",
                "predictor": "predictor",
                "momentum_encoder.projector": "momentum_projector",
            }
        if self.heads == "mmpretrain":
            return {
                "projector": "neck",
                "predictor": "head.predictor",
                "momentum_encoder.projector": "momentum_encoder.module.1",
            }
        return {}

    def classifiers(self, backbone: str) -> tuple[str, ...]:
        """Possible foreign module names of the classification head, the usual one first."""
        if self.heads is not None:
            return ()
        if self.dialect == "mmpretrain":
            return ("head.layers.head", "head.fc") if backbone == "vit" else ("head.fc",)
        if self.name == "solo_learn":
            return ("classifier",)
        return ("head",) if backbone == "vit" else ("fc",)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("official_pretraining", "timm", "base_encoder.", "momentum_encoder.", "official"),
        Layout(
            "mmpretrain_pretraining",
            "mmpretrain",
            "backbone.",
            "momentum_encoder.module.0.",
            "mmpretrain",
            ignored=("momentum_encoder.steps", "data_preprocessor.mean", "data_preprocessor.std"),
        ),
        Layout(
            "mmpretrain_classification",
            "mmpretrain",
            "backbone.",
            ignored=("data_preprocessor.mean", "data_preprocessor.std"),
        ),
        # With the linear classifier that solo-learn trains on the side.
        Layout(
            "solo_learn_pretraining",
            "timm",
            "backbone.",
            "momentum_backbone.",
            "solo-learn",
            ignored=("classifier.", "momentum_classifier."),
        ),
        Layout("solo_learn", "timm", "backbone."),
        # Files with the momentum encoder only, whose encoder is converted.
        Layout(
            "official_momentum",
            "timm",
            "momentum_encoder.",
            ignored=("momentum_encoder.head.", "momentum_encoder.fc."),
        ),
        Layout(
            "mmpretrain_momentum",
            "mmpretrain",
            "momentum_encoder.module.0.",
            ignored=("momentum_encoder.module.1.", "momentum_encoder.steps", "data_preprocessor."),
        ),
        Layout("solo_learn_momentum", "timm", "momentum_backbone.", ignored=("momentum_projector.",)),
        # The official linear probes and DeiT files, and backbones of timm and torchvision.
        Layout("timm", "timm"),
    )
}


def recognize_layout(keys: Iterable[str]) -> tuple[Layout, str] | None:
    """The layout of a set of keys and its backbone, `"vit"` or `"resnet"`; None for an unknown layout."""
    keys = set(keys)

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if has("base_encoder."):
        name = "official_pretraining"
    elif has("momentum_backbone."):
        name = "solo_learn_pretraining" if has("backbone.") else "solo_learn_momentum"
    elif has("backbone."):
        if has("neck.", "momentum_encoder.", "head.predictor."):
            name = "mmpretrain_pretraining"
        else:
            name = "solo_learn" if has("backbone.blocks.", "classifier.") else "mmpretrain_classification"
    elif has("momentum_encoder."):
        name = "mmpretrain_momentum" if has("momentum_encoder.module.0.") else "official_momentum"
    else:
        name = "timm"
    layout = LAYOUTS[name]
    if f"{layout.base}cls_token" in keys or f"{layout.base}patch_embed.proj.weight" in keys:
        return layout, "vit"
    if f"{layout.base}conv1.weight" in keys:
        return layout, "resnet"
    return None


def vit_module_names(dialect: str, num_layers: int, stem: str) -> dict[str, str]:
    """Foreign names by native ones of the modules and single parameters of a ViT."""
    block, norm1, norm2, fc1, fc2, norm, patches = DIALECTS[dialect]
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "layernorm": norm,
    }
    if stem == "conv":  # a Sequential: four times convolution, batch norm, ReLU; then the last convolution
        for index in range(4):
            layer = f"embeddings.patch_embeddings.layers.{index}"
            names[f"{layer}.convolution"] = f"{patches}.{3 * index}"
            names[f"{layer}.normalization"] = f"{patches}.{3 * index + 1}"
        names["embeddings.patch_embeddings.projection"] = f"{patches}.12"
    else:
        names["embeddings.patch_embeddings.projection"] = patches
    for index in range(num_layers):
        native, foreign = f"encoder.layer.{index}", f"{block}.{index}"
        names |= {f"{native}.attention.{part}_proj": f"{foreign}.attn.qkv" for part in "qkv"}
        names |= {
            f"{native}.attention.o_proj": f"{foreign}.attn.proj",
            f"{native}.norm1": f"{foreign}.{norm1}",
            f"{native}.norm2": f"{foreign}.{norm2}",
            f"{native}.mlp.fc1": f"{foreign}.{fc1}",
            f"{native}.mlp.fc2": f"{foreign}.{fc2}",
        }
    return names


def resnet_module_names(depths: list[int], layer_type: str) -> dict[str, str]:
    """Foreign names by native ones of a ResNet's modules: torchvision's names, which timm and mmpretrain share."""
    names = {"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"}
    for stage, depth in enumerate(depths):
        for block in range(depth):
            native, foreign = f"encoder.stages.{stage}.layers.{block}", f"layer{stage + 1}.{block}"
            names[f"{native}.shortcut.convolution"] = f"{foreign}.downsample.0"
            names[f"{native}.shortcut.normalization"] = f"{foreign}.downsample.1"
            for index in range(3 if layer_type == "bottleneck" else 2):
                names[f"{native}.layer.{index}.convolution"] = f"{foreign}.conv{index + 1}"
                names[f"{native}.layer.{index}.normalization"] = f"{foreign}.bn{index + 1}"
    return names


def head_module_names(style: str, native: str, foreign: str, num_layers: int) -> dict[str, str]:
    """Foreign names by native ones of the layers of a projector or predictor."""
    names = {}
    for index in range(num_layers):
        # official and solo-learn: a Sequential of linear, batch norm, ReLU
        linear, norm = (f"fc{index}", f"bn{index}") if style == "mmpretrain" else (3 * index, 3 * index + 1)
        names[f"{native}.layers.{index}.dense"] = f"{foreign}.{linear}"
        names[f"{native}.layers.{index}.norm"] = f"{foreign}.{norm}"
    return names


def foreign_keys(native_keys: Iterable[str], names: dict[str, str]) -> dict[str, list[str]]:
    """
    Native keys by foreign key: one each, or q, k and v in order where the foreign tensor fuses them.

    Raises:
        KeyError: A native key that `names` does not cover.
    """
    keys: dict[str, list[str]] = {}
    for key in native_keys:
        module, _, tensor = key.rpartition(".")
        foreign = names[key] if key in names else f"{names[module]}.{tensor}"
        keys.setdefault(foreign, []).append(key)
    # In the order of `names`: the keys of a file are sorted, with k before q.
    order = {native: index for index, native in enumerate(names)}
    for natives in keys.values():
        natives.sort(key=lambda key: order.get(key.rpartition(".")[0], 0))
    return keys
