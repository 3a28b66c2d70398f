"""Refuse images that cost more time or memory than their pixels justify, before a decoder sees them.

A file of a few kilobytes can declare gigabytes of pixels, metadata that refer to the same bytes thousands of times,
or thousands of scans of the image. What is checked here is what PIL and the libraries below it do not check, in
the oldest supported release. Decoding then takes at most about 18 bytes of memory per allowed pixel, 2 GiB for
JPEG 2000, and some seconds.
"""

import re
import struct


# PIL's own limit for an error, twice the limit for its warning: 13,377 x 13,377 pixels.
MAX_PIXELS = 178_956_970
# More than such an image takes uncompressed with 16 bits per channel.
MAX_BYTES = 8 * MAX_PIXELS

# Bytes of metadata or padding that no real image has before its pixels.
_MAX_PADDING = 1 << 16
_MAX_METADATA = 16 << 20
_MAX_SEGMENTS = 1 << 16
_MAX_CHUNKS = 1 << 20
# Pixels times scans of a JPEG. Ten scans are usual for a progressive one.
_MAX_SCANNED = 32 * MAX_PIXELS
_MAX_SCANS = 1000
# Values that decoders written in Python convert one at a time, about a million per second.
_MAX_SLOW = 4 << 20
_MAX_TILES = 200_000
_MAX_TILE_PIXELS = 1 << 26
_MAX_ICON = 8 << 20
# Memory of OpenJPEG, which keeps 4 bytes per channel and pixel twice, and about 100 bytes per precinct and code block.
_MAX_JPEG2000 = 2 << 30

# Bytes of the TIFF types.
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


class LimitError(ValueError):
    """What is wrong with an image, in one line that follows "image X "."""


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise LimitError for an image without pixels or with too many."""
    if width < 1 or height < 1:
        raise LimitError(f"is {width}x{height} pixels")
    if width * height > max_pixels:
        raise LimitError(f"is {width}x{height} pixels, more than the allowed {max_pixels}")


def check_before_opening(name: str, data: bytes, max_pixels: int) -> None:
    """Raise LimitError for bytes that would be expensive to open or decode.

    Args:
        name: One of `decode.FORMATS`.
        data: The encoded image.
        max_pixels: Of the decoded image.
    """
    check = _CHECKS.get(name)
    if check is not None:
        check(data, max_pixels)


def check_scans(data: bytes, size: tuple[int, int]) -> None:
    """Raise LimitError for a JPEG whose pixels are passed over too often.

    Args:
        data: The encoded image, which PIL has opened.
        size: Width and height.
    """
    stop, components, is_progressive = 0, b"", False
    for marker, start, end in _segments(data):
        stop = end
        if _is_frame(marker):
            components, is_progressive = data[start + 5 : start + 6], marker & 3 == 2
        elif marker == 0xDA and not is_progressive and data[start : start + 1] == components:
            return  # all components in one scan, the usual case
    scans = data.count(b"\xff\xda", stop)
    if scans > _MAX_SCANS or scans * size[0] * size[1] > _MAX_SCANNED:
        raise LimitError(f"is {size[0]}x{size[1]} pixels in {scans} scans, more than any real JPEG has")


def _check_jpeg(data: bytes, max_pixels: int) -> None:
    exif = []
    for marker, start, stop in _segments(data):
        if _is_frame(marker) and stop <= len(data) and stop >= start + 6:
            check_size(*struct.unpack_from(">HH", data, start + 1)[::-1], max_pixels)
        elif marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            exif.append(data[start + 6 : stop])
        elif marker == 0xE2 and data[start : start + 4] == b"MPF\0":
            _check_directory(data[start + 4 : stop])
    if exif:
        _check_exif(b"".join(exif))


def _segments(data: bytes):
    """(marker, start, stop) of the segments of a JPEG up to and including its first scan header, read as PIL does."""
    place, padding, size = 2, 0, len(data)
    for _ in range(_MAX_SEGMENTS):
        # Bytes between segments are skipped one at a time.
        begin, place = place, data.find(b"\xff", place)
        while data[place + 1 : place + 2] in (b"\xff", b"\0") and place >= 0:
            place = data.find(b"\xff", place + (1 if data[place + 1] else 2))
            if place - begin > _MAX_PADDING:
                break
        padding += (size if place < 0 else place) - begin
        if padding > _MAX_PADDING:
            raise LimitError(f"has {padding} bytes of padding in its header, more than any real JPEG has")
        if place < 0 or place + 4 > size:
            return
        marker = data[place + 1]
        if 0xD0 <= marker <= 0xD9 or marker in (0x01, 0xC8) or 0xF0 <= marker <= 0xFD:  # without a length
            place += 2
            continue
        length = data[place + 2] << 8 | data[place + 3]
        yield marker, place + 4, place + 2 + length
        if marker == 0xDA:
            return
        place += 2 + max(length, 2)
    raise LimitError(f"has more than {_MAX_SEGMENTS} segments in its header, more than any real JPEG has")


def _is_frame(marker: int) -> bool:
    return 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)


def _check_exif(exif: bytes) -> None:
    while exif[:6] == b"Exif\0\0":
        exif = exif[6:]
    _check_directory(exif)


def _check_directory(data: bytes, is_tiff: bool = False) -> None:
    """Check the first directory of a TIFF file or of Exif metadata, whose values PIL copies into memory."""
    tags = {}
    total = 0
    for tag, kind, count, place in _directory(data):
        size = count * _TYPE_SIZES.get(kind, 0)
        if place + size <= len(data):
            total += size
            tags.setdefault(tag, (kind, count, place))
    if total > len(data) + _MAX_METADATA:
        raise LimitError(f"has metadata of {total} bytes in a file of {len(data)}, which refer to the same bytes")
    if is_tiff:
        tiles = max((tags[tag][1] for tag in (273, 324) if tag in tags), default=0)
        if tiles > _MAX_TILES:
            raise LimitError(f"has {tiles} strips or tiles, more than the allowed {_MAX_TILES}")
        order = "little" if data[:2] == b"II" else "big"
        sides = []
        for tag in (322, 323):
            kind, count, place = tags.get(tag, (3, 1, None))
            size = _TYPE_SIZES.get(kind, 0)
            sides.append(0 if place is None or count != 1 else int.from_bytes(data[place : place + size], order))
        if sides[0] * sides[1] > _MAX_TILE_PIXELS:
            raise LimitError(f"has tiles of {sides[0]}x{sides[1]} pixels, more than the allowed {_MAX_TILE_PIXELS}")


def _directory(data: bytes):
    """(tag, type, count, place of the value) of the first directory of a TIFF file."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return
    if data[2:4] in (b"+\0", b"\0+"):
        if len(data) < 24:
            return
        (start,) = struct.unpack_from(order + "Q", data, 8)
        entry, count_format, width = struct.Struct(order + "HHQ8s"), "Q", 8
    else:
        (start,) = struct.unpack_from(order + "L", data, 4)
        entry, count_format, width = struct.Struct(order + "HHL4s"), "H", 4
    first = start + struct.calcsize(order + count_format)
    if first > len(data):
        return
    (entries,) = struct.unpack_from(order + count_format, data, start)
    available = (len(data) - first) // entry.size
    if min(entries, available) > 1 << 16:
        raise LimitError(f"has {entries} tags, more than the allowed {1 << 16}")
    for index in range(min(entries, available)):
        place = first + index * entry.size
        tag, kind, count, value = entry.unpack_from(data, place)
        if count * _TYPE_SIZES.get(kind, 0) > width:
            yield tag, kind, count, int.from_bytes(value, "little" if order == "<" else "big")
        else:
            yield tag, kind, count, place + entry.size - width


def _check_tiff(data: bytes, _) -> None:
    _check_directory(data, is_tiff=True)


def _check_png(data: bytes, max_pixels: int) -> None:
    if len(data) < 33:
        raise LimitError(f"is truncated ({len(data)} bytes)")
    width, height = struct.unpack_from(">II", data, 16)
    check_size(width, height, max_pixels)
    place = 8
    for _ in range(_MAX_CHUNKS):
        if place + 12 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"eXIf":
            _check_exif(data[place + 8 : place + 8 + length])
        place += 12 + length
    raise LimitError(f"has more than {_MAX_CHUNKS} chunks, more than any real PNG has")


def _check_webp(data: bytes, _) -> None:
    place = 12
    for _ in range(_MAX_CHUNKS):
        if place + 8 > len(data):
            return
        kind, length = struct.unpack_from("<4sI", data, place)
        if kind == b"EXIF":
            _check_exif(data[place + 8 : place + 8 + length])
        place += 8 + length + (length & 1)
    raise LimitError(f"has more than {_MAX_CHUNKS} chunks, more than any real WebP has")


def _check_gif(data: bytes, _) -> None:
    """The blocks before the first image, which PIL joins."""
    flags = data[10] if len(data) > 10 else 0
    place = 13 + (3 << ((flags & 7) + 1) if flags & 128 else 0)
    begin = place
    while place < len(data) and data[place : place + 1] != b",":
        if place - begin > _MAX_METADATA:
            raise LimitError(f"has more than {_MAX_METADATA} bytes before its first image")
        if data[place : place + 1] == b"!":
            place += 2
            while place < len(data) and data[place] and place - begin <= _MAX_METADATA:
                place += data[place] + 1
        place += 1


def _check_bmp(data: bytes, _, start: int = 14) -> None:
    if len(data) < start + 20:
        return
    width, height = struct.unpack_from("<ii", data, start + 4)
    compression = data[start + 16] if data[start : start + 1] >= b"\x28" else 0
    if compression in (1, 2) and (abs(width * height) > 4 * _MAX_SLOW or len(data) > 2 * _MAX_SLOW):
        raise LimitError(f"is a run-length encoded BMP of {abs(width)}x{abs(height)} pixels, too slow to decode")


def _check_icon(data: bytes, max_pixels: int) -> None:
    if len(data) > _MAX_ICON:
        raise LimitError(f"has {len(data)} bytes, more than the {_MAX_ICON} allowed for icons")
    number = min(int.from_bytes(data[4:6], "little"), (len(data) - 6) // 16)
    entries = [struct.unpack_from("<BBBxxxHII", data, 6 + 16 * index) for index in range(number)]
    if not entries:
        return

    def order(entry: tuple) -> tuple[int, int]:
        width, height, colors, bits, *_ = entry
        return -(width or 256) * (height or 256), bits or (colors - 1).bit_length() if colors else bits or 256

    place = min(entries, key=order)[-1]  # PIL reads the largest one, of several the one with the fewest colors
    if data[place : place + 8] == b"\x89PNG\r\n\x1a\n":
        check_size(*struct.unpack(">II", data[place + 16 : place + 24].ljust(8, b"\1")), max_pixels)
    elif place + 12 <= len(data):
        width, height = struct.unpack_from("<ii", data, place + 4)
        check_size(abs(width) or 1, abs(height) // 2 or 1, max_pixels)
        _check_bmp(data, max_pixels, place)


def _check_ppm(data: bytes, _) -> None:
    """Text, and values that are scaled, go through decoders written in Python."""
    header = re.match(rb"P([1-6])\s+((?:#[^\r\n]*[\r\n]|\s|\d)*)", data[:_MAX_PADDING])
    if header is None:
        return
    numbers = re.sub(rb"#[^\r\n]*[\r\n]", b" ", header[2]).split()
    is_text, is_rgb = header[1] in b"123", header[1] in b"36"
    if is_text:
        slow = len(data)
        if data.count(b"#") > 1000:
            raise LimitError("has more than 1000 comments")
    else:
        largest = int(numbers[2][:10]) if len(numbers) > 2 else 255
        raw = header[1] == b"4" or largest == 255 or (largest == 65535 and not is_rgb)
        slow = 0 if raw else len(data) // (1 if largest < 256 else 2)
    if slow > _MAX_SLOW:
        raise LimitError("is a text or a scaled PPM of more than 4 million values, too slow to decode: convert it")


def _check_jpeg2000(data: bytes, max_pixels: int) -> None:
    """The memory that OpenJPEG takes, from the first codestream's image size, precincts and code blocks."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or start + 42 > len(data):
        return
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6I", data, start + 8)
    (components,) = struct.unpack_from(">H", data, start + 40)
    width, height = right - left, bottom - top
    check_size(max(width, 0), max(height, 0), max_pixels)
    pixels = width * height
    needed = 8 * pixels * components
    place = start + 4 + int.from_bytes(data[start + 4 : start + 6], "big")
    while place + 14 < len(data) and data[place] == 0xFF and data[place + 1] not in (0x90, 0xD9):
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == 0x52:  # coding style
            levels = data[place + 9]
            block = 1 << (data[place + 10] & 15) + (data[place + 11] & 15) + 4
            sizes = data[place + 14 : place + 2 + length] if data[place + 4] & 1 else b""
            smallest = min((1 << (size & 15) + (size >> 4) for size in sizes[: levels + 1]), default=1 << 30)
            tile = min(tile_width * tile_height, pixels)
            needed += 200 * components * (tile // min(block, smallest) + 1)
        place += 2 + max(length, 2)
    if needed > _MAX_JPEG2000:
        raise LimitError(f"is a JPEG 2000 of {width}x{height} pixels that takes about {needed >> 20} MiB to decode")


_CHECKS = {
    "JPEG": _check_jpeg,
    "PNG": _check_png,
    "WEBP": _check_webp,
    "TIFF": _check_tiff,
    "GIF": _check_gif,
    "BMP": _check_bmp,
    "ICO": _check_icon,
    "PPM": _check_ppm,
    "JPEG2000": _check_jpeg2000,
}
