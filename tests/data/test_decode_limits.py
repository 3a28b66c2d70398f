"""No image takes the process down: nothing but regular files is opened, and small files cannot cost much."""

import io
import os
import re
import socket
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.damaged_images import chunk, damaged, encode, jpeg_join, jpeg_segments, originals, picture, png
from mocov3_hf.data.decode import FORMATS, BadImageError, decode_rgb, encoded_bytes, format_of
from mocov3_hf.data.decode_limits import MAX_BYTES


def tiff(tags: list[tuple[int, int, int, int]], content: bytes = b"") -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def overlapping_metadata() -> bytes:
    """30,000 tags that all refer to the same 100 kB."""
    return tiff([(1000 + tag, 7, 100_000, 8) for tag in range(30_000)], bytes(100_000))


def in_exif_segments(exif: bytes) -> bytes:
    segments, rest = jpeg_segments(bytearray(encode(picture(20, 20, 0), "JPEG")))
    parts = [(0xE1, b"Exif\0\0" + exif[start : start + 60_000]) for start in range(0, len(exif), 60_000)]
    return bytes(jpeg_join([*segments[:1], *parts, *segments[1:]], rest))


def many_scans(scans: int, side: int, progressive: bool) -> bytes:
    """A JPEG of 64x64 pixels that repeats its last scan and declares another size."""
    data = bytearray(encode(picture(64, 64, 0), "JPEG", progressive=progressive))
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + b"\xff\xd9")


def bmp(width: int, height: int, compression: int, content: bytes) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(content), 0, 0, 54) + header + content


def ico(content: bytes) -> bytes:
    return b"\0\0\1\0\1\0" + bytes(8) + struct.pack("<II", len(content), 22) + content


def jpeg2000(side: int, precincts: bool) -> bytes:
    data = bytearray(encode(picture(64, 64, 0), "JPEG2000", no_jp2=True, precinct_size=(64, 64)))
    data[8:16] = data[24:32] = struct.pack(">II", side, side)
    place = data.index(b"\xff\x52")
    if precincts:
        data[place + 14 : place + 15 + data[place + 9]] = bytes(data[place + 9] + 1)
    return bytes(data)


PIXEL, BOMB = b"\0abc", zlib.compress(bytes(9_000_000))
GRAY = [(256, 4, 1, 3000), (257, 4, 1, 3000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
TOO_EXPENSIVE = {
    "JPEG: overlapping metadata": (in_exif_segments(overlapping_metadata()), "metadata of 3000000000 bytes"),
    "JPEG: fill bytes": (b"\xff\xd8" + b"\xff" * 2_000_000, "65537 bytes of padding"),
    "JPEG: bytes between segments": (b"\xff\xd8\xff\xe0\0\2" + bytes(2_000_000), "2000000 bytes of padding"),
    "JPEG: stuffed bytes": (b"\xff\xd8\xff\xe0\0\2" + b"\xff\0" * 1_000_000, "bytes of padding"),
    "JPEG: segments": (b"\xff\xd8" + b"\xff\xfe\0\2" * 70_000, "more than 65536 segments"),
    "JPEG: scans": (many_scans(1100, 64, True), "64x64 pixels in 11.. scans"),
    "JPEG: large scans": (many_scans(100, 9000, True), "9000x9000 pixels in 1.. scans"),
    "PNG: size": (png(60_000, 60_000, 8, 2, PIXEL), "60000x60000 pixels, more than the allowed"),
    "PNG: overlapping metadata": (png(1, 1, 8, 2, PIXEL, more=chunk(b"eXIf", overlapping_metadata())), "metadata of"),
    "PNG: chunks": (png(1, 1, 8, 2, PIXEL, more=chunk(b"aaAa", b"") * 1_100_000), "more than 1048576 chunks"),
    "PNG: profile": (png(1, 1, 8, 2, PIXEL, more=chunk(b"iCCP", b"x\0\0" + BOMB)), "Decompressed data too large"),
    "PNG: text": (png(1, 1, 8, 2, PIXEL, more=chunk(b"zTXt", b"x\0\0" + BOMB)), "Decompressed data too large"),
    "WebP: overlapping metadata": (
        b"RIFF\0\0\0\0WEBPEXIF" + struct.pack("<I", len(overlapping_metadata())) + overlapping_metadata(),
        "metadata of 3000000000 bytes",
    ),
    "TIFF: overlapping metadata": (overlapping_metadata(), "metadata of 3000000000 bytes"),
    "TIFF: strips": (tiff([*GRAY, (273, 4, 300_000, 200), (278, 4, 1, 1)], bytes(1_300_000)), "300000 strips"),
    "TIFF: tile": (tiff([*GRAY, (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 8)]), "tiles of 30000x30000"),
    "GIF: comments": (b"GIF89a\1\0\1\0\0\0\0!\xfe" + (b"\xff" + bytes(255)) * 70_000, "bytes before its first image"),
    "BMP: run-length, pixels": (bmp(13_000, 13_000, 1, b"\1\1\0\0" * 9), "run-length encoded BMP of 13000x13000"),
    "BMP: run-length, bytes": (bmp(9, 9, 1, b"\0\0" * 5_000_000), "run-length encoded BMP of 9x9"),
    "BMP: size": (bmp(60_000, 60_000, 0, b""), "has 3600000000 pixels"),
    "PPM: scaled": (b"P6 3000 2000 254\n" + bytes(18_000_000), "too slow to decode"),
    "PPM: text": (b"P3 3000 2000 255\n" + b"1 " * 3_000_000, "too slow to decode"),
    "PPM: comments": (b"P3 30 20 255\n" + b"#\n" * 2000, "more than 1000 comments"),
    "ICO: size": (ico(png(60_000, 60_000, 8, 2, PIXEL)), "60000x60000 pixels, more than the allowed"),
    "ICO: bytes": (b"\0\0\1\0\1\0" + bytes(9 << 20), "allowed for icons"),
    "JPEG 2000: pixels": (jpeg2000(13_000, False), "13000x13000 pixels that takes about"),
    "JPEG 2000: precincts": (jpeg2000(3000, True), "3000x3000 pixels that takes about"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_EXPENSIVE)
def test_small_files_that_cost_much_are_refused(name):
    data, reason = TOO_EXPENSIVE[name]
    start = time.process_time()
    with pytest.raises(BadImageError, match=reason) as caught:
        decode_rgb(data)
    assert time.process_time() - start < 3
    assert str(caught.value).isprintable()


def test_images_with_much_metadata_are_not_refused():
    """What real cameras and editors write: profiles, thumbnails, megabytes of XMP, many scans and chunks."""
    photo = picture(200, 150, 0)
    segments, rest = jpeg_segments(bytearray(encode(photo, "JPEG", progressive=True)))
    extended = [(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000))] * 60
    exif = tiff([(0x010E, 2, 50_000, 100), (0x9286, 7, 60_000, 100)], bytes(61_000))
    exif_segment = (0xE1, b"Exif\0\0" + exif[:65_000])
    for data in (
        bytes(jpeg_join([*segments[:1], exif_segment, *extended, *segments[1:]], rest)),
        encode(photo, "PNG", icc_profile=bytes(900_000), exif=exif),
        encode(photo, "TIFF", icc_profile=bytes(2_000_000), tiffinfo={278: 1}),
        encode(photo, "GIF", comment=b"x" * 100_000),
        encode(photo, "WEBP", icc_profile=bytes(900_000), exif=exif, xmp=bytes(900_000)),
    ):
        assert decode_rgb(data).shape == (3, 150, 200)


def test_a_filter_byte_that_does_not_exist(tmp_path):
    """torchvision's decoder ended the process with a segmentation fault."""
    for color_type, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        for filter_type in (5, 7, 255):
            rows = b"".join(bytes([filter_type]) + bytes(range(12 * channels)) for _ in range(10))
            path = tmp_path / f"{color_type}.png"
            path.write_bytes(png(12, 10, 8, color_type, rows))
            with pytest.raises(BadImageError, match=r"cannot be decoded: .*\.png\)$"):
                decode_rgb(path)


@pytest.fixture(scope="module")
def found():
    return originals()


def test_damaged_images_are_decoded_as_by_pil(found):
    """A short form of benchmarks/fuzz_decode.py, in this process."""
    outcomes = {"equal": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(4 * len(found)):
            name, damage, data = damaged(index, seed=2, found=found)
            ours, reason = outcome(data)
            assert reason.isprintable(), index
            assert "_io." not in reason, index
            theirs = by_pil(data)
            if ours is None or theirs is None:
                # A limit is the only reason to refuse what PIL accepts.
                assert ours is None, (index, name, damage)
                assert theirs is None or theirs.size > 3_000_000, (index, name, damage)
                outcomes["refused"] += 1
            else:
                # Releases of libjpeg guess differently what is missing of a progressive file.
                same = ours.shape == theirs.shape if "progressive" in name else np.array_equal(ours, theirs)
                assert same, (index, name, damage)
                outcomes["equal"] += 1
    assert min(outcomes.values()) > len(found)


def outcome(data: bytes) -> tuple[np.ndarray | None, str]:
    """The pixels, or why the file is refused."""
    try:
        return decode_rgb(data, max_pixels=1_000_000).permute(1, 2, 0).numpy(), ""
    except BadImageError as error:
        return None, str(error)


def by_pil(data: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:
        return None


def test_whole_images_of_every_format_are_decoded(found):
    assert {format_of(data) for data in found.values()} >= set(FORMATS) - {"AVIF", "JPEG2000"}
    for name, data in found.items():
        assert np.array_equal(decode_rgb(data).permute(1, 2, 0).numpy(), by_pil(data)), name


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    pipe, link, unix = tmp_path / "pipe.jpg", tmp_path / "link.jpg", socket.socket(socket.AF_UNIX)
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    unix.bind("socket.jpg")
    circle = tmp_path / "circle.jpg"
    circle.symlink_to(circle)
    for path in (pipe, link, "/dev/zero", "/dev/tty", "socket.jpg"):
        with pytest.raises(BadImageError, match="it is a device, pipe or socket"):
            decode_rgb(path)
    for path, reason in {
        tmp_path: "Is a directory",
        circle: "Too many levels of symbolic links",
        "a\0b.jpg": r"embedded null (byte|character in path) \(a\\x00b\.jpg\)$",
        "gone\n\x1b[31m.jpg": r"No such file or directory \(gone\\n\\x1b\[31m\.jpg\)$",
        "gone\udcff.jpg": r"\(gone\\udcff\.jpg\)$",
        "x" * 300: "File name too long",
        "iVBORw0KGgo" * 10_000: r"is a text of 110000 characters, neither bytes nor a path: iVBORw0KGgo.{0,40}$",
    }.items():
        with pytest.raises(BadImageError, match=reason) as caught:
            decode_rgb(path)
        assert str(caught.value).isprintable()
    unix.close()


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    path, whole = tmp_path / "image.jpg", tmp_path / "whole.jpg"
    os.mkfifo(path)
    whole.write_bytes(encode(picture(9, 9, 0), "JPEG"))
    status = os.stat(whole)
    monkeypatch.setattr("mocov3_hf.data.decode.os.stat", lambda _: status)
    with pytest.raises(BadImageError, match="device, pipe or socket"):
        decode_rgb(path)


def test_files_that_are_too_large_are_not_read(tmp_path):
    path = tmp_path / "sparse.jpg"
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BadImageError, match=f"has {MAX_BYTES + 1} bytes, more than the allowed"):
        decode_rgb(path)


def test_reasons_are_one_short_line_with_the_path(tmp_path):
    path = tmp_path / "page.jpg"
    path.write_bytes(b"<!DOCTYPE html>\n\x1b[2J" + bytes(5000))
    with pytest.raises(BadImageError) as caught:
        decode_rgb(path)
    error = caught.value
    assert (error.path, str(error)) == (str(path), f"{error.reason} ({path})")
    assert re.fullmatch(r"cannot be decoded: it is not JPEG, .*, it begins with b'<!DOCTYPE ht'", error.reason)
    for value in (5, ["x"], {"bytes": None}):
        with pytest.raises(BadImageError, match="is neither bytes nor a path, but"):
            decode_rgb(value)
    for start in (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4", b"8BPS", b"SIMPLE  =", b"/* XPM */"):
        with pytest.raises(BadImageError, match="cannot be decoded: it is not JPEG"):
            encoded_bytes(start) and decode_rgb(start + bytes(100))


def test_warnings_are_as_before_after_decoding_in_threads(found):
    """`warnings.catch_warnings` in several threads can leave all warnings ignored."""
    before = list(warnings.filters)
    images = [data for name, data in found.items() if name.startswith(("tiff", "webp", "png"))]
    threads = [threading.Thread(target=lambda: [decode_rgb(data) for data in images]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
