"""Images in any form, decoded and preprocessed in order, by threads beside the model."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from ..data.decode import BadImageError, decode_rgb, decoder_message
from ..data.scan_index import scan


# A path, encoded bytes, or an image in memory.
ImageInput = str | os.PathLike | bytes | Image.Image | torch.Tensor


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


def decode(image: ImageInput) -> torch.Tensor:
    """
    An image as uint8 (3, H, W) RGB, rotated by its EXIF orientation and converted as transformers' pipelines do it.

    Raises:
        BadImageError: The image cannot be decoded.
        ValueError: A tensor of another shape or type, or not an image at all.
    """
    if isinstance(image, Image.Image):
        try:
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)
        # PIL reads lazily, and raises OSError, SyntaxError, ValueError, ... on damaged files.
        except Exception as error:
            raise BadImageError(f"cannot be decoded: {decoder_message(error)}") from error
    if isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            raise ValueError(
                f"a tensor must be one image, uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}: unbind a batch"
                " into a list, and undo any normalization"
            )
        return image.cpu()
    if isinstance(image, (str, os.PathLike, bytes)):
        return decode_rgb(image)
    raise ValueError(
        f"an image must be a path, encoded bytes, a PIL image or a uint8 tensor (3, H, W), got {type(image).__name__}"
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
) -> Iterator[PreparedImage]:
    """
    All images, in order, decoded and preprocessed.

    Args:
        images: Read one by one, no further ahead than needed.
        prepare: Of `Preprocessing`.
        num_workers: Threads; 0 decodes in the caller's thread. Decoding and resizing release Python's lock.
        ahead: How many images the threads may be ahead of the caller.
    """

    def prepared(index: int, image: ImageInput) -> PreparedImage:
        name = name_of(image, index)
        try:
            return PreparedImage(name, prepare(decode(image)))
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
