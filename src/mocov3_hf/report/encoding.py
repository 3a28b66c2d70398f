"""What a model computes on images: features, patch features, attention and logits.

Legend: n images, B batch, H W image, h w grid of patches or last feature map, L tokens, D width, C classes.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.utils import logging

from ..model.modeling_mocov3 import token_grid
from ..processing import build_image_processor
from .folder import ModelFolder, ReportError
from .samples import Samples


# Longer side of the images in the page, in pixels.
VIEW_SIZE = 160


@dataclass(frozen=True)
class Seen:
    """
    Attributes:
        views: n images uint8 (H, W, 3), as the model sees them, without the normalization.
        features: (n, D) float32.
        logits: (n, C) float32, None for an encoder.
    """

    views: list[np.ndarray]
    features: torch.Tensor
    logits: torch.Tensor | None


class Viewer:
    """
    Runs the model of a folder on images.

    Raises:
        ReportError: weights that cannot be loaded or are incomplete.
    """

    def __init__(self, folder: ModelFolder):
        auto_class = AutoModelForImageClassification if folder.kind == "classifier" else AutoModel
        self.model, self.has_pooler = load_complete(folder.path, auto_class)
        self.encoder = self.model.base_model
        self.backbone = getattr(self.encoder, "backbone", self.encoder)
        self.is_classifier = folder.kind == "classifier"
        self.processor = load_processor(folder.path, self.backbone.config)

    def preprocess(self, samples: Samples, indices: range) -> torch.Tensor:
        """Some images of a sample as `pixel_values`, (B, 3, H, W) float32."""
        images = [samples.decode(index) for index in indices]
        options = {"return_tensors": "pt", "input_data_format": "channels_first"}
        return torch.cat([self.processor(image, **options)["pixel_values"] for image in images])

    def view(self, pixel_values: torch.Tensor) -> np.ndarray:
        """Undo the normalization of (3, H, W): uint8 (H, W, 3), at most `VIEW_SIZE` on the longer side."""
        if getattr(self.processor, "do_normalize", False):
            mean, std = (
                torch.tensor(values).view(-1, 1, 1) for values in (self.processor.image_mean, self.processor.image_std)
            )
            pixel_values = pixel_values * std + mean
        scale = VIEW_SIZE / max(pixel_values.shape[-2:])
        if scale < 1:
            size = [max(1, round(side * scale)) for side in pixel_values.shape[-2:]]
            pixel_values = F.interpolate(pixel_values[None], size, mode="bilinear", antialias=True)[0]
        return (pixel_values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    @torch.no_grad()
    def look(self, samples: Samples, batch_size: int) -> Seen:
        """
        Run the model on all images of a sample.

        Raises:
            ReportError: an image that cannot be decoded, or features that are not finite.
        """
        views, features, logits = [], [], []
        for begin in range(0, len(samples), batch_size):
            batch = self.preprocess(samples, range(begin, min(begin + batch_size, len(samples))))
            views += map(self.view, batch)
            outputs, answers = self.forward(batch)
            features.append(self.pooled(outputs))
            if answers is not None:
                logits.append(answers.float())
        seen = Seen(views, torch.cat(features), torch.cat(logits) if logits else None)
        if not seen.features.isfinite().all():
            raise ReportError(
                f"features of {type(self.encoder).__name__} hold NaN or infinity: the model has diverged"
            )
        return seen

    def forward(self, pixel_values: torch.Tensor):
        """Outputs of the encoder, and logits of the classifier, from one forward pass."""
        if not self.is_classifier or self.encoder is self.model:
            return self.encoder(pixel_values=pixel_values, return_dict=True), None
        caught = {}
        hook = self.encoder.register_forward_hook(lambda _, inputs, outputs: caught.update(encoder=outputs))
        try:
            logits = self.model(pixel_values=pixel_values, return_dict=True).logits
        finally:
            hook.remove()
        return caught["encoder"], logits

    def pooled(self, outputs) -> torch.Tensor:
        """The features of images, (B, D) float32."""
        pooled = outputs.get("pooler_output") if self.has_pooler else None
        if pooled is None:
            tokens = outputs.last_hidden_state
            pooled = tokens[:, 0] if tokens.dim() == 3 else tokens.mean(dim=(2, 3))
        return pooled.flatten(1).float()

    @torch.no_grad()
    def patches(self, samples: Samples, count: int) -> torch.Tensor:
        """Patch features (count, h, w, D) float32 of the first images. Raises ValueError as `grid_of`."""
        batch = self.preprocess(samples, range(count))
        outputs = self.encoder(pixel_values=batch, return_dict=True)
        return patch_maps(outputs.last_hidden_state, batch, self.backbone.config)

    @torch.no_grad()
    def attention(self, samples: Samples, count: int) -> torch.Tensor:
        """
        Attention of the CLS token to the patches in the last block, (count, heads, h, w), of the first images.

        Raises:
            ValueError: a model without attention of a CLS token.
        """
        config, name = self.backbone.config, type(self.backbone).__name__
        if not hasattr(config, "num_attention_heads") or hasattr(config, "depths"):
            raise ValueError(f"{name} has no CLS token that attends to patches")
        batch = self.preprocess(samples, range(count))
        outputs = self.encoder(pixel_values=batch, output_attentions=True, return_dict=True)
        if not outputs.get("attentions"):
            raise ValueError(f"{name} does not return attention weights")
        return cls_attention(outputs.attentions[-1], grid_of(outputs.last_hidden_state, batch, config))


def load_complete(path: str | os.PathLike, auto_class: type) -> tuple[PreTrainedModel, bool]:
    """A model in eval mode whose attention gives weights, and whether its pooling layer was saved (else the feature
    is the CLS token). Raises ReportError as `Viewer`."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # heads of pre-training are meant to be left out
    try:
        model, info = auto_class.from_pretrained(
            os.fspath(path), output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
    # A file that is not there, damaged weights, no code for the model: each library has an exception of its own.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReportError(f"the model in {os.fspath(path)!r} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    has_pooler = not any("pooler." in key for key in missing)
    missing = [key for key in missing if "pooler." not in key]
    if missing:
        raise ReportError(
            f"{os.fspath(path)!r} lacks {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): it was saved from another model than its config.json says"
        )
    return model.eval(), has_pooler


def load_processor(path: Path, backbone_config) -> BaseImageProcessor:
    """The folder's own image processor; without one, evaluation's at the model's image size."""
    if (path / "preprocessor_config.json").is_file() or (path / "processor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(os.fspath(path))
    size = getattr(backbone_config, "image_size", None) or 224
    return build_image_processor(min(size) if isinstance(size, list | tuple) else size)


def grid_of(hidden_state: torch.Tensor, pixel_values: torch.Tensor, config) -> tuple[int, int]:
    """
    Grid (h, w) of the patches among the tokens (B, L, D).

    Raises:
        ValueError: a model without `patch_size` whose tokens are not a square grid.
    """
    if getattr(config, "patch_size", None):
        return token_grid(hidden_state, pixel_values, config)
    side = math.isqrt(hidden_state.shape[1])
    if side * side != hidden_state.shape[1]:
        raise ValueError(
            f"{config.model_type} has no patch_size, and its {hidden_state.shape[1]} tokens are not a square grid"
        )
    return side, side


def patch_maps(hidden_state: torch.Tensor, pixel_values: torch.Tensor, config) -> torch.Tensor:
    """
    (B, h, w, D) float32 from tokens (B, L, D), of which the last h·w are the patches, or from a map (B, D, h, w).

    Raises:
        ValueError: as `grid_of`.
    """
    if hidden_state.dim() == 4:
        return hidden_state.permute(0, 2, 3, 1).float()
    grid = grid_of(hidden_state, pixel_values, config)
    return hidden_state[:, hidden_state.shape[1] - grid[0] * grid[1] :].unflatten(1, grid).float()


def cls_attention(weights: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Attention of the first token to the patches, (B, heads, h, w), from the weights (B, heads, L, L) of a block.

    Raises:
        ValueError: no token besides the patches.
    """
    others = weights.shape[-1] - grid[0] * grid[1]
    if others < 1:
        raise ValueError(f"all {weights.shape[-1]} tokens are patches, there is no CLS token")
    return weights[:, :, 0, others:].unflatten(-1, grid).float()
