# Copyright 2026 The mocov3_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Any vision model of transformers as a backbone: how it is built, and how its outputs become one vector per image."""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    MODEL_FOR_MASK_GENERATION_MAPPING,
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_mocov3 import MoCoV3Config
from .configuration_mocov3_vit import MoCoV3ViTConfig, to_pair
from .modeling_mocov3_vit import MoCoV3ViTModel


# Dimensions: B batch, C H W image, h w grid, L tokens, D size of the pooled output.

# Their width is that of their configuration, and every parameter receives a gradient.
KNOWN_BACKBONES = (MoCoV3ViTConfig.model_type, "resnet")
# Learned tokens before and after those of the patches, by the last part of their parameters' names.
CLS_TOKENS = ("cls_token", "class_embedding", "cls_register_token")
PREFIX_TOKENS = (*CLS_TOKENS, "distillation_token", "register_tokens")
SUFFIX_TOKENS = ("detection_tokens",)
# Heads that attend to the tokens with a CLS token of their own.
HEADS = re.compile(r"(^|\.)(head|pooler|attn_pool)\.")
# Models that return boxes or masks from the features of a backbone inside them, as DETR and SAM do.
DETECTORS = (
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    MODEL_FOR_MASK_GENERATION_MAPPING,
)
# Pooled vectors that backbones return themselves; `summary` is RADIO's.
OWN_POOLED = ("pooler_output", "summary")
DEFAULT_IMAGE_SIZE = 224
MOST_COPIED = 10**9  # parameters of a backbone that is copied with data
ADVICE = "docs/backbones.md lists the model types that work"
INSIDE = "use the backbone inside it"

# What was measured in this process, by configuration and pooling.
_measured: dict[tuple[str, str], tuple[int, frozenset[str], bool]] = {}


class UnsupportedBackboneError(ValueError):
    """A model that MoCo v3 cannot pre-train."""

    def __init__(self, backbone_config: PreTrainedConfig, reason: str, advice: str = ADVICE):
        super().__init__(f"{backbone_config.model_type!r} cannot be the backbone: {reason}; {advice}")


def backbone_class(backbone_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class of a backbone, or `PreTrainedModel` if transformers has none for it."""
    # By name: remote code can load the file of the configuration twice, and its classes then differ.
    if backbone_config.model_type == MoCoV3ViTConfig.model_type:
        return MoCoV3ViTModel
    found = MODEL_MAPPING.get(type(backbone_config), PreTrainedModel)
    return found[0] if isinstance(found, (list, tuple)) else found


def build_backbone(config: MoCoV3Config) -> PreTrainedModel:
    """
    The model of `config.backbone_config` with freshly initialized weights.

    Raises:
        UnsupportedBackboneError: a model that takes something other than images, or something besides them.
    """
    backbone_config = config.backbone_config
    if backbone_config.model_type == MoCoV3ViTConfig.model_type:
        return MoCoV3ViTModel(backbone_config)
    check_arguments(backbone_config)
    return AutoModel.from_config(backbone_config)


def check_arguments(backbone_config: PreTrainedConfig) -> None:
    """
    Raises:
        UnsupportedBackboneError: there is no such model, or its forward pass needs more than images.
    """
    model_class = backbone_class(backbone_config)
    if model_class is PreTrainedModel:
        raise UnsupportedBackboneError(backbone_config, "AutoModel has no model for it")
    if backbone_config.model_type == "timm_backbone":
        raise UnsupportedBackboneError(backbone_config, "it has feature maps only", "use timm_wrapper")
    first, *others = list(inspect.signature(model_class.forward).parameters.values())[1:]
    if first.name != "pixel_values":
        raise UnsupportedBackboneError(backbone_config, f"it takes {first.name}, not images (pixel_values)")
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in others if p.default is p.empty and p.kind in positional]
    listed = ", ".join(needed)
    if re.search("input_ids|task", listed):
        raise UnsupportedBackboneError(backbone_config, f"it needs text ({listed}) besides the images")
    if re.search("grid|position|shapes", listed):
        raise UnsupportedBackboneError(
            backbone_config, f"it takes patches with their positions ({listed}), not images"
        )
    if needed:
        raise UnsupportedBackboneError(backbone_config, f"it needs {listed} besides the images")


def declared_width(config: PreTrainedConfig) -> int | None:
    """Size `D` of the pooled output as a configuration has it."""
    hidden_sizes = getattr(config, "hidden_sizes", None)
    return hidden_sizes[-1] if hidden_sizes else getattr(config, "hidden_size", None)


def pooled_width(backbone: PreTrainedModel) -> int:
    """
    Size `D` of the tokens or of the last feature map of a built backbone, as its configuration has it.

    Raises:
        ValueError: the configuration of the backbone has no such size.
    """
    timm_model = getattr(backbone, "timm_model", None)
    if timm_model is not None:
        return timm_model.num_features
    width = declared_width(backbone.config)
    if width is None:
        raise ValueError(
            f"the backbone {backbone.config.model_type!r} declares neither hidden_size nor hidden_sizes: use another"
            " backbone"
        )
    return width


class Pooling:
    """
    How the outputs of a backbone become one vector per image.

    Args:
        backbone: Built, on any device.
        kind: `MoCoV3Config.pooling`.

    Attributes:
        width: Size `D` of the vector. Set by `measure`, as the next one.
        unused: Names of the parameters of the backbone that do not contribute to it and receive no gradient.
        reads_values: Whether the forward pass fails for tensors without data.
    """

    width: int
    unused: frozenset[str] = frozenset()
    reads_values: bool = False

    def __init__(self, backbone: PreTrainedModel, kind: str = "auto"):
        self.config, self.kind = backbone.config, kind
        if kind == "cls" and self.config.model_type == MoCoV3ViTConfig.model_type:
            self.kind = "auto"  # its pooler_output is the CLS token
        tokens = {
            (name.rpartition(".")[2], parameter.shape[-2] if parameter.ndim > 1 else 1)
            for name, parameter in backbone.named_parameters()
            if not HEADS.search(name)
        }
        timm_model = getattr(backbone, "timm_model", None)
        self.is_detector = any(type(self.config) in mapping for mapping in DETECTORS)
        self.prefers_mean = kind == "mean" or getattr(self.config, "use_mean_pooling", False)
        self.has_cls = any(name in CLS_TOKENS for name, _ in tokens)
        self.num_prefix = sum(number for name, number in tokens if name in PREFIX_TOKENS)
        self.num_suffix = sum(number for name, number in tokens if name in SUFFIX_TOKENS)
        if timm_model is not None:
            self.num_prefix = getattr(timm_model, "num_prefix_tokens", self.num_prefix)
            self.has_cls = self.num_prefix > 0

    def __call__(self, outputs: Any) -> torch.Tensor:
        """
        The pooled vectors `(B, D)` in the outputs of the backbone.

        Raises:
            UnsupportedBackboneError: there are none.
        """
        source = self.source(outputs)
        if source in OWN_POOLED:
            pooled = outputs[source]
            has_cells = pooled.ndim == 4 and pooled.shape[2:].numel() > 1  # TextNet has 2 x 2
            return pooled.mean(dim=(2, 3)) if has_cells else pooled.flatten(1)
        features = features_of(outputs)
        if source == "cls":
            return outputs.get("cls_token_value", features)[:, 0]  # CvT returns it beside a feature map
        if features.ndim == 4:
            return features.mean(dim=(1, 2) if is_channels_last(features) else (2, 3))
        return features[:, self.num_prefix : features.shape[1] - self.num_suffix].mean(dim=1)

    def source(self, outputs: Any) -> str:
        """
        What becomes the pooled vector: `"pooler_output"` or `"summary"` of the backbone, `"cls"` or `"mean"`.

        Raises:
            UnsupportedBackboneError: there is nothing to pool.
        """
        own = next((name for name in OWN_POOLED if outputs.get(name) is not None), None)
        if own is not None and self.kind == "auto":
            return own
        features = features_of(outputs)
        if isinstance(features, (list, tuple)):
            raise self.error("it returns a list of feature maps", "leave features_only out of model_args")
        if own is None and self.is_detector:
            raise self.error("it is a model for detection or segmentation", INSIDE)
        if features is None:
            raise self.error("it returns no features of the image")
        if features.ndim not in (3, 4):
            raise self.error(f"it returns features of shape {tuple(features.shape)}")
        has_cls = self.has_cls and outputs.get("cls_token_value", features).ndim == 3
        if self.kind == "cls" and not has_cls:
            raise self.error("it has no CLS token", "use pooling 'mean' or 'auto'")
        return "cls" if self.kind == "cls" or (has_cls and not self.prefers_mean) else "mean"

    def is_map(self, outputs: Any) -> bool:
        """Whether the outputs are feature maps, not tokens."""
        features = features_of(outputs)
        return isinstance(features, torch.Tensor) and features.ndim == 4

    def describe(self, error: Exception) -> str:
        """Why a forward pass failed, in one line."""
        text = " ".join(str(error).split())
        if re.search(r"\b5D\b|expected 5", text):
            return "it takes videos or pairs of images, not single images"
        if self.is_detector:
            return "it is a model for detection or segmentation"
        return f"its forward pass fails for images alone: {text[:300]}"

    def error(self, reason: str, advice: str = ADVICE) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(self.config, reason, advice)

    def measure(self, backbone: PreTrainedModel) -> None:
        """
        Find the width and the unused parameters by a forward and a backward pass of a copy of the backbone.

        The copy has no data; only if the forward pass reads values, it gets random weights, and is slower. Weights
        and random states of the process stay the same.

        Raises:
            UnsupportedBackboneError: the forward pass fails for images, or there is nothing to pool.
        """
        if self.config.model_type in KNOWN_BACKBONES:
            if self.kind == "cls":
                raise self.error("it has no CLS token", "use pooling 'mean' or 'auto'")
            self.width = pooled_width(backbone)
            return
        key = (self.config.to_json_string(use_diff=False), self.kind)
        if key not in _measured:
            _measured[key] = self.measured(backbone)
        self.width, self.unused, self.reads_values = _measured[key]

    def measured(self, backbone: PreTrainedModel) -> tuple[int, frozenset[str], bool]:
        """`width`, `unused` and `reads_values`, see `measure`."""
        (width, unused), reads_values = self.on_copies(backbone, self.try_out)
        return width, unused, reads_values

    def on_copies(self, backbone: PreTrainedModel, function: Callable[[PreTrainedModel], Any]) -> tuple[Any, bool]:
        """
        The result of a function of a copy of the backbone without data, or if that fails for want of them, with random
        weights; and whether it needed them.

        Raises:
            UnsupportedBackboneError: the function fails.
        """
        num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
        for device in ("meta", "cpu"):
            try:
                with own_settings(device):
                    return function(copy_of(backbone)), device == "cpu"
            except UnsupportedBackboneError:
                raise
            except Exception as error:  # from any model of transformers
                # Errors for want of data name the device, as torch's for `item()` do.
                wants_data = device == "meta" and re.search("meta", str(error), re.IGNORECASE) is not None
                if not wants_data or num_parameters > MOST_COPIED:
                    raise self.error(self.describe(error), INSIDE if self.is_detector else ADVICE) from error
        raise AssertionError

    def try_out(self, backbone: PreTrainedModel) -> tuple[int, frozenset[str]]:
        """Width and unused parameters of a backbone on the default device."""
        dtype = next(backbone.parameters()).dtype
        pixel_values = torch.zeros(2, *input_shape(backbone.config), dtype=dtype)
        outputs = backbone(pixel_values, return_dict=True, **masking_options(backbone, pixel_values))
        if not hasattr(outputs, "get"):
            raise self.error("it returns no features of the image")
        pooled = self(outputs)
        if pooled.ndim != 2 or len(pooled) != len(pixel_values):
            own = self.source(outputs) in OWN_POOLED
            raise self.error(
                f"its {self.source(outputs) if own else 'output'} is not one vector for each image",
                "use pooling 'mean'" if own else ADVICE,
            )
        self.check_tokens(outputs, pixel_values)
        parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(pooled.sum(), list(parameters.values()), allow_unused=True)
        unused = frozenset(name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None)
        return pooled.shape[1], unused

    def check_tokens(self, outputs: Any, pixel_values: torch.Tensor) -> None:
        """
        Raises:
            UnsupportedBackboneError: tokens to average that are not a grid of patches.
        """
        if self.source(outputs) != "mean":
            return
        features, (height, width) = features_of(outputs), pixel_values.shape[-2:]
        if features.ndim == 3 and height == width:
            num_patches = features.shape[1] - self.num_prefix - self.num_suffix
            if num_patches < 1 or math.isqrt(num_patches) ** 2 != num_patches:
                raise self.error(
                    f"its {features.shape[1]} tokens are not a grid of patches, so that their mean has no meaning",
                    "use pooling 'auto'" if self.kind == "mean" else ADVICE,
                )


def features_of(outputs: Any) -> Any:
    """Tokens or feature map of the last layer; None if there are none."""
    features = outputs.get("last_hidden_state")
    if features is None and outputs.get("feature_maps"):  # of a backbone for detection and segmentation
        return outputs["feature_maps"][-1]
    return features


@contextmanager
def own_settings(device: str) -> Iterator[None]:
    """Gradients, whatever the caller has set, on a default device; random states are restored."""
    with torch.inference_mode(False), torch.enable_grad(), torch.device(device), torch.random.fork_rng(devices=[]):
        yield


def copy_of(backbone: PreTrainedModel) -> PreTrainedModel:
    """The architecture of a backbone with other weights, in evaluation mode, on the default device."""
    config = copy.deepcopy(backbone.config)
    if config._attn_implementation not in (None, "eager", "sdpa"):  # others need a GPU
        config._attn_implementation = "eager"
    return AutoModel.from_config(config).eval()


def input_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """`(C, H, W)` of images that a model takes."""
    arguments = getattr(config, "model_args", None) or {}  # timm
    size = getattr(config, "image_size", None) or arguments.get("img_size") or DEFAULT_IMAGE_SIZE
    channels = getattr(config, "num_channels", None) or arguments.get("in_chans", 3)
    return (channels, *to_pair(size))


def masking_options(backbone: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Arguments of the forward pass without which a backbone hides patches at random, or permutes them as ViT-MAE does
    even at `mask_ratio` 0.
    """
    if backbone.config.model_type != "vit_mae":
        return {}
    patch_size = to_pair(backbone.config.patch_size)
    num_patches = math.prod(size // patch for size, patch in zip(pixel_values.shape[-2:], patch_size, strict=True))
    order = torch.arange(num_patches, device=pixel_values.device)
    return {"noise": order.expand(len(pixel_values), -1)}


def is_channels_last(features: torch.Tensor) -> bool:
    """Whether features of square images are `(B, h, w, D)`, not `(B, D, h, w)`."""
    return features.shape[1] == features.shape[2] != features.shape[3]
