"""The images of a report, and what a model computes on them: features, patch features, attention and logits.

Legend: n images, B batch, H W image, h w grid of patches or last feature map, L tokens, D width, C classes.
"""

import copy
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..data.decode import BadImageError
from ..data.labeled import find_label_column, open_labeled
from ..data.pixels import RGB8, check_image, read_image
from ..data.sources import MapSource, open_dataset
from ..data.splits import split_option
from ..loading import load_classifier, load_encoder, load_processor, pooled_of
from ..model.modeling_mocov3_backbone import token_grid
from ..problem_types import SINGLE_LABEL
from ..processing import PixelFormat, ProcessorTransform
from ..run_folder import RunFolder
from .parts import shown_name


# Longer side of the images in the page, in pixels.
VIEW_SIZE = 160


@dataclass(frozen=True)
class Samples:
    """
    A sample of n images.

    Attributes:
        source: all images of the split.
        rows: (n,) int64, rows of the split. Sections that show only some images show the first.
        labels: (n,) int64, None without labels.
        class_names: by label, None without labels.
        why_unlabeled: a sentence, empty with labels.
        description: name and split of the dataset.
    """

    source: MapSource
    rows: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    why_unlabeled: str
    description: str

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, index: int) -> str:
        """Class of an image of the sample, or its row in the split without labels."""
        return f"row {self.rows[index]}" if self.labels is None else self.class_names[self.labels[index]]

    def decode(self, index: int, pixel_format: PixelFormat = RGB8) -> torch.Tensor:
        """
        An image of the sample for an image processor of this format, (C, H, W).

        Raises:
            ValueError: it cannot be decoded.
        """
        row = int(self.rows[index])
        try:
            return read_image(self.source.read(row), pixel_format)
        except BadImageError as error:
            raise ValueError(
                f"image in row {row} of {self.description} {error}: repair or remove it, or pass --on_bad_image skip"
            ) from error


def open_samples(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "test",
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    *,
    problem_type: str = "auto",
    num_images: int = 500,
    seed: int = 0,
    bad_images: str = "stop",
) -> Samples:
    """
    Sample a split, balanced over its classes.

    Args:
        dataset_name, config_name, split, image_column: as for `data.labeled.open_labeled`.
        label_column: None to detect it; images without one are unlabeled.
        problem_type: As for `open_labeled`.
        num_images: size of the sample; a smaller split is taken whole.
        bad_images: "skip" takes other images for those that cannot be decoded, and names them on stderr.

    Raises:
        ValueError: as `open_labeled`, if a label column was given or found; fewer than 2 images.
    """
    with split_option("--test_split"):
        dataset = open_dataset(dataset_name, config_name, split)
    description = f"{shown_name(dataset_name)}, split {split}"
    column, why = label_column, ""
    if column is None:
        try:
            column = find_label_column(dataset)
        except ValueError as error:
            why = f"The images have no labels: {error}."
    if column is None:
        source = MapSource(dataset, image_column)
        rows = usable_rows(source, choose_rows(len(source), None, len(source), seed), num_images, bad_images)
        samples = Samples(source, rows, None, None, why, description)
    else:
        images = open_labeled(dataset_name, config_name, split, image_column, column, problem_type=problem_type)
        is_single = images.problem_type == SINGLE_LABEL
        rows = choose_rows(len(images), images.labels if is_single else None, len(images), seed)
        rows = usable_rows(images.source, rows, num_images, bad_images)
        names = images.class_names or [str(number) for number in range(images.num_classes)]
        why = f"The labels are {images.problem_type.replace('_', ' ')}, and do not group the images."
        known = (images.labels[rows], list(names), "") if is_single else (None, None, why)
        samples = Samples(images.source, rows, *known, description)
    if len(samples) < 2:
        raise ValueError(f"{description} has {len(samples)} image, a report compares at least 2")
    return samples


def usable_rows(source: MapSource, rows: np.ndarray, num_images: int, bad_images: str) -> np.ndarray:
    """The first `num_images` rows, (n,) int64; with "skip" of those that can be decoded."""
    if bad_images == "stop":
        return rows[:num_images]
    found: list[int] = []
    for row in rows.tolist():
        if len(found) == num_images:
            break
        try:
            check_image(source.read(row))
        except BadImageError as error:
            print(f"skipped: image in row {row} {error}", file=sys.stderr)
        else:
            found.append(row)
    return np.asarray(found, dtype=np.int64)


def choose_rows(num_rows: int, labels: np.ndarray | None, num_images: int, seed: int) -> np.ndarray:
    """
    Rows of a split: one of every class, then a second of every class, and so on, each in random order.

    Args:
        num_rows: of the split.
        labels: (num_rows,) int64, or None.
        num_images: at most.

    Returns:
        (n,) int64 without repetition.
    """
    shuffled = np.random.default_rng(seed).permutation(num_rows)
    if labels is None:
        return shuffled[:num_images]
    rounds, seen = [], Counter()
    for label in labels[shuffled].tolist():
        rounds.append(seen[label])
        seen[label] += 1
    return shuffled[np.argsort(rounds, kind="stable")][:num_images]


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

    Args:
        folder: of a run or a model.
        display_channels: one or three channels to show, from 0; None for the first three, or the first of fewer.

    Raises:
        ValueError: weights that cannot be loaded or are incomplete; channels that the images do not have.
    """

    def __init__(self, folder: RunFolder, display_channels: list[int] | None = None):
        self.is_classifier = folder.kind == "classifier"
        load = load_classifier if self.is_classifier else load_encoder
        # Only eager attention returns its weights.
        self.model = load(folder.path, attn_implementation="eager", dtype=torch.float32)
        self.encoder = self.model.base_model
        self.backbone = getattr(self.encoder, "backbone", self.encoder)
        self.processor = load_processor(folder.path, self.model.config)
        self.transform = ProcessorTransform(self.processor)
        number = self.transform.pixel_format.num_channels
        self.shown = display_channels or list(range(3 if number >= 3 else 1))
        if len(self.shown) not in (1, 3) or max(self.shown) >= number:
            raise ValueError(
                f"--display_channels takes one or three channels from 0 to {number - 1}, got"
                f" {' '.join(map(str, self.shown))}"
            )

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation by channel."""
        if getattr(self.processor, "do_normalize", False):
            return list(self.processor.image_mean), list(self.processor.image_std)
        number = self.transform.pixel_format.num_channels
        return [0.0] * number, [1.0] * number

    def untrained(self, seed: int) -> "Viewer":
        """The same with random weights: what training started from, or would start from."""
        other = copy.copy(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            other.model = type(self.model)(self.model.config).eval()
        other.encoder = other.model.base_model
        other.backbone = getattr(other.encoder, "backbone", other.encoder)
        return other

    def preprocess(self, samples: Samples, indices: range) -> torch.Tensor:
        """Some images of a sample as `pixel_values`, (B, C, H, W) float32."""
        pixel_format = self.transform.pixel_format
        return torch.stack([self.transform(samples.decode(index, pixel_format)) for index in indices])

    def view(self, pixel_values: torch.Tensor) -> np.ndarray:
        """
        The shown channels of (C, H, W) without the normalization: uint8 (H, W, 3), at most `VIEW_SIZE` on the longer
        side.
        """
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.normalization)
        pixel_values = (pixel_values * std + mean)[self.shown].expand(3, -1, -1)
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
            ValueError: an image that cannot be decoded, or features that are not finite.
        """
        views, features, logits = [], [], []
        for begin in range(0, len(samples), batch_size):
            batch = self.preprocess(samples, range(begin, min(begin + batch_size, len(samples))))
            views += map(self.view, batch)
            outputs, answers = self.forward(batch)
            features.append(pooled_of(outputs, self.encoder))
            if answers is not None:
                logits.append(answers.float())
        seen = Seen(views, torch.cat(features), torch.cat(logits) if logits else None)
        if not seen.features.isfinite().all():
            raise ValueError(
                f"features of {type(self.encoder).__name__} contain NaN or infinity: the model has diverged"
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
