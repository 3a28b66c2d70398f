"""Images of any number of channels and any bit depth: TIFF, 16-bit PNG, NumPy files and arrays.

`read_image` returns the values as they are stored, for an image processor. `decode_image` returns pixels for the views
of pre-training. Plain 8-bit images take the path of `decode.py`, and their pixels are the same as there.

DICOM is not read: convert it to 16-bit PNG, TIFF or `.npy` first, with the rescale slope and intercept applied.
"""

import importlib.util
import io
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, TiffImagePlugin

from ..model.image_processing_mocov3 import (
    PixelError,
    as_tensor,
    channels_first,
    is_deep_mode,
    pil_array,
    scale_pixels,
    with_channels,
)
from ..processing import PixelFormat
from ..requirements import MissingPackageError, require_packages
from .decode import (
    BadImageError,
    _orient,
    _orientation,
    decode_shrunk,
    decoder_message,
    encoded_bytes,
    format_of,
    opened,
)
from .decode_limits import MAX_BYTES, MAX_PIXELS, LimitError, check_before_opening


RGB8 = PixelFormat()

_NPY = b"\x93NUMPY"
_MOST_PAGES = 4096
# Values that a file of any size may have, and values per byte of larger ones: more than LZW and Deflate can reach.
_SMALL, _LARGEST_RATIO = 1 << 22, 2000
# Tags of TIFF files.
_WIDTH = 256
_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = 258, 262, 274, 277
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _NODATA = 338, 339, 42113
_WHITE_IS_ZERO = 0

Encoded = bytes | str | os.PathLike | np.ndarray


class Decoded(NamedTuple):
    """
    A decoded image.

    Attributes:
        image: (C, h, w), uint8 in 0..255, or float32 in 0..1 for deep formats.
        height, width: Of the full image. A large JPEG may be decoded smaller.
        num_filled: Values without data that were filled.
    """

    image: torch.Tensor
    height: int
    width: int
    num_filled: int = 0


def decode_image(
    data: Encoded,
    pixel_format: PixelFormat = RGB8,
    choose_shrink: Callable[[int, int], int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Decoded:
    """
    Decode an image for the views of pre-training: scaled, and filled where it has no data.

    Args:
        data: The encoded image, the path of a file, or an array.
        pixel_format: Of the result.
        choose_shrink, max_pixels: As in `decode_shrunk`.

    Raises:
        BadImageError: The reason in one line.
        MissingPackageError: A format that needs the extra packages.
    """
    values, height, width = _read(data, pixel_format, choose_shrink, max_pixels)
    if values.dtype == torch.uint8 and not pixel_format.is_deep and pixel_format.nodata is None:
        return Decoded(values, height, width)
    try:
        image, filled = scale_pixels(values, pixel_format.pixel_range, pixel_format.nodata, pixel_format.fill)
    except ValueError as error:
        message = str(error).replace("pass pixel_range", "pass --pixel_range LOW HIGH")
        raise BadImageError(message, _path_of(data)) from error
    if not pixel_format.is_deep:
        image = (image * 255).round_().to(torch.uint8)
    return Decoded(image, height, width, filled)


def read_image(data: Encoded, pixel_format: PixelFormat = RGB8, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """
    Decode an image for an image processor of this format: (C, H, W), with the values that the file holds.

    Deep images for an 8-bit RGB processor are scaled by their type to uint8. Pixels that a file declares to have no
    data are NaN.

    Arguments and errors are those of `decode_image`.
    """
    if pixel_format.is_rgb8:
        return decode_image(data, pixel_format, None, max_pixels).image
    values = _read(data, pixel_format, None, max_pixels)[0]
    is_missing = ~torch.isfinite(values) if values.dtype.is_floating_point else torch.zeros(1, dtype=torch.bool)
    if pixel_format.nodata is not None:
        is_missing = is_missing | (values.to(torch.float64) == pixel_format.nodata)
    if is_missing.all():
        raise BadImageError("has no pixel with data", _path_of(data))
    return values


def unusual_image(
    data: Encoded, input_data_format: str | None = None, max_pixels: int = MAX_PIXELS
) -> torch.Tensor | None:
    """
    An image with the channels and values that it has by itself, (C, H, W) of any type; None for a plain 8-bit image,
    which is not decoded.

    Of an array, the shorter one of its first and last axis are the channels. A transparent image has no alpha channel.

    Raises:
        BadImageError, MissingPackageError: As `decode_image`; also for an array whose first and last axis are equal.
    """
    return _checked(lambda data: _deep_values(data, None, input_data_format, max_pixels), data)


def check_image(data: Encoded) -> None:
    """
    Decode an image with the channels that it has.

    Raises:
        BadImageError, MissingPackageError: It cannot be used.
    """
    values = unusual_image(data)
    if values is None:
        decode_shrunk(data, None)
    elif values.dtype.is_floating_point and not torch.isfinite(values).any():
        raise BadImageError("has no pixel with data", _path_of(data))


def _path_of(data: Encoded) -> str | None:
    return os.fsdecode(data) if isinstance(data, str | os.PathLike) else None


def _read(
    data: Encoded,
    pixel_format: PixelFormat,
    choose_shrink: Callable[[int, int], int] | None,
    max_pixels: int,
) -> tuple[torch.Tensor, int, int]:
    """Values (C, h, w) of any type, and the full height and width."""
    wanted = pixel_format.num_channels

    def read(data: bytes | np.ndarray) -> tuple[torch.Tensor, int, int]:
        values = _deep_values(data, wanted, pixel_format.input_data_format, max_pixels)
        if values is None:
            values, height, width = decode_shrunk(data, choose_shrink, max_pixels)
        else:
            height, width = values.shape[1:]
        return values if len(values) == wanted else _converted(values, data, wanted), height, width

    return _checked(read, data)


def _checked(read: Callable, data: Encoded) -> Any:
    """`read(data)`, with every error of a decoder as a `BadImageError`."""
    path = _path_of(data)
    if not isinstance(data, np.ndarray):
        data = encoded_bytes(data)
    try:
        return read(data)
    except BadImageError as error:
        raise BadImageError(error.reason, error.path or path) from error
    except MissingPackageError:
        raise
    except MemoryError as error:
        raise BadImageError("does not fit in memory", path) from error
    except (LimitError, PixelError) as error:
        raise BadImageError((str(error).splitlines() or [""])[0][:200], path) from error
    # PIL, tifffile and imagecodecs have many exceptions for damaged files.
    except Exception as error:
        raise BadImageError(f"cannot be decoded: {decoder_message(error)}", path) from error


def _converted(values: torch.Tensor, data: bytes | np.ndarray, wanted: int) -> torch.Tensor:
    if wanted == 4 and values.dtype == torch.uint8 and len(values) == 3 and isinstance(data, bytes):
        with opened(data) as image:
            array = pil_array(image, wanted)
        if array.ndim == 3 and array.shape[2] == 4:  # the alpha channel holds a band
            return torch.from_numpy(array).permute(2, 0, 1)
    return with_channels(values, wanted)


def _deep_values(
    data: bytes | np.ndarray, wanted: int | None, axis: str | None, max_pixels: int
) -> torch.Tensor | None:
    """(C, H, W) of any type, or None for a plain image, which `decode_shrunk` decodes."""
    if isinstance(data, np.ndarray):
        return _array_channels_first(data, wanted, axis, max_pixels)
    if data[:6] == _NPY:
        if len(data) > MAX_BYTES:
            raise LimitError(f"has {len(data)} bytes, more than the allowed {MAX_BYTES}")
        return _array_channels_first(_npy_array(data), wanted, axis, max_pixels)
    name = format_of(data)
    if name == "PNG" and len(data) > 32 and data[24] == 16:
        return _deep_png(data, wanted, max_pixels)
    if name == "TIFF":
        return _tiff(data, wanted, max_pixels)
    if name in ("PPM", "JPEG2000"):
        with opened(data, max_pixels) as image:
            if not is_deep_mode(image.mode):
                return None
            array = np.array(image)[None]  # PIL scales deep values of a PGM to 16 bits
            return as_tensor(array.astype(np.uint16) if image.mode == "I" else array)
    return None


def _check_values(shape: tuple[int, ...], max_pixels: int, num_bytes: int | None = None) -> None:
    """At most `max_pixels` values, and of compressed files not many more than their bytes can hold."""
    values = int(np.prod(shape, dtype=object))
    if min(shape) < 1:
        raise BadImageError(f"has the shape {shape}, which holds no values")
    if values > max_pixels:
        raise BadImageError(f"has the shape {shape}, {values} values, more than the allowed {max_pixels}")
    if num_bytes is not None and values > max(_SMALL, _LARGEST_RATIO * num_bytes):
        raise BadImageError(f"has {num_bytes} bytes, too few for the shape {shape}")


def _array_channels_first(array: np.ndarray, wanted: int | None, axis: str | None, max_pixels: int) -> torch.Tensor:
    _check_values(array.shape or (1,), max_pixels)
    if wanted is None:
        wanted = 1 if array.ndim != 3 else array.shape[{"channels_first": 0, "channels_last": 2}.get(axis, 0)]
        if array.ndim == 3 and axis is None:
            wanted = min(array.shape[0], array.shape[2])
    try:
        return channels_first(as_tensor(array), wanted, axis)
    except PixelError as error:
        message = str(error).replace("input_data_format", "--input_data_format channels_first or channels_last")
        raise BadImageError(message) from error


def _npy_array(data: bytes) -> np.ndarray:
    """The array of a `.npy` file, without copying and without pickle."""
    file = io.BytesIO(data)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise BadImageError(f"is a .npy file of version {version}, expected a plain array")
    shape, is_fortran, dtype = readers[version](file)
    count = int(np.prod(shape, dtype=object))
    if dtype.hasobject or dtype.kind not in "buif":
        raise BadImageError(f"holds {dtype} values, expected numbers")
    if count * dtype.itemsize > len(data) - file.tell():
        raise BadImageError(f"is truncated ({len(data)} bytes)")
    return np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order="F" if is_fortran else "C")


def _deep_png(data: bytes, wanted: int | None, max_pixels: int) -> torch.Tensor:
    with opened(data, max_pixels) as image:
        orientation = _orientation(image)
        if data[25] == 0:  # grayscale; PIL truncates colors to 8 bits
            return _orient(as_tensor(np.array(image).astype(np.uint16)[None]), orientation)
    imagecodecs = _extra("imagecodecs", "16-bit color PNG")
    array = np.moveaxis(np.atleast_3d(imagecodecs.png_decode(data)), 2, 0)
    if len(array) in (2, 4) and wanted != len(array):
        array = array[:-1]
    return _orient(as_tensor(array), orientation)


def _tiff(data: bytes, wanted: int | None, max_pixels: int) -> torch.Tensor | None:
    """PIL reads pages of one sample. Everything else that is not a plain 8-bit image is read with tifffile."""
    check_before_opening("TIFF", data, max_pixels)
    tags: Any = {}
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:4] in (b"+\0", b"\0+") else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        is_readable = tags.get(_SAMPLES, 1) <= 4
        if is_readable:
            with opened(data, max_pixels):
                pass
    except LimitError:
        raise
    except Exception:  # as many kinds as there are damaged and unusual files; tifffile names what is wrong
        is_readable = False
    if not is_readable:
        if _WIDTH not in tags and importlib.util.find_spec("tifffile") is None:
            raise BadImageError("cannot be decoded: its header is damaged")  # no other package would read it
        return _tiff_with_tifffile(data, wanted, max_pixels)
    with opened(data, max_pixels) as image:
        is_8bit = max(tags.get(_BITS, (1,))) <= 8
        if tags.get(_SAMPLES, 1) == 1 and (image.mode == "L" or is_deep_mode(image.mode)):
            return _gray_pages(image, tags, wanted, max_pixels, len(data))
    # A fourth sample that is not declared to be alpha is a band, unless RGB is asked for.
    has_bands = 0 in tags.get(_EXTRA_SAMPLES, ())[:1] and wanted != 3
    return None if is_8bit and not has_bands else _tiff_with_tifffile(data, wanted, max_pixels)


def _gray_pages(image: Image.Image, tags, wanted: int | None, max_pixels: int, num_bytes: int) -> torch.Tensor | None:
    """Pages of equal size and type as channels."""
    number = getattr(image, "n_frames", 1)
    if image.mode == "L" and (number == 1 or (wanted in (1, 3) and number != wanted)) and _NODATA not in tags:
        return None  # a plain image, or a document of which the first page counts
    _check_values((min(number, _MOST_PAGES), image.height, image.width), max_pixels, num_bytes)
    pages, size, mode = [], image.size, image.mode
    for index in range(min(number, _MOST_PAGES)):
        image.seek(index)
        if image.size == size and image.mode == mode:
            pages.append(np.array(image))
    array = np.stack(pages)
    if array.dtype == np.int32 and max(tags.get(_BITS, (1,))) == 32 and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1:
        array = array.view(np.uint32)  # PIL has signed integers only
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and array.dtype.newbyteorder("=") == np.uint16:
        array = 65535 - array
    return _without_nodata(_orient(as_tensor(array), tags.get(_ORIENTATION, 1)), tags.get(_NODATA))


def _tiff_with_tifffile(data: bytes, wanted: int | None, max_pixels: int) -> torch.Tensor:
    tifffile = _extra("tifffile", "multi-band TIFF")
    _extra("imagecodecs", "compressed multi-band TIFF")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        page, axes = series.keyframe, series.axes
        if "Y" not in axes or "X" not in axes:
            raise BadImageError(f"has axes {axes}, expected an image")
        _check_values(series.shape, max_pixels, len(data))
        array = series.asarray(maxworkers=1)
        tags = {tag: page.tags[tag].value for tag in (_ORIENTATION, _NODATA) if tag in page.tags}
        photometric, extra_samples = int(page.photometric), tuple(map(int, page.extrasamples))
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (-2, -1))
    array = array.reshape(-1, *array.shape[-2:])
    if photometric == 2 and extra_samples[:1] in ((1,), (2,)) and len(array) == 4 and wanted != 4:
        array = array[:3]  # without alpha
    if photometric == _WHITE_IS_ZERO and array.dtype == np.uint16:
        array = 65535 - array
    return _without_nodata(_orient(as_tensor(array), int(tags.get(_ORIENTATION, 1))), tags.get(_NODATA))


def _without_nodata(values: torch.Tensor, declared: str | None) -> torch.Tensor:
    """With NaN where a GeoTIFF declares no data; an 8-bit image, which has no NaN, with the mean of its channel."""
    try:
        nodata = float(str(declared).strip("\0 "))
    except ValueError:
        return values
    if values.dtype == torch.uint8:
        return (scale_pixels(values, None, nodata)[0] * 255).round().to(torch.uint8)
    wide = torch.float64 if values.element_size() > 2 and values.dtype != torch.float32 else torch.float32
    values = values.to(wide)
    return values.masked_fill(values == torch.tensor(nodata, dtype=wide), float("nan"))


def _extra(name: str, what: str):
    require_packages(what, "multichannel", {name: name})
    # Its messages about damaged files; the exception has the reason.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    return importlib.import_module(name)
