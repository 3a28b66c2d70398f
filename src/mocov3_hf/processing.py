"""Image processors of evaluation: resize, center crop, normalize, for images with any number of channels."""

import json

import torch
from transformers import BaseImageProcessor, BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


# Legend of dimensions: C channels, H W image.

RESAMPLING = {"bilinear": PILImageResampling.BILINEAR, "bicubic": PILImageResampling.BICUBIC}


def build_image_processor(
    image_size: int = 224, resample: str = "bilinear", num_channels: int = 3
) -> BitImageProcessor:
    """
    The image processor of MoCo v3's evaluation: short side to 256/224 of `image_size`, center crop, normalize.

    Args:
        image_size: Side of the crop in pixels; the short side becomes `round(image_size * 256 / 224)` before.
        resample: `"bilinear"` (official evaluation) or `"bicubic"` (fine-tuned models).
        num_channels: With 3, ImageNet's mean and standard deviation; otherwise 0.5 for every channel.

    Raises:
        ValueError: An image size below 1, or an unknown `resample`.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if resample not in RESAMPLING:
        raise ValueError(f"resample must be one of {', '.join(sorted(RESAMPLING))}, got {resample!r}")
    # Every value is passed: the defaults of the class are CLIP's (its mean and deviation, bicubic, short side 224).
    return BitImageProcessor(
        do_resize=True,
        size={"shortest_edge": round(image_size * 256 / 224)},
        resample=RESAMPLING[resample],
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(IMAGENET_DEFAULT_MEAN) if num_channels == 3 else [0.5] * num_channels,
        image_std=list(IMAGENET_DEFAULT_STD) if num_channels == 3 else [0.5] * num_channels,
        do_convert_rgb=num_channels == 3,
    )


class ProcessorTransform:
    """
    One image through an image processor of transformers: uint8 (C, H, W) to float32 (C, size, size).

    Args:
        processor: Its own size, crop, resampling, mean and standard deviation hold.
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

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
