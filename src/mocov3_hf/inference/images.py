"""Images in any form, decoded and preprocessed in order, by threads beside the model."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from ..data.decode import BadImageError, decoder_message
from ..data.pixels import RGB8, read_image
from ..data.scan_index import scan
from ..model.image_processing_mocov3 import pil_array
from ..processing import PixelFormat


# A path, encoded bytes, or an image in memory: arrays and tensors may have any number of channels and bit depth.
ImageInput = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class PreparedImage:
    """One image of the input: its pixels, or why it could not be decoded."""

    name: str
    pixels: torch.Tensor | None
    error: BadImageError | None = None


def find_images(folder: str | os.PathLike) -> list[str]:
    """
    Paths of the images in a folder and its subfolders, sorted: the files that training would use, see `data/scan.py`.

    Raises:
        ValueError: There are none.
    """
    found = scan(folder)
    if not found.images:
        skipped = ", ".join(f"{number:,} of the kind: {reason}" for reason, number in found.tally.counts.items())
        raise ValueError(
            f"folder {os.fspath(folder)!r} holds no images{f', only {skipped}' if skipped else ''}: expected files"
            " such as .jpg, .png or .tif"
        )
    root = os.path.expanduser(os.fspath(folder))
    return [os.path.join(root, os.fsdecode(image)) for image in found.images]


def decode(image: ImageInput, pixel_format: PixelFormat = RGB8) -> torch.Tensor:
    """
    An image for an image processor of this format, (C, H, W): uint8 RGB, rotated by its EXIF orientation and converted
    as transformers' pipelines do it, or the values of the file for other formats.

    Raises:
        BadImageError: The image cannot be decoded, or has another number of channels.
        ValueError: A tensor of another shape or type, or not an image at all.
    """
    if isinstance(image, Image.Image):
        try:
            array = pil_array(image, pixel_format.num_channels)
        # PIL reads lazily, and raises OSError, SyntaxError, ValueError, ... on damaged files.
        except Exception as error:
            raise BadImageError(f"cannot be decoded: {decoder_message(error)}") from error
        return read_image(array, replace(pixel_format, input_data_format="channels_last"))
    if isinstance(image, torch.Tensor):
        if pixel_format.is_rgb8 and (image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3):
            raise ValueError(
                f"a tensor must be one image, uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}: unbind a batch"
                " into a list, and undo any normalization"
            )
        return image.cpu() if pixel_format.is_rgb8 else read_image(image.cpu().numpy(), pixel_format)
    if isinstance(image, (str, os.PathLike, bytes, np.ndarray)):
        return read_image(image, pixel_format)
    raise ValueError(
        "an image must be a path, encoded bytes, a PIL image, an array or a uint8 tensor (3, H, W), got"
        f" {type(image).__name__}"
    )


def name_of(image: ImageInput, index: int) -> str:
    """The path of an image, or its position in the input."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    return getattr(image, "filename", None) or f"image {index}"


def prepared_images(
    images: Iterable[ImageInput],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    num_workers: int,
    ahead: int,
    pixel_format: PixelFormat = RGB8,
) -> Iterator[PreparedImage]:
    """
    All images, in order, decoded and preprocessed.

    Args:
        images: Read one by one, no further ahead than needed.
        prepare: Of `Preprocessing`.
        num_workers: Threads; 0 decodes in the caller's thread. Decoding and resizing release Python's lock.
        ahead: How many images the threads may be ahead of the caller.
        pixel_format: Of the images that `prepare` takes.
    """

    def prepared(index: int, image: ImageInput) -> PreparedImage:
        name = name_of(image, index)
        try:
            return PreparedImage(name, prepare(decode(image, pixel_format)))
        except BadImageError as error:
            return PreparedImage(name, None, error)

    if num_workers == 0:
        yield from (prepared(index, image) for index, image in enumerate(images))
        return
    pool, waiting = ThreadPoolExecutor(num_workers, thread_name_prefix="decode"), deque()
    try:
        for index, image in enumerate(images):
            waiting.append(pool.submit(prepared, index, image))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
