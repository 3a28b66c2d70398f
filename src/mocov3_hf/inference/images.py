"""Images in any form, decoded and preprocessed in order, by threads beside the model."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from ..data.account import Tally
from ..data.decode import BadImageError, decoder_message, printable
from ..data.decode_limits import MAX_PIXELS
from ..data.file_kinds import HIDDEN
from ..data.pixels import RGB8, read_image
from ..data.scan_index import scan
from ..model.image_processing_mocov3 import pil_array
from ..processing import PixelFormat
from ..reporting import warn
from ..requirements import MissingPackageError


# Reasons why files are skipped in one warning.
MOST_REASONS = 5


@dataclass(frozen=True)
class NamedImage:
    """An image of a data set or archive: a name for messages, and what reads its encoded bytes when needed."""

    name: str
    read: Callable[[], bytes | str | np.ndarray | None]


# A path, encoded bytes, a file opened in binary mode, or an image in memory: arrays and tensors may have any number of
# channels and bit depth.
ImageInput = (
    str
    | os.PathLike
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | Image.Image
    | np.ndarray
    | torch.Tensor
    | NamedImage
)
WHAT_IS_AN_IMAGE = (
    "a path, encoded bytes, a file opened in binary mode, a PIL image, an array or a uint8 tensor (3, H, W)"
)


@dataclass(frozen=True)
class PreparedImage:
    """One image of the input: its pixels, or why it could not be decoded."""

    name: str
    pixels: torch.Tensor | None
    error: BadImageError | None = None


def find_images(folder: str | os.PathLike, is_reported: bool = True) -> list[str]:
    """
    Paths of the images in a folder and its subfolders, sorted: the files that training would use, see `data/scan.py`.

    Args:
        is_reported: Whether a warning names what is skipped, other than hidden files.

    Raises:
        ValueError: There are none.
    """
    found = scan(folder)
    skipped = found.tally.copy()
    for kind, fix, names in (
        ("archive", "pass it by itself", found.archives),
        ("parquet file", "pass the folder as --dataset_name", found.parquet),
        ("table", "pass it as --dataset_name", found.tables if not found.images else []),
    ):
        skipped.add(f"{kind}, {fix}", names[0] if names else "", len(names))
    if not found.images:
        only = ", ".join(f"{number:,} of the kind: {reason}" for reason, number in skipped.counts.items())
        raise ValueError(
            f"folder {os.fspath(folder)!r} holds no images{f', only {only}' if only else ''}: expected files"
            " such as .jpg, .png or .tif"
        )
    if is_reported:
        report_skipped(os.fspath(folder), skipped)
    root = os.path.expanduser(os.fspath(folder))
    return [os.path.join(root, os.fsdecode(image)) for image in found.images]


def report_skipped(path: str, skipped: Tally) -> None:
    """One warning about the files of a folder or archive that are skipped, other than hidden ones."""
    reasons = [f"{number:,} {reason}, such as {skipped.examples[reason]}"
               for reason, number in skipped.counts.items() if reason != HIDDEN]  # fmt: skip
    if reasons:
        more = f"; and {len(reasons) - MOST_REASONS} other reasons" if len(reasons) > MOST_REASONS else ""
        warn(f"{printable(path)}: skipped {'; '.join(reasons[:MOST_REASONS])}{more}")


def decode(image: ImageInput, pixel_format: PixelFormat = RGB8, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
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
        return read_image(array, replace(pixel_format, input_data_format="channels_last"), max_pixels)
    if isinstance(image, torch.Tensor):
        if pixel_format.is_rgb8 and (image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3):
            raise ValueError(
                f"a tensor must be one image, uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}: unbind a batch"
                " into a list, and undo any normalization"
            )
        return image.cpu() if pixel_format.is_rgb8 else read_image(image.cpu().numpy(), pixel_format)
    if isinstance(image, NamedImage):
        return read_image(image.read(), pixel_format, max_pixels)
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] == pixel_format.num_channels:
        # (H, W, C), also where the first axis could be the channels as well.
        pixel_format = replace(pixel_format, input_data_format=pixel_format.input_data_format or "channels_last")
    if isinstance(image, (str, os.PathLike)):
        check_path(os.fspath(image))
    if isinstance(image, (str, os.PathLike, bytes, np.ndarray)):
        return read_image(image, pixel_format, max_pixels)
    if is_file(image):
        return decode(read_file(image), pixel_format, max_pixels)
    raise ValueError(f"an image must be {WHAT_IS_AN_IMAGE}, got {type(image).__name__}")


def check_path(path: str) -> None:
    """BadImageError for a path that cannot be that of one image."""
    if not path:
        raise BadImageError("has an empty path")
    if path.startswith(("http://", "https://", "data:")):
        raise BadImageError("is a URL, which is not downloaded")
    if os.path.isdir(path):
        raise BadImageError("is a folder inside a list of images")


def name_of(image: ImageInput, index: int) -> str:
    """The path of an image, or its position in the input."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image) or f"image {index}"
    if isinstance(image, torch.Tensor):  # whose `name` is another thing
        return f"image {index}"
    name = getattr(image, "filename" if isinstance(image, Image.Image) else "name", None)
    return name if isinstance(name, str) and name else f"image {index}"


def is_file(image: object) -> bool:
    """Whether an object is an open file, `BytesIO` included."""
    return callable(getattr(image, "read", None)) and not isinstance(image, NamedImage)


def read_file(file: BinaryIO) -> bytes:
    """
    The rest of an open file.

    Raises:
        BadImageError: It cannot be read.
        ValueError: It is opened as text.
    """
    try:
        data = file.read()
    except UnicodeDecodeError:
        data = ""
    # OSError, or ValueError of a closed file.
    except (OSError, ValueError) as error:
        raise BadImageError(f"cannot be read: {error}") from error
    if not isinstance(data, bytes):
        raise ValueError('the file is opened as text: open it with mode "rb"')
    return data


def detached(image: ImageInput) -> ImageInput:
    """
    An image that no longer depends on an open file, which a generator may close once it is asked for the next image.

    Raises:
        BadImageError: It cannot be read.
        ValueError: As `read_file`.
    """
    if is_file(image):
        return read_file(image)
    if isinstance(image, Image.Image):
        try:
            image.load()
        # As in `decode`.
        except Exception as error:
            raise BadImageError(f"cannot be decoded: {decoder_message(error)}") from error
    return image


@contextmanager
def naming(name: str) -> Iterator[None]:
    """ValueErrors inside the block name an image."""
    try:
        yield
    except MissingPackageError:
        raise
    except ValueError as error:
        raise ValueError(f"{printable(name)}: {error}") from error


def prepared_images(
    images: Iterable[ImageInput],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    num_workers: int,
    ahead: int,
    pixel_format: PixelFormat = RGB8,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[PreparedImage]:
    """
    All images, in order, decoded and preprocessed.

    Args:
        images: Read one by one, no further ahead than needed. Open files, and PIL images that are not in a list, are
            read before the next one is asked for.
        prepare: Of `Preprocessing`.
        num_workers: Threads; 0 decodes in the caller's thread. Decoding and resizing release Python's lock.
        ahead: How many images the threads may be ahead of the caller.
        pixel_format: Of the images that `prepare` takes.
        max_pixels: Larger images are bad ones.

    Raises:
        ValueError: An item that is not an image, by its name or position.
    """

    is_list = isinstance(images, Sequence)

    def prepared(name: str, image: ImageInput | BadImageError) -> PreparedImage:
        if isinstance(image, BadImageError):
            return PreparedImage(name, None, image)
        with naming(name):
            try:
                return PreparedImage(name, prepare(decode(image, pixel_format, max_pixels)))
            except BadImageError as error:
                return PreparedImage(name, None, error)

    def named() -> Iterator[tuple[str, ImageInput | BadImageError]]:
        for index, image in enumerate(images):
            name = name_of(image, index)
            with naming(name):
                try:
                    held = image if is_list and not is_file(image) else detached(image)
                except BadImageError as error:
                    held = error
            yield name, held

    if num_workers == 0:
        yield from (prepared(name, image) for name, image in named())
        return
    pool, waiting = ThreadPoolExecutor(num_workers, thread_name_prefix="decode"), deque()
    try:
        for name, image in named():
            waiting.append(pool.submit(prepared, name, image))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
