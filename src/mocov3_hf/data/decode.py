"""Decode images to uint8 RGB: the pixels of PIL's `ImageOps.exif_transpose(image).convert("RGB")`, but faster.

torchvision decodes common JPEG and 8-bit PNG. PIL decodes everything else (palettes, alpha, CMYK, 16 bit, animations,
other formats), so the pixels cannot differ.
"""

import io
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torchvision  # noqa: F401  (registers its operators)
from PIL import Image, ImageOps


# PIL's own limit for an error, twice the limit for its warning: 13,377 x 13,377 pixels.
MAX_PIXELS = 178_956_970

# The operators behind torchvision's decoding functions, which are deprecated since torchvision 0.29. Without the
# operators, PIL decodes all images, about 20 % slower.
_HAS_OPERATORS = hasattr(torch.ops.image, "decode_jpeg") and hasattr(torch.ops.image, "decode_png")
_RGB = 3  # torchvision.io.ImageReadMode.RGB

# Smaller JPEGs (in pixels) do not profit from decoding at a reduced size: no crop would allow it.
_LARGE = 600_000
_PNG = b"\x89PNG\r\n\x1a\n"


class BadImageError(ValueError):
    """An image that cannot be used: empty, truncated, not an image, too large, or missing."""


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
    if isinstance(data, (str, os.PathLike)):
        try:
            with open(data, "rb") as file:
                data = file.read()
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error} ({os.fspath(data)})") from error
    elif data is None:
        raise BadImageError("has neither bytes nor a path")
    if not data:
        raise BadImageError("is empty (0 bytes)")
    try:
        if data[:2] == b"\xff\xd8":
            return _decode_jpeg(data, choose_shrink, max_pixels)
        image = _decode_png(data, max_pixels) if data[:8] == _PNG else _decode_with_pil(data, max_pixels)
        return image, image.shape[1], image.shape[2]
    except BadImageError:
        raise
    except MemoryError as error:
        raise BadImageError("does not fit in memory") from error
    # For a damaged file PIL raises OSError, SyntaxError, ValueError, struct.error, ...; torchvision RuntimeError.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise BadImageError(f"cannot be decoded: {type(error).__name__}: {reason}") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImageError(f"is {width}x{height} pixels")
    if width * height > max_pixels:
        raise BadImageError(f"is {width}x{height} pixels, more than the allowed {max_pixels}")


def _as_buffer(data: bytes) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only memory, which the decoders do not write
        return torch.frombuffer(data, dtype=torch.uint8)


def _decode_jpeg(data: bytes, choose_shrink, max_pixels: int) -> tuple[torch.Tensor, int, int]:
    frame = _jpeg_frame(data)
    if not _HAS_OPERATORS or frame is None or frame[2] not in (1, 3):  # PIL converts CMYK differently
        image = _decode_with_pil(data, max_pixels)
        return image, image.shape[1], image.shape[2]
    width, height, _, has_metadata = frame
    _check_size(width, height, max_pixels)
    orientation = _orientation(data) if has_metadata else 1
    if orientation in (5, 6, 7, 8):
        height, width = width, height
    shrink = choose_shrink(height, width) if choose_shrink and height * width >= _LARGE else 1
    if shrink > 1:
        image = _decode_draft(data, shrink)
    else:
        image = torch.ops.image.decode_jpeg(_as_buffer(data), _RGB, False)
    return _orient(image, orientation), height, width


def _decode_draft(data: bytes, shrink: int) -> torch.Tensor:
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size, without the high frequencies of each block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (image.width // shrink, image.height // shrink))
            pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _jpeg_frame(data: bytes) -> tuple[int, int, int, bool] | None:
    """Width, height, number of components, and whether APP1 (Exif, XMP) exists. None for an unusual header."""
    position, size, has_metadata = 2, len(data), False
    while position + 9 < size and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        length = (data[position + 2] << 8) | data[position + 3]
        if marker in (0xC0, 0xC1, 0xC2):
            if data[position + 4] != 8:
                return None
            height = (data[position + 5] << 8) | data[position + 6]
            width = (data[position + 7] << 8) | data[position + 8]
            return width, height, data[position + 9], has_metadata
        if marker == 0xE1:
            has_metadata = True
        if marker == 0xDA or (0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return None
        position += 2 + length
    return None


def _orientation(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(0x0112, 1)


def _orient(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """Undo the Exif orientation (1..8) of a (C, H, W) image, as `ImageOps.exif_transpose` does."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return image.flip(flips) if flips else image


def _decode_png(data: bytes, max_pixels: int) -> torch.Tensor:
    if len(data) < 33:
        raise BadImageError(f"is truncated ({len(data)} bytes)")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    _check_size(width, height, max_pixels)
    depth, color_type = data[24], data[25]
    header = data[: data.find(b"IDAT")]
    plain = _HAS_OPERATORS and depth == 8 and color_type in (0, 2) and data[-8:-4] == b"IEND"
    if not plain or any(chunk in header for chunk in (b"tRNS", b"eXIf", b"iTXt", b"zTXt", b"tEXt", b"acTL")):
        return _decode_with_pil(data, max_pixels)
    return torch.ops.image.decode_png(_as_buffer(data), _RGB, False)


def _decode_with_pil(data: bytes, max_pixels: int) -> torch.Tensor:
    with warnings.catch_warnings():
        # `_check_size` replaces PIL's limit. Other warnings are about metadata.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size, max_pixels)
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
