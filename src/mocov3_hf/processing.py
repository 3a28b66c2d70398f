"""Image processors of evaluation: resize, center crop, normalize; for any number of channels and any bit depth."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BaseImageProcessor, BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .model.image_processing_mocov3 import MoCoV3ImageProcessor, scale_pixels


# Legend of dimensions: C channels, H W image.

RESAMPLING = {"bilinear": PILImageResampling.BILINEAR, "bicubic": PILImageResampling.BICUBIC}
LAYOUTS = ("channels_first", "channels_last")


@dataclass(frozen=True)
class PixelFormat:
    """
    How encoded images become tensors. The default is 8-bit RGB, to which everything else is converted.

    Args:
        num_channels: C.
        pixel_range: The values of deep images (more than 8 bits) that become 0 and 1: `(low, high)`, or one such pair
            per channel. None for 8-bit images; deep ones among them are scaled by their type. 8-bit images always have
            the range 0 to 255.
        nodata: Value of pixels without data, besides NaN, infinities and what a file itself declares.
        input_data_format: `"channels_first"` or `"channels_last"`, of arrays in which the number of channels does not
            decide.
        fill: Value between 0 and 1 by channel, for channels of an image without any data. Not compared.

    Raises:
        ValueError: a value that is not valid.
    """

    num_channels: int = 3
    pixel_range: tuple | None = None
    nodata: float | None = None
    input_data_format: str | None = None
    fill: tuple[float, ...] | None = field(default=None, compare=False)

    def __post_init__(self):
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {self.num_channels}")
        object.__setattr__(self, "pixel_range", checked_range(self.pixel_range, self.num_channels))
        if self.input_data_format not in (None, *LAYOUTS):
            raise ValueError(f"input_data_format must be one of {', '.join(LAYOUTS)}, got {self.input_data_format!r}")
        if self.fill is not None:
            object.__setattr__(self, "fill", tuple(self.fill))

    @property
    def is_deep(self) -> bool:
        """Whether decoded images have 16 bits instead of 8."""
        return self.pixel_range is not None

    @property
    def is_rgb8(self) -> bool:
        """Whether images are plain 8-bit RGB, which `BitImageProcessor` and the fastest decoders handle."""
        return self.num_channels == 3 and self.pixel_range is None and self.nodata is None

    @property
    def dtype(self) -> torch.dtype:
        """Of decoded pixels on their way to the device."""
        return torch.uint16 if self.is_deep else torch.uint8


def checked_range(pixel_range: Any, num_channels: int) -> tuple | None:
    """
    A pixel range as `(low, high)`, or as a tuple of one such pair per channel.

    Args:
        pixel_range: The same as lists, or flat: `[low, high, low, high, ...]`.
        num_channels: Of the images.

    Raises:
        ValueError: another number of values, or a lower limit that is not below the upper one.
    """
    if pixel_range is None:
        return None
    values = [float(value) for item in pixel_range for value in (item if isinstance(item, Sequence) else (item,))]
    if len(values) not in (2, 2 * num_channels):
        raise ValueError(
            f"pixel_range takes LOW HIGH, or such a pair for each of {num_channels} channels, got {len(values)} values"
        )
    pairs = tuple(zip(values[::2], values[1::2], strict=True))
    wrong = next((pair for pair in pairs if not pair[0] < pair[1]), None)
    if wrong is not None:
        raise ValueError(f"pixel_range takes LOW below HIGH, got {wrong[0]:g} and {wrong[1]:g}")
    return pairs[0] if len(pairs) == 1 else pairs


def build_image_processor(
    image_size: int = 224,
    resample: str = "bilinear",
    num_channels: int | None = None,
    *,
    pixel_format: PixelFormat | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> BaseImageProcessor:
    """
    The image processor of MoCo v3's evaluation: short side to 256/224 of `image_size`, center crop, normalize.

    Args:
        image_size: Side of the crop in pixels; the short side becomes `round(image_size * 256 / 224)` before.
        resample: `"bilinear"` (official evaluation) or `"bicubic"` (fine-tuned models).
        num_channels: Of the images; 3 without a `pixel_format`.
        pixel_format: Of the images; 8-bit without it.
        image_mean, image_std: By channel, for pixels in 0..1. None for ImageNet's with 3 channels, and otherwise 0.5.

    Returns:
        A `BitImageProcessor` for 8-bit RGB, otherwise a `MoCoV3ImageProcessor`.

    Raises:
        ValueError: An image size below 1, an unknown `resample`, or another number of values than channels.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if resample not in RESAMPLING:
        raise ValueError(f"resample must be one of {', '.join(sorted(RESAMPLING))}, got {resample!r}")
    if pixel_format is None:
        pixel_format = PixelFormat(num_channels or 3)
    channels = pixel_format.num_channels
    mean = list(image_mean or (IMAGENET_DEFAULT_MEAN if channels == 3 else [0.5] * channels))
    std = list(image_std or (IMAGENET_DEFAULT_STD if channels == 3 else [0.5] * channels))
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) != channels:
            raise ValueError(f"{name} takes one value for each of {channels} channels, got {len(values)}")
    if not min(std) > 0:
        raise ValueError(f"image_std must be positive, got {min(std):g}")
    # Every value is passed: the defaults of the class are CLIP's (its mean and deviation, bicubic, short side 224).
    common = {
        "do_resize": True,
        "size": {"shortest_edge": round(image_size * 256 / 224)},
        "resample": RESAMPLING[resample],
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    if pixel_format.is_rgb8:
        return BitImageProcessor(do_rescale=True, rescale_factor=1 / 255, do_convert_rgb=True, **common)
    return MoCoV3ImageProcessor(
        num_channels=channels, pixel_range=pixel_format.pixel_range, nodata=pixel_format.nodata, **common
    )


def pixel_format_of(processor: BaseImageProcessor) -> PixelFormat:
    """The format of the images that a processor takes: its own, or 8-bit RGB for processors of other classes."""
    if isinstance(processor, MoCoV3ImageProcessor) or type(processor).__name__ == MoCoV3ImageProcessor.__name__:
        fill = processor.image_mean if processor.do_normalize else None
        return PixelFormat(processor.num_channels, processor.pixel_range, processor.nodata, fill=fill)
    return PixelFormat()


def for_pixels(
    processor: BaseImageProcessor,
    pixel_format: PixelFormat,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> BaseImageProcessor:
    """
    A processor with the sizes and normalization of another, for images of this format.

    Args:
        processor: As saved with a model.
        pixel_format: Of the images.
        image_mean, image_std: By channel; None for those of the processor.

    Raises:
        ValueError: Its mean has another number of channels.
    """
    if pixel_format_of(processor) == pixel_format and image_mean is None and image_std is None:
        return processor
    settings = {
        name: value
        for name, value in processor.to_dict().items()
        if name in ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_normalize")
        or name in ("image_mean", "image_std")
    }
    channels = pixel_format.num_channels
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if values is not None:
            settings[name] = list(values)
        if settings.get("do_normalize", True) and len(settings.get(name) or ()) != channels:
            raise ValueError(
                f"the image processor normalizes {len(settings.get(name) or ())} channels, the images have {channels}"
            )
    return MoCoV3ImageProcessor(
        num_channels=channels, pixel_range=pixel_format.pixel_range, nodata=pixel_format.nodata, **settings
    )


class Scaling:
    """One image of any depth (C, H, W) to float32 in 0..1, filled where it has no data: the first step of training."""

    def __init__(self, pixel_format: PixelFormat):
        self.pixel_format = pixel_format

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        chosen = self.pixel_format
        return scale_pixels(image, chosen.pixel_range, chosen.nodata, chosen.fill)[0]

    def __repr__(self) -> str:
        return f"Scaling({self.pixel_format})"


class ProcessorTransform:
    """
    One image through an image processor of transformers: (C, H, W) to float32 (C, size, size).

    Args:
        processor: Its own size, crop, resampling, mean and standard deviation hold.
        pixel_format: Of the images that it takes: uint8, or values of any depth if the format says so. None for that
            of the processor.
    """

    def __init__(self, processor: BaseImageProcessor, pixel_format: PixelFormat | None = None):
        self.processor = processor
        self.pixel_format = pixel_format or pixel_format_of(processor)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        # Three rows of pixels could be taken for channels: the layout is passed.
        return self.processor(image, return_tensors="pt", input_data_format="channels_first")["pixel_values"][0]

    def __repr__(self) -> str:
        """All settings in a fixed order: what the cache of features compares."""
        return json.dumps(self.processor.to_dict(), sort_keys=True, default=str)


def adapted(
    processor: BaseImageProcessor, image_size: int | None = None, interpolation: str | None = None
) -> BaseImageProcessor:
    """
    The same processor for another image size or interpolation; the proportion of resize and crop is kept.

    Args:
        processor: As saved with a model.
        image_size: Side of the images in pixels; None to keep it.
        interpolation: "bilinear" or "bicubic"; None to keep it.

    Raises:
        ValueError: An image size below 1, a processor without a size, or an unknown interpolation.
    """
    settings = processor.to_dict()
    if image_size is not None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        size, crop = settings.get("size"), settings.get("crop_size")
        if not size:
            raise ValueError(f"{type(processor).__name__} has no size to change: leave out --image_size")
        if settings.get("do_center_crop") and crop:
            proportion = image_size / crop["height"]
            size = {side: round(pixels * proportion) for side, pixels in size.items() if pixels}
            settings["crop_size"] = {"height": image_size, "width": image_size}
        else:
            size = {side: image_size for side, pixels in size.items() if pixels}
        settings["size"] = size
    if interpolation is not None:
        if interpolation not in RESAMPLING:
            raise ValueError(f"interpolation must be one of {', '.join(RESAMPLING)}, got {interpolation!r}")
        settings["resample"] = RESAMPLING[interpolation]
    if image_size is None and interpolation is None:
        return processor
    return type(processor).from_dict(settings)
