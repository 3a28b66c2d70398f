"""JPEGs with a header so simple that PIL need not open them, as most photographs: decoding them takes less time."""

import re
import struct


_MAX_TAGS = 64
# The Exif tags that PIL reads, and their types: orientation, resolution and its unit.
_PLAIN_TAGS = {0x0112: 3, 0x011A: 5, 0x0128: 3}


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """
    Width and height of a gray or RGB JPEG that PIL certainly opens, in one scan and upright: its header has nothing
    but complete tables, comments, and segments of applications that do not change its pixels. None for all others.
    """
    if data[:2] != b"\xff\xd8":
        return None
    place, frame, has_exif = 2, None, False
    for _ in range(64):
        segment = data[place : place + 4]
        if len(segment) < 4 or segment[0] != 0xFF:
            return None
        marker, length = segment[1], segment[2] << 8 | segment[3]
        content = place + 4
        place += 2 + length
        if place > len(data) or length < 2:
            return None
        if marker in (0xC4, 0xDD, 0xFE):  # Huffman tables, restart interval, comment: PIL only skips them
            continue
        if marker == 0xDB:
            while content < place:  # 64 values of one or two bytes each, after a byte that says which
                content += 65 if data[content] < 16 else 129
            if content != place:
                return None
        elif marker in (0xC0, 0xC1):
            components = data[content + 5] if length > 8 else 0
            if frame is not None or components not in (1, 3) or length != 8 + 3 * components or data[content] != 8:
                return None
            height, width = data[content + 1] << 8 | data[content + 2], data[content + 3] << 8 | data[content + 4]
            frame = width, height, components
        elif marker == 0xDA:
            return None if frame is None or data[content] != frame[2] or length != 6 + 2 * frame[2] else frame[:2]
        elif not 0xE0 <= marker <= 0xEF or not _is_harmless(marker, data[content:place], has_exif):
            return None
        has_exif |= marker == 0xE1 and data[content : content + 4] == b"Exif"
    return None


def _is_harmless(marker: int, content: bytes, has_exif: bool) -> bool:
    """Whether PIL certainly reads the segment of an application, and the image is upright as it is."""
    if marker == 0xE0:  # JFIF
        return len(content) >= 14
    if marker == 0xE1 and content[:4] == b"Exif":
        return not has_exif and content[4:6] == b"\0\0" and _is_upright(content[6:])
    if marker == 0xE1:  # XMP
        return all(digit in b"01" for digit in re.findall(rb'tiff:Orientation(?:="|>)([0-9])', content))
    if marker == 0xE2:  # color profiles, which are not applied, and references to other images
        return content[:4] != b"MPF\0" and (content[:12] != b"ICC_PROFILE\0" or len(content) >= 14)
    if marker == 0xED:  # Photoshop
        return content[:14] != b"Photoshop 3.0\0" or _is_complete_photoshop(content)
    return marker != 0xEE or len(content) >= 12  # Adobe


def _is_upright(exif: bytes) -> bool:
    """Whether Exif metadata leave the image as it is, and the tags that PIL reads are intact."""
    if exif[:4] not in (b"II*\0", b"MM\0*") or len(exif) < 10:
        return False
    order = "<" if exif[:1] == b"I" else ">"
    (start,) = struct.unpack_from(order + "L", exif, 4)
    if start + 2 > len(exif):
        return False
    (entries,) = struct.unpack_from(order + "H", exif, start)
    directory = exif[start + 2 : start + 2 + 12 * entries]
    if entries > _MAX_TAGS or len(directory) < 12 * entries:
        return False
    for tag, kind, count, value in struct.iter_unpack(order + "HHLL", directory):
        known = _PLAIN_TAGS.get(tag)
        if known is not None and (kind != known or count != 1 or (kind == 5 and value + 8 > len(exif))):
            return False
        if tag == 0x0112 and (value if order == "<" else value >> 16) & 0xFFFF > 1:
            return False
    return True


def _is_complete_photoshop(content: bytes) -> bool:
    place = 14
    while content[place : place + 4] == b"8BIM":
        if place + 7 > len(content):
            return False
        place += 7 + content[place + 6]
        place += place & 1
        if place + 4 > len(content):
            return True
        place += 4 + int.from_bytes(content[place : place + 4], "big")
        place += place & 1
    return True
