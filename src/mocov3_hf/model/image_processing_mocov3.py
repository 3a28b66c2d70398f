"""Image processor for images with any number of channels and any bit depth."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs


# ITU-R 601 in fixed point, as PIL converts to grayscale.
LUMA = (19595, 38470, 7471)
# Types whose values float32 does not represent exactly.
WIDE = (torch.int32, torch.int64, torch.uint32, torch.uint64, torch.float64)


class MoCoV3ImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_channels (`int`, *optional*, defaults to 3):
        Channels of the images.
    pixel_range (`list`, *optional*):
        `[low, high]`, or one such pair per channel: the values that become 0 and 1. 8-bit images always have the range
        0 to 255. Without it, `uint16` has the range 0 to 65,535, and floats are between 0 and 1 already.
    nodata (`float`, *optional*):
        Value of pixels without data, besides NaN and infinities.
    """

    num_channels: int | None
    pixel_range: Any
    nodata: float | None


class MoCoV3ImageProcessor(TorchvisionBackend):
    r"""
    Scales images of any number of channels and any bit depth to 0..1 by `pixel_range`, fills pixels without data with
    the mean of their channel, resizes, crops and normalizes.

    Takes arrays and tensors of shape `(num_channels, height, width)`, `(height, width, num_channels)` or
    `(height, width)`, and PIL images of any mode. 8-bit RGB models have a `BitImageProcessor` instead.

    Example:

    ```python
    >>> import numpy as np
    >>> from mocov3_hf import MoCoV3ImageProcessor

    >>> normalization = {"image_mean": [0.5] * 4, "image_std": [0.25] * 4}
    >>> processor = MoCoV3ImageProcessor(num_channels=4, pixel_range=[0, 4095], **normalization)
    >>> image = np.random.default_rng(0).integers(0, 4096, (300, 400, 4)).astype(np.uint16)
    >>> processor(image, return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 4, 224, 224])
    ```
    """

    valid_kwargs = MoCoV3ImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 256}  # noqa: RUF012 - as in every image processor
    crop_size = {"height": 224, "width": 224}  # noqa: RUF012
    default_to_square = False
    do_resize = True
    do_center_crop = True
    do_rescale = False  # `pixel_range` has done it
    do_normalize = True
    num_channels = 3
    pixel_range = None
    nodata = None

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list:
        """Also takes images `(height, width)`, and opens files without converting them to RGB."""
        listed = list(images) if isinstance(images, (list, tuple)) else [images]
        if all(isinstance(image, (str, os.PathLike)) for image in listed):
            return [Image.open(image) for image in listed]
        if all(getattr(image, "ndim", None) == 2 for image in listed):
            return listed
        return super()._prepare_images_structure(images, expected_ndims=expected_ndims)

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | str | None = None,
        num_channels: int | None = None,
        pixel_range: Any = None,
        nodata: float | None = None,
        image_mean: tuple[float, ...] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """One image as float32 `(num_channels, height, width)` between 0 and 1."""
        num_channels = num_channels or self.num_channels
        if isinstance(image, Image.Image):
            image, input_data_format = pil_array(image, num_channels), None
        if isinstance(image, np.ndarray):
            image = as_tensor(image)
        axis = None if input_data_format is None else str(getattr(input_data_format, "value", input_data_format))
        target = image.device if device is None else torch.device(device)
        # MPS has no float64, in which wide integers are scaled and colors made gray: there, the CPU does it.
        image = image.cpu() if image.device.type == "mps" else image
        image = with_channels(channels_first(image, num_channels, axis), num_channels)
        image = image if target.type == "mps" else image.to(target)
        return scale_pixels(image, pixel_range, nodata, image_mean)[0].to(target)


class PixelError(ValueError):
    """An image that a processor cannot use: its type, its channels, or no pixel with data."""


def pil_array(image: Image.Image, num_channels: int) -> np.ndarray:
    """A PIL image of any mode as an array `(height, width)` or `(height, width, channels)`, 8-bit or deeper."""
    image = ImageOps.exif_transpose(image)
    if not is_deep_mode(image.mode):
        has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        image = image.convert("L" if num_channels == 1 else "RGBA" if num_channels == 4 and has_alpha else "RGB")
    return np.array(image)


def is_deep_mode(mode: str) -> bool:
    """Whether the pixels of a PIL image of this mode have more than 8 bits."""
    return mode.startswith("I") or mode == "F"


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """
    An array as a tensor of the same type and shape; booleans become 0 and 255.

    Raises:
        PixelError: the type is not a number.
    """
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise PixelError(f"holds {array.dtype} values, expected numbers")
    if array.dtype.itemsize > 8:  # long double
        array = array.astype(np.float64)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    array = array.view(f"{array.dtype.kind}{array.dtype.itemsize}")  # C's unsigned long long is uint64
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def channels_first(image: torch.Tensor, num_channels: int, axis: str | None = None) -> torch.Tensor:
    """
    An image as `(channels, height, width)`.

    Args:
        image: `(height, width)`, `(channels, height, width)` or `(height, width, channels)`.
        num_channels: Expected number. An axis of 1 or 3 is accepted for the other of the two.
        axis: `"channels_first"`, `"channels_last"`, or None to find the axis by its length.

    Raises:
        PixelError: no axis has this length, or both do.
    """
    if image.dim() == 2:
        return image[None]
    if image.dim() != 3:
        raise PixelError(f"has the shape {tuple(image.shape)}, expected (channels, height, width)")
    if axis is None:
        for accepted in (num_channels, {1: 3, 3: 1}.get(num_channels)):
            found = [place for place in (0, 2) if image.shape[place] == accepted]
            if len(found) == 2:
                raise PixelError(
                    f"has the shape {tuple(image.shape)}, in which the first or the last axis may hold the channels:"
                    " pass input_data_format"
                )
            if found:
                return image if found == [0] else image.permute(2, 0, 1)
        raise PixelError(f"has the shape {tuple(image.shape)}, expected an axis of {num_channels} channels")
    return image.permute(2, 0, 1) if axis == "channels_last" else image


def with_channels(image: torch.Tensor, num_channels: int) -> torch.Tensor:
    """
    An image `(channels, height, width)` with another number of channels: grayscale to RGB, or RGB to grayscale.

    Raises:
        PixelError: there is no such conversion.
    """
    found = len(image)
    if found == num_channels:
        return image
    if found == 1 and num_channels == 3:
        return image.expand(3, -1, -1)
    if found == 3 and num_channels == 1:
        red, green, blue = (weight * part.to(torch.float64) for weight, part in zip(LUMA, image, strict=True))
        luma = ((red + green + blue) / 65536)[None]
        # PIL rounds half up.
        return luma.to(image.dtype) if image.dtype.is_floating_point else torch.floor(luma + 0.5).to(image.dtype)
    raise PixelError(f"has {found} channels, expected {num_channels}")


def scale_pixels(
    image: torch.Tensor,
    pixel_range: Any = None,
    nodata: float | None = None,
    fill: tuple[float, ...] | None = None,
) -> tuple[torch.Tensor, int]:
    """
    Scale an image to 0..1, clip what is outside, and fill pixels without data with the mean of their channel.

    Args:
        image: `(channels, height, width)` of any type.
        pixel_range: As in `MoCoV3ImageProcessor`.
        nodata: Value of pixels without data, besides NaN and infinities.
        fill: By channel, for channels without any data; 0.5 without it.

    Returns:
        float32 `(channels, height, width)`, and the number of values that were filled.

    Raises:
        PixelError: no pixel has data, or values whose range is not known.
    """
    low, high = _limits(image, pixel_range)
    values = image.to(torch.float64 if image.dtype in WIDE else torch.float32)
    missing = ~torch.isfinite(values) if image.dtype.is_floating_point else None
    if nodata is not None:
        is_nodata = values == torch.tensor(nodata, dtype=values.dtype, device=values.device)
        missing = is_nodata if missing is None else missing | is_nodata
    scaled = ((values - low) / (high - low)).clamp(0, 1).to(torch.float32)
    number = 0 if missing is None else int(missing.sum())
    if number == 0:
        return scaled, 0
    if number == missing.numel():
        raise PixelError("has no pixel with data")
    known = (~missing).sum(dim=(1, 2))
    means = scaled.masked_fill(missing, 0).sum(dim=(1, 2), dtype=torch.float64) / known.clamp(min=1)
    empty = torch.full_like(means, 0.5) if fill is None else torch.tensor(fill, dtype=means.dtype, device=means.device)
    means = torch.where(known > 0, means, empty).to(torch.float32)
    return torch.where(missing, means[:, None, None], scaled), number


def _limits(image: torch.Tensor, pixel_range: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value, float32 or float64 `(channels or 1, 1, 1)`."""
    if image.dtype == torch.uint8:
        pixel_range = (0.0, 255.0)
    elif pixel_range is None and image.dtype == torch.uint16:
        pixel_range = (0.0, 65535.0)
    elif pixel_range is None and image.dtype.is_floating_point:
        finite = image[torch.isfinite(image)]
        if finite.numel() and (finite.min() < 0 or finite.max() > 1):
            pixel_range = None
        else:
            pixel_range = (0.0, 1.0)
    if pixel_range is None:
        raise PixelError(
            f"holds {str(image.dtype).removeprefix('torch.')} values from {image.min().item():g} to"
            f" {image.max().item():g}, whose range is not known: pass pixel_range"
        )
    limits = torch.tensor(
        pixel_range, dtype=torch.float64 if image.dtype in WIDE else torch.float32, device=image.device
    )
    if limits.dim() == 2 and len(limits) not in (1, len(image)):
        raise PixelError(f"has {len(image)} channels, but pixel_range has {len(limits)} pairs")
    limits = limits.reshape(-1, 2)
    return limits[:, 0, None, None], limits[:, 1, None, None]
