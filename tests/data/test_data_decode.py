"""Decoding returns PIL's pixels for every format, and one-line reasons for bad images."""

import io
import random
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mocov3_hf.data.decode import BadImageError, decode_rgb, decode_shrunk
from mocov3_hf.data.plain_jpeg import plain_jpeg_size


def reference(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def as_array(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8
    return image.permute(1, 2, 0).numpy()


@pytest.fixture
def zoo(make_picture, encode):
    """name -> encoded image."""
    rgb = Image.fromarray(make_picture(61, 43))
    gray, rgba = rgb.convert("L"), rgb.copy()
    rgba.putalpha(Image.fromarray(make_picture(61, 43, 5, 1)[:, :, 0]))
    la = gray.copy()
    la.putalpha(rgba.getchannel("A"))
    palette = rgb.quantize(40)
    deep = Image.fromarray(make_picture(61, 43, 3, 1)[:, :, 0].astype(np.uint16) * 257)
    frames = [Image.fromarray(make_picture(61, 43, seed)) for seed in range(3)]
    animated = {"save_all": True, "append_images": frames[1:]}
    with_xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    zoo = {
        "jpeg": encode(rgb, "JPEG", quality=92),
        "jpeg 4:4:4": encode(rgb, "JPEG", quality=95, subsampling=0),
        "jpeg 4:2:2": encode(rgb, "JPEG", quality=95, subsampling=1),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True, quality=85),
        "jpeg L": encode(gray, "JPEG"),
        "jpeg CMYK": encode(rgb.convert("CMYK"), "JPEG"),
        "jpeg RGB stored": encode(rgb, "JPEG", keep_rgb=True),
        "jpeg with comment": encode(rgb, "JPEG", comment=b"Exif\0\0 no"),
        "jpeg XMP orientation": encode(rgb, "JPEG", xmp=with_xmp),
        "png": encode(rgb, "PNG"),
        "png L": encode(gray, "PNG"),
        "png 1 bit": encode(gray.convert("1"), "PNG"),
        "png LA": encode(la, "PNG"),
        "png RGBA": encode(rgba, "PNG"),
        "png P": encode(palette, "PNG"),
        "png P transparent": encode(palette, "PNG", transparency=3),
        "png RGB transparent": encode(rgb, "PNG", transparency=(10, 20, 30)),
        "png 16 bit": encode(deep, "PNG"),
        "png animated": encode(frames[0], "PNG", **animated),
        "webp": encode(rgb, "WEBP", quality=80),
        "webp lossless RGBA": encode(rgba, "WEBP", lossless=True),
        "webp animated": encode(frames[0], "WEBP", **animated),
        "bmp": encode(rgb, "BMP"),
        "bmp L": encode(gray, "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "tiff lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff 16 bit": encode(deep, "TIFF"),
        "tiff CMYK": encode(rgb.convert("CMYK"), "TIFF"),
        "gif": encode(palette, "GIF"),
        "gif animated": encode(frames[0], "GIF", **animated),
        "one pixel wide": encode(rgb.resize((1, 300)), "JPEG"),
        "one pixel high": encode(rgb.resize((300, 1)), "PNG"),
        "one pixel": encode(rgb.resize((1, 1)), "JPEG"),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        zoo[f"jpeg Exif {orientation}"] = encode(rgb, "JPEG", exif=exif, quality=92)
        zoo[f"jpeg progressive Exif {orientation}"] = encode(rgb, "JPEG", exif=exif, progressive=True)
    for kind in ("PNG", "WEBP", "TIFF"):
        zoo[f"{kind} Exif 6"] = encode(rgb, kind, exif=exif_of(6))
    return zoo


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_every_format_gives_the_pixels_of_pil(zoo, tmp_path):
    different = {}
    for name, data in zoo.items():
        expected, found = reference(data), as_array(decode_rgb(data))
        if expected.shape != found.shape or not np.array_equal(expected, found):
            worst = np.abs(expected.astype(int) - found).max() if expected.shape == found.shape else found.shape
            different[name] = worst
    assert not different
    path = tmp_path / "image with spaces.bin"
    path.write_bytes(zoo["jpeg"])
    assert torch.equal(decode_rgb(str(path)), decode_rgb(zoo["jpeg"]))
    assert torch.equal(decode_rgb(path), decode_rgb(zoo["jpeg"]))


def test_without_the_fast_decoders_pil_does_the_work(zoo, monkeypatch):
    expected = {name: decode_rgb(data) for name, data in zoo.items()}
    monkeypatch.setattr("mocov3_hf.data.decode._HAS_OPERATORS", False)
    assert all(torch.equal(decode_rgb(data), expected[name]) for name, data in zoo.items())


@pytest.mark.slow
def test_very_large_images(encode):
    wide = Image.new("RGB", (10_000, 700), (200, 30, 90))
    square = Image.new("L", (10_000, 10_000), 77)
    assert np.array_equal(as_array(decode_rgb(encode(wide, "PNG"))), reference(encode(wide, "PNG")))
    image = decode_rgb(encode(square, "JPEG"))
    assert image.shape == (3, 10_000, 10_000)
    assert (image == 77).all()


def test_bad_images_are_refused_with_a_reason(make_jpeg, make_png, encode, make_picture, tmp_path):
    photo, drawing = make_jpeg(), make_png()
    webp = encode(Image.fromarray(make_picture(50, 50)), "WEBP")
    bomb = bytearray(drawing)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    jpeg_bomb = bytearray(make_jpeg())
    frame = jpeg_bomb.index(b"\xff\xc0")
    jpeg_bomb[frame + 5 : frame + 9] = (65_000).to_bytes(2, "big") * 2
    bad = {
        b"": "is empty",
        b"not an image at all, but a text": "cannot be decoded",
        photo[: len(photo) // 2]: "cannot be decoded",
        photo[:20]: "cannot be decoded",
        drawing[: len(drawing) // 2]: "cannot be decoded",
        drawing[:20]: "is truncated",
        webp[:30]: "cannot be decoded",
        bytes(bomb): "60000x60000 pixels, more than the",
        bytes(jpeg_bomb): "65000x65000 pixels, more than the",
        None: "neither bytes nor a path",
        str(tmp_path / "gone.jpg"): "cannot be read: No such file",
        str(tmp_path): "cannot be read: Is a directory",
    }
    for data, reason in bad.items():
        with pytest.raises(BadImageError, match=reason) as caught:
            decode_rgb(data)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadImageError, match="more than the allowed 1000"):
        decode_rgb(photo, max_pixels=1000)


def test_damaged_bytes_raise_nothing_else(zoo):
    generator = random.Random(0)
    for data in list(zoo.values())[:32]:
        for _ in range(6):
            damaged = bytearray(data)
            for _ in range(generator.randrange(1, 12)):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            try:
                image = decode_rgb(bytes(damaged[: generator.randrange(1, len(damaged) + 1)]), max_pixels=1_000_000)
            except BadImageError:
                continue
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_smaller_on_request(make_picture, encode, orientation):
    photo = encode(Image.fromarray(make_picture(1400, 1000)), "JPEG", quality=90, exif=exif_of(orientation))
    true_size = (1000, 1400) if orientation == 1 else (1400, 1000)
    asked = []

    def choose(height, width):
        asked.append((height, width))
        return 4

    image, *size = decode_shrunk(photo, choose)
    assert asked == [true_size]
    assert tuple(size) == true_size
    assert image.shape == (3, true_size[0] // 4, true_size[1] // 4)
    exact = torch.nn.functional.interpolate(decode_rgb(photo)[None].float(), size=image.shape[1:], mode="area")[0]
    assert (image.float() - exact).abs().mean() < 1
    assert decode_shrunk(photo, lambda height, width: 1)[0].shape[1:] == true_size


def test_small_jpegs_are_never_decoded_smaller(make_jpeg):
    def refuse(height, width):
        raise AssertionError("asked for a small image")

    assert decode_shrunk(make_jpeg(width=500, height=375), refuse)[0].shape == (3, 375, 500)


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


def exif_segment(orientation: int, kind: int = 3) -> bytes:
    entry = struct.pack(">HHLHH", 0x0112, kind, 1, orientation, 0)
    return segment(0xE1, b"Exif\0\0MM\0*" + struct.pack(">LH", 8, 1) + entry + bytes(4))


XMP = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="%d"/>'
RESOLUTION = b"Photoshop 3.0\x008BIM\x03\xed\0\0" + (16).to_bytes(4, "big") + bytes(16)


@pytest.mark.parametrize(
    ("is_plain", "header"),
    [
        (True, b""),
        (True, exif_segment(1)),
        (True, segment(0xE1, XMP % 1)),
        (True, segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(500))),
        (True, segment(0xE2, b"ICC_PROFILE\0\1\2profile cut short")),
        (True, segment(0xED, RESOLUTION)),
        (True, segment(0xEC, b"Ducky")),
        (False, exif_segment(6)),
        (False, exif_segment(6, kind=1)),
        (False, exif_segment(1) + exif_segment(6)),
        (False, exif_segment(1)[:-10]),
        (False, segment(0xE1, b"Exif\0\0not a TIFF header")),
        (False, segment(0xE1, XMP % 6)),
        (False, segment(0xE2, b"MPF\0" + bytes(20))),
        (False, segment(0xE2, b"ICC_PROFILE\0")),
        (False, segment(0xED, RESOLUTION + b"8BIM")),
    ],
)
def test_segments_of_applications_in_jpegs_that_are_decoded_without_pil(make_jpeg, is_plain, header):
    data = make_jpeg()
    data = data[:2] + header + data[2:]
    assert plain_jpeg_size(data) == ((60, 44) if is_plain else None)
    try:
        expected = reference(data)
    except Exception:
        with pytest.raises(BadImageError):
            decode_rgb(data)
        return
    np.testing.assert_array_equal(as_array(decode_rgb(data)), expected)
