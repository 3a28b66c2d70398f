"""Decode images to uint8 RGB: the pixels of PIL's `ImageOps.exif_transpose(image).convert("RGB")`, but faster.

PIL opens every image, so PIL decides what is an image; only a JPEG whose header is simple and right in every byte is
not shown to PIL, to save time. torchvision decodes the pixels of gray and RGB JPEGs; PIL decodes everything else.
`benchmarks/fuzz_decode.py` compares the two on damaged files.
"""

import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
import torchvision  # noqa: F401  (registers its operators)
from PIL import Image, UnidentifiedImageError

from .decode_limits import (
    MAX_BYTES,
    MAX_PIXELS,
    LimitError,
    check_before_opening,
    check_scans,
    check_size,
)
from .plain_jpeg import plain_jpeg_size


# The formats that are read, by the bytes they begin with. PIL has more: some start other programs (EPS) or have no
# signature (TGA), so that anything could be taken for one.
FORMATS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "TIFF": (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+"),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "PPM": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf"),
    "JPEG2000": (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"),
    "ICO": (b"\0\0\1\0",),
    "AVIF": (b"ftyp",),  # after the length of the first box
}
# File name endings of these formats.
# fmt: off
SUFFIXES = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".pfm", ".jp2", ".j2k", ".ico", ".avif",
])
# fmt: on

# The operator behind torchvision's decoding functions, which are deprecated since torchvision 0.29. Without it, PIL
# decodes all images, about 30 % slower.
_HAS_OPERATORS = hasattr(torch.ops.image, "decode_jpeg")
_RGB = 3  # torchvision.io.ImageReadMode.RGB

# Smaller JPEGs (in pixels) do not profit from decoding at a reduced size: no crop would allow it.
_LARGE = 600_000
_LONGEST_PATH = 4096
_ORIENTATION = 0x0112


class BadImageError(ValueError):
    """An image that cannot be used: empty, truncated, not an image, too large, or missing.

    Attributes:
        reason: In one line, without the path.
        path: The file, if the image was read from one, or else None.
    """

    def __init__(self, reason: str, path: str | None = None):
        super().__init__(reason, path)
        self.reason, self.path = reason, path

    def __str__(self) -> str:
        return self.reason if self.path is None else f"{self.reason} ({printable(self.path)})"


def printable(text: str, limit: int = 300) -> str:
    """Text for one line of a message: control characters and undecodable bytes escaped, the middle of a long text
    left out."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-limit // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def decode_rgb(data: bytes | str | os.PathLike, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode an image.

    Args:
        data: The encoded image, or the path of a file.
        max_pixels: Larger images raise an error before memory is allocated.

    Returns:
        uint8 (3, H, W), possibly with memory layout (H, W, 3).

    Raises:
        BadImageError: The reason in one line.
    """
    return decode_shrunk(data, None, max_pixels)[0]


def decode_shrunk(
    data: bytes | str | os.PathLike,
    choose_shrink: Callable[[int, int], int] | None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[torch.Tensor, int, int]:
    """Decode an image. A large JPEG is decoded at a fraction of its size if possible, which skips most of the work.

    Args:
        data, max_pixels: As in `decode_rgb`.
        choose_shrink: Function of the full height and width of a large JPEG that returns 1, 2, 4 or 8. None decodes
            at full size.

    Returns:
        uint8 (3, h, w), and the full height and width.

    Raises:
        BadImageError: The reason in one line.
    """
    path = os.fsdecode(data) if isinstance(data, (str, os.PathLike)) else None
    data = encoded_bytes(data)
    try:
        return _decode(data, choose_shrink, max_pixels)
    except LimitError as error:
        raise BadImageError(str(error), path) from error
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise BadImageError(
            f"has {pixels[0] if pixels else 'too many'} pixels, more than the allowed", path
        ) from error
    except MemoryError as error:
        raise BadImageError("does not fit in memory", path) from error
    # For a damaged file PIL raises OSError, SyntaxError, ValueError, struct.error, ...; torchvision RuntimeError.
    except Exception as error:
        raise BadImageError(f"cannot be decoded: {decoder_message(error)}", path) from error


def encoded_bytes(data: bytes | str | os.PathLike | None) -> bytes:
    """The encoded image, read if `data` is a path.

    Raises:
        BadImageError: There is none; or the file does not exist, is too large, or is a folder, device, socket or pipe,
            which are never opened.
    """
    if isinstance(data, (str, os.PathLike)):
        data = _read_file(os.fsdecode(data))
    elif data is None:
        raise BadImageError("has neither bytes nor a path")
    elif not isinstance(data, bytes):
        raise BadImageError(f"is neither bytes nor a path, but {type(data).__name__}")
    if not data:
        raise BadImageError("is empty (0 bytes)")
    return data


def _read_file(path: str) -> bytes:
    if len(path) > _LONGEST_PATH:
        raise BadImageError(f"is a text of {len(path)} characters, neither bytes nor a path: {printable(path, 40)}")
    try:
        # A pipe that takes the place of the file after this check is opened, but not waited for.
        _check_file(os.stat(path), path)
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            _check_file(status, path)
            data = file.read(status.st_size)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}", path) from error
    except ValueError as error:  # a NUL in the name
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(f"cannot be read: {error}", path) from error
    if not data:
        raise BadImageError("is empty (0 bytes)", path)
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _check_file(status: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise BadImageError("cannot be read: Is a directory", path)
    if not stat.S_ISREG(status.st_mode):
        raise BadImageError("cannot be read: it is a device, pipe or socket", path)
    if status.st_size > MAX_BYTES:
        raise BadImageError(f"has {status.st_size} bytes, more than the allowed {MAX_BYTES}", path)


def format_of(data: bytes) -> str | None:
    """The format in `FORMATS` that encoded bytes begin like, or None."""
    start = data[4:8] if data[4:8] == b"ftyp" else data[:12]
    return next((name for name, signatures in FORMATS.items() if start.startswith(signatures)), None)


@contextmanager
def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """
    Open an encoded image with PIL if its format and limits allow it. Warnings are ignored until it is closed.

    Raises:
        LimitError: Another format, or too large in some way.
        Exception: Whatever PIL raises for a damaged header.
    """
    name = format_of(data)
    if name is None:
        raise LimitError(f"cannot be decoded: it is not {', '.join(FORMATS)}, it begins with {data[:12]!r}")
    if len(data) > MAX_BYTES:
        raise LimitError(f"has {len(data)} bytes, more than the allowed {MAX_BYTES}")
    check_before_opening(name, data, max_pixels)
    with _QUIET, Image.open(io.BytesIO(data), formats=(name,)) as image:
        check_size(*image.size, max_pixels)
        if name == "JPEG":
            check_scans(data, image.size)
        yield image


def _decode(data: bytes, choose_shrink, max_pixels: int) -> tuple[torch.Tensor, int, int]:
    size = plain_jpeg_size(data) if _HAS_OPERATORS else None
    if size is not None and (choose_shrink is None or size[0] * size[1] < _LARGE):
        check_size(*size, max_pixels)
        try:
            image = _decode_with_torchvision(data)
            return image, image.shape[1], image.shape[2]
        except RuntimeError:  # of damaged images, PIL accepts some more
            pass
    with opened(data, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            return _decode_jpeg(data, image, choose_shrink)
        pixels = _orient(_pixels(image), _orientation(image))
        return pixels, pixels.shape[1], pixels.shape[2]


def _decode_jpeg(data: bytes, image: Image.Image, choose_shrink) -> tuple[torch.Tensor, int, int]:
    has_metadata = "exif" in image.info or "xmp" in image.info
    orientation = _orientation(image) if has_metadata else 1
    width, height = image.size
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    shrink = choose_shrink(height, width) if choose_shrink and width * height >= _LARGE else 1
    if shrink > 1 and image.mode in ("L", "RGB"):
        # Without the high frequencies of each block.
        image.draft("RGB", (image.width // shrink, image.height // shrink))
        pixels = _pixels(image)
    elif _HAS_OPERATORS and image.mode in ("L", "RGB"):  # PIL converts CMYK differently
        try:
            pixels = _decode_with_torchvision(data)
        except RuntimeError:
            pixels = _pixels(image)
    else:
        pixels = _pixels(image)
    return _orient(pixels, orientation), height, width


def _decode_with_torchvision(data: bytes) -> torch.Tensor:
    _warn_of_bytes()
    return torch.ops.image.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), _RGB, False)


@cache
def _warn_of_bytes() -> None:
    """Torch warns once per process of memory that cannot be written, which the decoder does not do: ignored."""
    with _QUIET:
        torch.frombuffer(b"\0", dtype=torch.uint8)


def _pixels(image: Image.Image) -> torch.Tensor:
    image.load()
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(_ORIENTATION, 1)


def _orient(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """Undo the Exif orientation (1..8) of a (C, H, W) image, as `ImageOps.exif_transpose` does."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return image.flip(flips) if flips else image


def decoder_message(error: Exception) -> str:
    """Type and message of a decoder's exception, in one short line."""
    text = re.sub(r"<_io\.\w+[^>]*>", "the data", str(error))
    if isinstance(error, UnidentifiedImageError):
        text = "its header is damaged"
    return printable(f"{type(error).__name__}: {(text.splitlines() or [''])[0]}", 200)


class _Quiet:
    """Ignores warnings, which are about metadata. Unlike `warnings.catch_warnings`, several threads can be inside."""

    def __init__(self):
        self._lock, self._inside, self._saved = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


_QUIET = _Quiet()
