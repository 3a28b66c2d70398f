"""The CPU stage of the augmentation: draw the parameters of both views, decode, crop and resize to uint8 or uint16.

The two views are BYOL's asymmetric pair, as MoCo v3 uses it. The photometric operations (jitter, grayscale, blur,
solarize), flips and the normalization run later, in batches on the device: see `photometric.py`.

Shapes: B batch size, C channels, S image size of a view, K number of parameters of a view.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..processing import PixelFormat
from .bad_images import BadImage, decode_first_usable
from .draws import uniforms
from .pixels import RGB8


# Columns of a view's parameters, float32 (B, K).
PARAMETER_NAMES = (
    "order",  # 0..23: index into JITTER_ORDERS
    "brightness",  # factor; 1 is no change
    "contrast",  # factor
    "saturation",  # factor
    "hue",  # shift in turns, -0.5..0.5; 0 is no change
    "grayscale",  # 1 or 0
    "blur_sigma",  # standard deviation in pixels; 0 is no blur
    "solarize_threshold",  # invert levels 0..255 at or above it; NO_SOLARIZE is no change
    "flip",  # 1 or 0
    "vertical_flip",  # 1 or 0
    "rotation",  # 0..3 quarter turns, counterclockwise
    "dropped_channel",  # the channel to drop, as a fraction 0..1 of their number; 0 is no change
)
NUM_PARAMETERS = len(PARAMETER_NAMES)
NO_SOLARIZE = 256.0
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_ORDERS = tuple(itertools.permutations(range(4)))

_CROP_TRIES = 10
_DRAWS = 4 * _CROP_TRIES + 16


@dataclass(frozen=True)
class ViewSettings:
    """Augmentation settings of one view. `two_views` returns the asymmetric pair of MoCo v3.

    Args:
        image_size: Side length of the view in pixels.
        crop_scale: Range of the crop's area, as a fraction of the image.
        crop_ratio: Range of the crop's aspect ratio, width / height.
        *_probability: Probability of applying an operation.
        brightness, contrast, saturation: Half-width of the factor's range around 1.
        hue: Largest shift in turns, at most 0.5.
        blur_sigma: Range of the standard deviation in pixels.
        solarize_threshold: Level, 0..255 also for deep images.
        rotation_probability: Of a rotation by 90, 180 or 270 degrees.
        channel_drop_probability: Of replacing one channel, drawn at random, by its mean over the data set.

    Raises:
        ValueError: A value is out of range.
    """

    image_size: int = 224
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    solarize_threshold: int = 128
    flip_probability: float = 0.5
    vertical_flip_probability: float = 0.0
    rotation_probability: float = 0.0
    channel_drop_probability: float = 0.0

    def __post_init__(self):
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            # YAML yields lists; a tuple keeps the settings hashable.
            low, high = value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range 0 < low <= high, got {value}")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale is a fraction of the image area, at most 1, got {self.crop_scale}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        for name, value in vars(self).items():
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5] turns, got {self.hue}")
        if not 0 <= self.solarize_threshold <= 256:
            raise ValueError(f"solarize_threshold must be in [0, 256], got {self.solarize_threshold}")


def two_views(**overrides) -> tuple[ViewSettings, ViewSettings]:
    """The asymmetric pair of BYOL and MoCo v3.

    View 1 is always blurred and never solarized. View 2 is blurred with probability 0.1 and solarized with
    probability 0.2. Keyword arguments (fields of `ViewSettings`) override these values in both views.
    """
    first = {"blur_probability": 1.0, "solarize_probability": 0.0}
    second = {"blur_probability": 0.1, "solarize_probability": 0.2}
    return ViewSettings(**{**first, **overrides}), ViewSettings(**{**second, **overrides})


def view_settings(options: Mapping[str, Any]) -> tuple[ViewSettings, ViewSettings]:
    """The settings of both views from the options of a recipe; what they leave out is MoCo v3's."""
    names = [item.name for item in fields(ViewSettings)]
    first, second = two_views(**{name: options[name] for name in names if name in options})
    own = [{name: options[f"{name}_{number}"] for name in names if f"{name}_{number}" in options} for number in (1, 2)]
    return replace(first, **own[0]), replace(second, **own[1])


@dataclass(frozen=True)
class ViewDraws:
    """The random numbers of a batch for one view.

    Attributes:
        parameters: float32 (B, K), columns in the order of PARAMETER_NAMES.
        crop_area, crop_ratio: float64 (B, 10), fraction of the image area and width / height of each tried crop.
        crop_place: float64 (B, 10, 2), top and left of each crop, as a fraction of the possible positions.
    """

    parameters: torch.Tensor
    crop_area: torch.Tensor
    crop_ratio: torch.Tensor
    crop_place: torch.Tensor


def draw_view(settings: ViewSettings, seed: int, epoch: int, sample_ids: torch.Tensor, view: int) -> ViewDraws:
    """Draw the parameters of one view (0 or 1) for int64 (B,) sample ids. A pure function of its arguments."""
    draws = uniforms(seed, epoch, sample_ids, view, _DRAWS)
    crops = draws[:, : 4 * _CROP_TRIES].reshape(-1, _CROP_TRIES, 4)
    u = draws[:, 4 * _CROP_TRIES :].unbind(1)

    low, high = settings.crop_scale
    log_low, log_high = math.log(settings.crop_ratio[0]), math.log(settings.crop_ratio[1])
    jitter = u[0] < settings.jitter_probability

    def factor(uniform, width):
        # torchvision's ColorJitter: uniform on [max(0, 1 - width), 1 + width].
        lowest = max(0.0, 1 - width)
        return torch.where(jitter, lowest + (1 + width - lowest) * uniform, 1.0)

    sigma_low, sigma_high = settings.blur_sigma
    columns = {
        "order": torch.floor(u[1] * len(JITTER_ORDERS)),
        "brightness": factor(u[2], settings.brightness),
        "contrast": factor(u[3], settings.contrast),
        "saturation": factor(u[4], settings.saturation),
        "hue": torch.where(jitter, settings.hue * (2 * u[5] - 1), 0.0),
        "grayscale": u[6] < settings.grayscale_probability,
        "blur_sigma": torch.where(
            u[7] < settings.blur_probability, sigma_low + (sigma_high - sigma_low) * u[8], torch.zeros_like(u[8])
        ),
        "solarize_threshold": torch.where(
            u[9] < settings.solarize_probability, float(settings.solarize_threshold), NO_SOLARIZE
        ),
        "flip": u[10] < settings.flip_probability,
        "vertical_flip": u[11] < settings.vertical_flip_probability,
        # The position of the number below the probability is uniform again.
        "rotation": torch.where(
            u[12] < settings.rotation_probability,
            1 + torch.floor(3 * u[12] / max(settings.rotation_probability, 1e-9)).clamp(max=2),
            0.0,
        ),
        "dropped_channel": torch.where(u[13] < settings.channel_drop_probability, u[14], 0.0),
    }
    return ViewDraws(
        parameters=torch.stack([columns[name].to(torch.float32) for name in PARAMETER_NAMES], dim=1),
        crop_area=low + (high - low) * crops[:, :, 0],
        crop_ratio=torch.exp(log_low + (log_high - log_low) * crops[:, :, 1]),
        crop_place=crops[:, :, 2:],
    )


def crop_boxes(draws: ViewDraws, heights: torch.Tensor, widths: torch.Tensor, settings: ViewSettings) -> torch.Tensor:
    """Crop boxes of a batch, as in torchvision's RandomResizedCrop.

    Uses the first of ten tries that fits, or else the largest central crop with a valid aspect ratio.

    Args:
        draws: Of B samples.
        heights, widths: int64 (B,), image sizes in pixels.
        settings: Of the view.

    Returns:
        int64 (B, 4): top, left, height, width.
    """
    heights, widths = heights.to(torch.float64)[:, None], widths.to(torch.float64)[:, None]
    area = draws.crop_area * heights * widths
    crop_w = torch.round(torch.sqrt(area * draws.crop_ratio))
    crop_h = torch.round(torch.sqrt(area / draws.crop_ratio))
    fits = (crop_w > 0) & (crop_w <= widths) & (crop_h > 0) & (crop_h <= heights)
    top = torch.floor(draws.crop_place[:, :, 0] * (heights - crop_h + 1))
    left = torch.floor(draws.crop_place[:, :, 1] * (widths - crop_w + 1))
    tried = torch.stack([top, left, crop_h, crop_w], dim=-1)
    first = fits.to(torch.uint8).argmax(dim=1)
    chosen = tried[torch.arange(len(first), device=first.device), first]

    ratio = widths / heights
    low, high = settings.crop_ratio
    central_w = torch.where(ratio > high, torch.round(heights * high), widths)
    central_h = torch.where(ratio < low, torch.round(widths / low), heights)
    # For a one-pixel image, a ratio below 1/2 would round to 0.
    central_w, central_h = central_w.clamp(min=1), central_h.clamp(min=1)
    central = torch.cat(
        [torch.floor((heights - central_h) / 2), torch.floor((widths - central_w) / 2), central_h, central_w], dim=1
    )
    return torch.where(fits.any(dim=1, keepdim=True), chosen, central).to(torch.int64)


def crop_box(area: list, ratio: list, place: list, height: int, width: int, settings: ViewSettings) -> tuple:
    """`crop_boxes` for one image, in plain Python.

    `area`, `ratio` and `place` are one image's rows of `ViewDraws` as lists. For one image, a single tensor operation
    would cost more than this whole function.
    """
    for share, aspect, (down, right) in zip(area, ratio, place, strict=True):
        target = share * height * width
        crop_w, crop_h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            return int(down * (height - crop_h + 1)), int(right * (width - crop_w + 1)), crop_h, crop_w
    low, high = settings.crop_ratio
    crop_w = round(height * high) if width / height > high else width
    crop_h = round(width / low) if width / height < low else height
    crop_w, crop_h = max(crop_w, 1), max(crop_h, 1)
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def shrink_factor(boxes: list[tuple], size: int, oversampling: float = 2.0) -> int:
    """The largest factor (1, 2, 4 or 8) by which an image can be decoded smaller.

    Each crop keeps at least `oversampling` times the size of the view, in each direction.
    """
    smallest = min(min(height, width) for _, _, height, width in boxes)
    return max([factor for factor in (2, 4, 8) if smallest >= factor * oversampling * size], default=1)


def crop_and_resize(image: torch.Tensor, box: tuple, out: torch.Tensor) -> None:
    """Crop and resize, bilinear with antialiasing.

    Args:
        image: uint8 (C, H, W), or float32 in 0..1.
        box: Top, left, height, width.
        out: uint8 (C, S, S), or uint16 for float32, written in place. Fastest if both have memory layout (H, W, C).
    """
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    size = list(out.shape[-2:])
    if image.dtype == torch.uint8:
        # F.interpolate(..., antialias=True) calls this, but would copy the result.
        torch.ops.aten._upsample_bilinear2d_aa.out(crop, size, False, None, None, out=out[None])
    else:
        resized = torch.ops.aten._upsample_bilinear2d_aa(crop, size, False, None, None)[0]
        out.copy_(resized.clamp_(0, 1).mul_(65535).round_())


def make_views(
    batch,
    settings: tuple[ViewSettings, ViewSettings],
    seed: int,
    epoch: int,
    pixel_format: PixelFormat = RGB8,
) -> dict:
    """Both views of a batch: decode each image once, crop and resize both views into one block of memory.

    A bad image is replaced by the first usable one of its candidates. The parameters are still those of the original
    sample.

    Args:
        batch: A `MapBatch` or `StreamBatch`.
        settings: Settings of view 1 and view 2.
        seed, epoch: Of the parameters.
        pixel_format: Of the images.

    Returns:
        A dictionary: pixels uint8, or uint16 for deep images, (2, B, C, S, S) with memory layout (2, B, S, S, C),
        parameters float32 (2, B, K), sample_ids int64 (B,) of the original samples, bad, a list of `BadImage`, and
        num_filled, the number of images with values that had no data and were filled.
    """
    size, num_rows, num_filled = settings[0].image_size, len(batch.sample_ids), 0
    pixels = _empty_pixels(num_rows, size, pixel_format)
    draws = [draw_view(settings[view], seed, epoch, batch.sample_ids, view) for view in range(2)]
    crops = [
        list(zip(draw.crop_area.tolist(), draw.crop_ratio.tolist(), draw.crop_place.tolist(), strict=True))
        for draw in draws
    ]
    bad: list[BadImage] = []
    for row in range(num_rows):

        def boxes(height: int, width: int, row: int = row) -> list[tuple]:
            return [crop_box(*crops[view][row], height, width, settings[view]) for view in range(2)]

        image, height, width, filled = decode_first_usable(
            batch.candidates(row),
            lambda height, width, boxes=boxes: shrink_factor(boxes(height, width), size),
            bad,
            pixel_format,
        )
        num_filled += filled > 0
        for view, box in enumerate(boxes(height, width)):
            crop_and_resize(image, _scaled(box, height, width, image), pixels[view, row])
    return {
        "pixels": pixels,
        "parameters": torch.stack([draw.parameters for draw in draws]),
        "sample_ids": batch.sample_ids,
        "bad": bad,
        "num_filled": num_filled,
    }


def _scaled(box: tuple, height: int, width: int, image: torch.Tensor) -> tuple:
    """Scale a box to an image that was decoded at a reduced size, rounded to the nearest pixel."""
    if image.shape[1] == height and image.shape[2] == width:
        return box
    scale_y, scale_x = image.shape[1] / height, image.shape[2] / width
    top, left = round(box[0] * scale_y), round(box[1] * scale_x)
    bottom, right = round((box[0] + box[2]) * scale_y), round((box[1] + box[3]) * scale_x)
    return top, left, bottom - top, right - left


def _empty_pixels(num_rows: int, size: int, pixel_format: PixelFormat) -> torch.Tensor:
    """(2, B, C, S, S) with memory layout (2, B, S, S, C), which decoding and resizing handle fastest."""
    shape, dtype = (2, num_rows, size, size, pixel_format.num_channels), pixel_format.dtype
    if get_worker_info() is None:
        block = torch.empty(shape, dtype=dtype)
    else:
        # Allocate in shared memory, as torch's default collate function does, so that sending it needs no copy.
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")
        block = torch.empty(0, dtype=dtype).set_(storage, 0, shape)
    return block.permute(0, 1, 4, 2, 3)
