"""Small images of every format that PIL can write, and damage to them, for `fuzz_decode.py` and the tests.

found = originals()
name, damage, data = damaged(17, seed=0, found=found)
"""

import io
import random
import struct
import sys
import zlib

import numpy as np
from PIL import Image, features


EXTREMES = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 127, 128, 254, 255, 256, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def picture(width: int, height: int, seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = generator.integers(-8, 9, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def originals() -> dict[str, bytes]:
    """Name -> encoded image, of every format, color type and compression that PIL can write."""
    rgb = picture(61, 43, 0)
    gray, rgba, cmyk, palette = rgb.convert("L"), rgb.convert("RGBA"), rgb.convert("CMYK"), rgb.quantize(40)
    rgba.putalpha(picture(61, 43, 1).convert("L"))
    la = rgba.convert("LA")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    floating = Image.fromarray(np.asarray(gray).astype(np.float32))
    frames = {"save_all": True, "append_images": [picture(61, 43, 2), picture(61, 43, 3)]}
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0132] = 6, "a description", "2020:02:02 02:02:02"
    exif.get_ifd(0x8769)[0x9003] = "2020:02:02 02:02:02"
    upright = Image.Exif()
    upright[0x0112], upright[0x011A], upright[0x0128] = 1, 72.0, 2
    profile = bytes(range(256)) * 12
    found = {
        "jpeg": encode(rgb, "JPEG", quality=90),
        "jpeg 444": encode(rgb, "JPEG", subsampling=0),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg progressive L": encode(gray, "JPEG", progressive=True),
        "jpeg L": encode(gray, "JPEG"),
        "jpeg CMYK": encode(cmyk, "JPEG"),
        "jpeg RGB": encode(rgb, "JPEG", keep_rgb=True),
        "jpeg restarts": encode(rgb, "JPEG", restart_marker_blocks=2),
        "jpeg Exif": encode(rgb, "JPEG", exif=exif, icc_profile=profile, comment=b"comment"),
        "jpeg upright": encode(rgb, "JPEG", exif=upright, icc_profile=profile, xmp=b'<x tiff:Orientation="1"/>'),
        "jpeg Exif progressive": encode(gray, "JPEG", exif=exif, progressive=True, dpi=(72, 72)),
        "mpo": encode(rgb, "MPO", save_all=True, append_images=[picture(61, 43, 2)]),
        "gif": encode(palette, "GIF"),
        "gif interlaced": encode(gray, "GIF", interlace=1, comment=b"comment"),
        "gif animated": encode(rgb, "GIF", **frames),
        "gif transparent": encode(palette, "GIF", transparency=3),
        "webp": encode(rgb, "WEBP", exif=exif),
        "webp lossless": encode(rgba, "WEBP", lossless=True),
        "webp animated": encode(rgb, "WEBP", **frames),
        "ppm": encode(rgb, "PPM"),
        "pgm": encode(gray, "PPM"),
        "pgm 16": encode(deep, "PPM"),
        "pbm": encode(gray.convert("1"), "PPM"),
        "pfm": encode(floating, "PPM"),
        "ppm text": b"P3\n# text\n12 9\n255\n" + b" ".join(b"%d" % (value % 256) for value in range(0, 3240, 10)),
        "pgm 12": b"P5 12 9 4095\n" + b"".join(struct.pack(">H", value) for value in range(0, 3996, 37)),
        "pbm text": b"P1 9 7\n" + b"0 1 1 " * 21,
        "ico": encode(rgba.resize((48, 48)), "ICO"),
        "ico bmp": encode(rgba.resize((48, 48)), "ICO", bitmap_format="bmp", sizes=[(16, 16), (32, 32)]),
        "png interlaced": interlaced_png(),
        "bmp rle": run_length_bmp(),
    }
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        found[f"bmp {mode}"] = encode(palette if mode == "P" else rgba.convert(mode), "BMP")
    for name, image in {"1": gray.convert("1"), "L": gray, "LA": la, "P": palette, "RGB": rgb, "RGBA": rgba}.items():
        found[f"png {name}"] = encode(image, "PNG")
    found["png I;16"] = encode(deep, "PNG")
    found["png 2 bit"] = encode(rgb.quantize(4), "PNG", bits=2)
    found["png tRNS"] = encode(rgb, "PNG", transparency=(10, 20, 30))
    found["png metadata"] = encode(rgb, "PNG", exif=exif, icc_profile=profile, dpi=(72, 72))
    found["png animated"] = encode(rgb, "PNG", **frames)
    for color_type, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        rows = b"".join(bytes([row % 5]) + bytes(range(channels * 22)) for row in range(9))
        found[f"png 16 bit type {color_type}"] = png(11, 9, 16, color_type, rows)
    for name, image in {"1": gray.convert("1"), "L": gray, "P": palette, "RGB": rgb, "RGBA": rgba, "CMYK": cmyk,
                        "I;16": deep, "F": floating}.items():  # fmt: skip
        found[f"tiff {name}"] = encode(image, "TIFF")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"):
        try:
            found[f"tiff {compression}"] = encode(rgb, "TIFF", compression=compression)
        except (OSError, ValueError, RuntimeError):
            print(f"PIL writes no TIFF with {compression}", file=sys.stderr)
    for compression in ("group3", "group4", "tiff_ccitt"):
        found[f"tiff {compression}"] = encode(gray.convert("1"), "TIFF", compression=compression)
    found["tiff Exif"] = encode(rgb, "TIFF", exif=exif, icc_profile=profile)
    found["tiff tiled"] = encode(rgb, "TIFF", compression="tiff_lzw", tiffinfo={322: 32, 323: 32})
    found["tiff pages"] = encode(rgb, "TIFF", **frames)
    if features.check("jpg_2000"):
        found["jp2"] = encode(rgb, "JPEG2000")
        found["jp2 gray 16"] = encode(deep, "JPEG2000")
        found["j2k tiles"] = encode(rgba, "JPEG2000", no_jp2=True, tile_size=(32, 32), num_resolutions=3)
    if "avif" in features.get_supported():
        found["avif"] = encode(rgb, "AVIF", exif=exif, speed=10)
        found["avif animated"] = encode(rgb, "AVIF", speed=10, **frames)
    return found


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, interlace: int = 0, more: bytes = b""):
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, interlace)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + more + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def interlaced_png() -> bytes:
    """An 8-bit RGB image in the seven passes of Adam7."""
    rows = b""
    for left, top, right, down in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):  # fmt: skip  # noqa: E501
        columns, lines = len(range(left, 21, right)), len(range(top, 17, down))
        rows += b"".join(bytes([line % 5]) + bytes(range(3 * columns)) for line in range(lines)) if columns else b""
    return png(21, 17, 8, 2, rows, interlace=1)


def run_length_bmp() -> bytes:
    """An image of 16x8 pixels with runs, literal pixels, line ends and a jump."""
    body = b"\x08\x05\x08\x06\0\0" + b"\0\x04\1\2\3\4\x0c\7\0\0" + b"\0\2\3\1" + b"\x0d\x09\0\0" * 5 + b"\0\1"
    palette = b"".join(bytes([index, 255 - index, index // 2, 0]) for index in range(256))
    header = struct.pack("<IiiHHIIiiII", 40, 16, 8, 1, 8, 1, len(body), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + palette + body


def damaged(index: int, seed: int, found: dict[str, bytes]) -> tuple[str, str, bytes]:
    """(name of the original, kind of damage, bytes) of file number `index` of a seed."""
    draw = random.Random(f"{seed}:{index}")
    name = list(found)[index % len(found)]
    data = bytearray(found[name])
    kinds = [flip, truncate, header, splice]
    # Half of the edits know the format, because most others are caught by a checksum.
    own = {
        b"\x89PNG": [png_edit, png_rows, png_insert],
        b"\xff\xd8\xff\xe0": [jpeg_edit, jpeg_scan, jpeg_insert],
        b"\xff\xd8\xff\xe1": [jpeg_edit, jpeg_scan, jpeg_insert],
        b"II*\0": [tiff_edit],
        b"MM\0*": [tiff_edit],
    }
    special = own.get(bytes(data[:4]))
    damage = draw.choice(special) if special and draw.random() < 0.5 else draw.choice(kinds)
    data = damage(data, draw)
    if draw.random() < 0.1:
        data = flip(data, draw)
    return name, damage.__name__, bytes(data)


def flip(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 1, 2, 4, 12))):
        place = draw.randrange(len(data))
        data[place] = draw.choice((data[place] ^ (1 << draw.randrange(8)), draw.randrange(256), 0, 255))
    return data


def truncate(data: bytearray, draw: random.Random) -> bytearray:
    keep = draw.choice((draw.randrange(1, len(data) + 1), len(data) - draw.randrange(1, 20)))
    return data[: max(1, keep)] + bytes(draw.choice((0, 0, 5, 2000)))


def header(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 1, 2, 3))):
        order, size = draw.choice(("little", "big")), draw.choice((1, 2, 2, 4, 4))
        place = draw.randrange(min(len(data), draw.choice((40, 120, 600))))
        number = draw.choice((*EXTREMES, draw.randrange(2**32))) % 256**size
        data[place : place + size] = number.to_bytes(size, order)
    return data


def splice(data: bytearray, draw: random.Random) -> bytearray:
    """Remove, repeat or move a part."""
    start = draw.randrange(len(data))
    part = data[start : start + draw.choice((1, 2, 4, 16, 300))]
    rest = data[:start] + data[start + len(part) :]
    place = draw.randrange(len(rest) + 1)
    return draw.choice((rest, data[:place] + part + data[place:], rest[:place] + part + rest[place:])) or bytearray(1)


def png_chunks(data: bytearray) -> list[tuple[bytes, bytes]]:
    place, chunks = 8, []
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((bytes(data[place + 4 : place + 8]), bytes(data[place + 8 : place + 8 + length])))
        place += 12 + length
    return chunks


def png_join(chunks: list[tuple[bytes, bytes]]) -> bytearray:
    return bytearray(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in chunks))


def png_edit(data: bytearray, draw: random.Random) -> bytearray:
    """Change, cut, move or repeat chunks, with right checksums."""
    chunks = png_chunks(data)
    place = draw.randrange(len(chunks))
    kind, content = chunks[place]
    how = draw.randrange(4)
    if how == 0 and content:
        chunks[place] = (kind, bytes(header(flip(bytearray(content), draw), draw)))
    elif how == 1 and content:
        chunks[place] = (kind, content[: draw.randrange(len(content))])
    elif how == 2:
        chunks.insert(draw.randrange(len(chunks)), chunks.pop(place))
    else:
        chunks.insert(place, (draw.choice((kind, b"tRNS", b"PLTE", b"fdAT", b"sPLT", b"gAMA")), content))
    return png_join(chunks)


def png_rows(data: bytearray, draw: random.Random) -> bytearray:
    """Change the filtered rows: filter types that do not exist, too few or too many bytes, a cut or damaged stream."""
    chunks = png_chunks(data)
    rows = bytearray(zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT")))
    first = next(place for place, (kind, _) in enumerate(chunks) if kind == b"IDAT")
    how = draw.randrange(4)
    if how == 0:
        rows[draw.choice((0, draw.randrange(len(rows))))] = draw.choice((5, 6, 7, 255, 4, 3))
    elif how == 1:
        rows = rows[: draw.randrange(len(rows))]
    elif how == 2:
        rows += bytes(draw.choice((1, 100, 100_000)))
    stream = bytearray(zlib.compress(bytes(rows), draw.choice((0, 1, 9))))
    if how == 3:
        stream = draw.choice((flip, truncate))(stream, draw)
    cut = draw.randrange(len(stream) + 1)
    parts = [(b"IDAT", bytes(stream))] if draw.random() < 0.5 else [(b"IDAT", bytes(stream[:cut])), (b"IDAT", bytes(stream[cut:]))]  # fmt: skip  # noqa: E501
    rest = [item for item in chunks[first:] if item[0] != b"IDAT"]
    return png_join(chunks[:first] + parts + rest)


def png_insert(data: bytearray, draw: random.Random) -> bytearray:
    """Insert metadata anywhere: Exif with an orientation (also after the pixels), bombs of text and profiles."""
    chunks = png_chunks(data)
    bomb = zlib.compress(bytes(draw.choice((10, 1_048_576, 1_048_577, 5_000_000))))
    kind, content = draw.choice(
        (
            (b"eXIf", orientation(draw)),
            (b"iCCP", b"name\0\0" + bomb),
            (b"zTXt", b"name\0\0" + bomb),
            (b"iTXt", b"name\0\1\0\0\0" + bomb),
            (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(draw)),
            (b"tEXt", b"Raw profile type exif\0\nexif\n    34\n" + b"Exif\0\0".hex().encode() + b"zz"),
            (b"tEXt", bytes(draw.randrange(256) for _ in range(40))),
            (b"acTL", struct.pack(">II", draw.choice((0, 1, 2, 2**31)), 0)),
            (b"fcTL", struct.pack(">IIIIIHHBB", 0, 61, 43, draw.choice((0, 3)), 0, 0, 1, draw.randrange(4), 0)),
            (b"tRNS", bytes(draw.choice((0, 1, 2, 6, 256)))),
            (b"pHYs", bytes(draw.randrange(12))),
        )
    )
    chunks.insert(draw.randrange(1, len(chunks) + 1), (kind, content))
    return png_join(chunks)


def orientation(draw: random.Random) -> bytes:
    """Exif metadata with an orientation, sometimes of a strange type or with tags that refer to the same bytes."""
    kind, count = draw.choice(((3, 1), (3, 1), (3, 2), (4, 1), (1, 1), (2, 2), (5, 1), (9, 1), (13, 1), (99, 1)))
    value = draw.choice((b"\0\x06", b"\0\3", b"\0\0", b"\0\x09", b"6\0")) + b"\0\0"
    entries = [struct.pack(">HHI", 0x0112, kind, count) + value]
    for _ in range(draw.choice((0, 0, 1, 3, 300))):
        entries.append(struct.pack(">HHII", draw.randrange(65536), draw.choice((1, 2, 7)), draw.randrange(5000), 0))
    draw.shuffle(entries)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)


def xmp(draw: random.Random) -> bytes:
    return (
        b'<x><d tiff:Orientation="%d"/></x>' % draw.randrange(12) if draw.random() < 0.7 else b"\xff<tiff:Orientation>"
    )


def jpeg_segments(data: bytearray) -> tuple[list[tuple[int, bytes]], bytes]:
    """(marker, content) up to the first scan, and the rest."""
    place, segments = 2, []
    while place + 4 <= len(data):
        marker, (length,) = data[place + 1], struct.unpack_from(">H", data, place + 2)
        segments.append((marker, bytes(data[place + 4 : place + 2 + length])))
        place += 2 + length
        if marker == 0xDA:
            break
    return segments, bytes(data[place:])


def jpeg_join(segments: list[tuple[int, bytes]], rest: bytes) -> bytearray:
    parts = [struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content for marker, content in segments]
    return bytearray(b"\xff\xd8" + b"".join(parts) + rest)


def jpeg_edit(data: bytearray, draw: random.Random) -> bytearray:
    """Change, cut, move, repeat or rename segments, with right lengths."""
    segments, rest = jpeg_segments(data)
    place = draw.randrange(len(segments))
    marker, content = segments[place]
    how = draw.randrange(5)
    if how == 0:
        segments[place] = (marker, bytes(header(flip(bytearray(content or b"\0"), draw), draw)))
    elif how == 1:
        segments[place] = (marker, content[: draw.randrange(len(content) + 1)])
    elif how == 2:
        segments.insert(draw.randrange(len(segments)), segments.pop(place))
    elif how == 3:
        segments.insert(place, segments[draw.randrange(len(segments))])
    else:
        segments[place] = (draw.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xCA, 0xDA, 0xDB, 0xDD, 0xE1, 0xEE, 0xFE)), content)  # fmt: skip  # noqa: E501
    return jpeg_join(segments, rest)


def jpeg_scan(data: bytearray, draw: random.Random) -> bytearray:
    """Change the compressed pixels, put markers between them, or cut them."""
    segments, rest = jpeg_segments(data)
    rest, how = bytearray(rest or b"\0"), draw.randrange(4)
    if how == 0:
        rest = flip(rest, draw)
    elif how == 1:
        place = draw.randrange(len(rest))
        rest[place:place] = b"\xff" + bytes([draw.choice((0, 0xC4, 0xD0, 0xD3, 0xD8, 0xD9, 0xDA, 0xDC, 0xFF, 0x01))])
    elif how == 2:
        rest = rest[: draw.randrange(len(rest))] + draw.choice((b"", b"\xff\xd9", b"\xff", b"\0" * 9))
    else:
        rest = rest + draw.choice((b"\xff\xd9", b"\0" * 99, bytes(data)))
    return jpeg_join(segments, bytes(rest))


def jpeg_insert(data: bytearray, draw: random.Random) -> bytearray:
    """Insert metadata: Exif, XMP, profiles, Adobe's color transform, restart intervals, comments."""
    segments, rest = jpeg_segments(data)
    new = draw.choice(
        (
            (0xE1, b"Exif\0\0" + orientation(draw)),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(draw)),
            (0xE2, b"ICC_PROFILE\0" + bytes(draw.choice((0, 1, 2, 200)))),
            (0xE2, b"MPF\0" + orientation(draw)),
            (0xEE, b"Adobe\0d\0\0\0\0" + bytes([draw.randrange(4)])),
            (0xED, b"Photoshop 3.0\x008BIM" + bytes(draw.randrange(256) for _ in range(20))),
            (0xDD, struct.pack(">H", draw.choice((0, 1, 5, 65535)))),
            (0xFE, b"comment" * draw.randrange(20)),
        )
    )
    segments.insert(draw.randrange(len(segments)), new)
    return jpeg_join(segments, rest)


def tiff_edit(data: bytearray, draw: random.Random) -> bytearray:
    """Change the type, number or value of tags of the first directory, or add a tag."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (number,) = struct.unpack_from(order + "H", data, start)
    for _ in range(draw.choice((1, 1, 2))):
        place = start + 2 + 12 * draw.randrange(number)
        tag, kind, count, value = struct.unpack_from(order + "HHII", data, place)
        how = draw.randrange(4)
        if how == 0:
            tag = draw.choice((254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339, 320))  # fmt: skip  # noqa: E501
        elif how == 1:
            kind = draw.randrange(20)
        elif how == 2:
            count = draw.choice((*EXTREMES, draw.randrange(2**32)))
        else:
            value = draw.choice((*EXTREMES, draw.randrange(2**32), 4, 6, 7, 32773, 34712, 50000, 50001, 34925))
        struct.pack_into(order + "HHII", data, place, tag, kind, count, value)
    return data
