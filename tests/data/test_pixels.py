"""Images of any bit depth and number of channels: decoding, scaling, pixels without data, and statistics."""

import importlib.util
import io
import re
import struct

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from mocov3_hf.data.decode import BadImageError, decode_rgb
from mocov3_hf.data.pixel_statistics import estimate_pixels, mean_and_std
from mocov3_hf.data.pixels import decode_image, read_image, unusual_image
from mocov3_hf.processing import PixelFormat
from mocov3_hf.requirements import MissingPackageError


RANDOM = np.random.default_rng(0)
RADIOGRAPH = RANDOM.integers(300, 4396, (20, 30)).astype(np.uint16)
BANDS = RANDOM.integers(0, 4096, (20, 30, 7)).astype(np.uint16)


class Listed(list):
    """A source in memory."""

    def read(self, index):
        return self[index]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tiff(array, **options):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def pages(array, encode):
    first, *rest = map(Image.fromarray, array)
    return encode(first, "TIFF", save_all=True, append_images=rest)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grayscale_keeps_its_levels(encode, kind):
    data = encode(Image.fromarray(RADIOGRAPH), kind)
    values = unusual_image(data)
    assert values.dtype == torch.uint16
    np.testing.assert_array_equal(values[0].numpy(), RADIOGRAPH)
    decoded = decode_image(data, PixelFormat(3, (300, 4395)))
    expected = (RADIOGRAPH.astype(np.float64) - 300) / 4095
    assert decoded.image.shape == (3, 20, 30)
    np.testing.assert_allclose(decoded.image.numpy(), np.broadcast_to(expected, (3, 20, 30)), atol=1e-6)
    # An 8-bit RGB model sees them scaled by their type, not white.
    rgb = read_image(data)
    np.testing.assert_array_equal(rgb[1].numpy(), np.round(RADIOGRAPH / 257).astype(np.uint8))


def test_deep_values_of_other_formats_are_scaled_and_not_clipped(encode):
    deep = PixelFormat(3, (300, 4395))
    expected = np.broadcast_to((RADIOGRAPH.astype(np.float64) - 300) / 4095, (3, 20, 30))
    pgm = b"P5 30 20 65535\n" + RADIOGRAPH.astype(">u2").tobytes()
    for data in (pgm, encode(Image.fromarray(RADIOGRAPH), "JPEG2000")):
        np.testing.assert_allclose(decode_image(data, deep).image.numpy(), expected, atol=1e-6)
        np.testing.assert_array_equal(read_image(data)[1].numpy(), np.round(RADIOGRAPH / 257).astype(np.uint8))
    if tuple(map(int, PIL.__version__.split(".")[:2])) >= (10, 3):  # reads PFM
        pfm = b"Pf\n30 20\n-1.0\n" + RADIOGRAPH[::-1].astype("<f4").tobytes()
        np.testing.assert_allclose(decode_image(pfm, deep).image.numpy(), expected, atol=1e-6)


def test_integers_of_32_and_64_bits_have_no_sign_where_they_have_none():
    counts = RANDOM.integers(0, 2**32, (20, 30), dtype=np.uint32)
    for data in (tiff(counts), tiff(counts, byteorder=">"), tiff(counts.astype(np.uint64)), npy(counts)):
        np.testing.assert_array_equal(unusual_image(data)[0].numpy(), counts)
    signed = counts.view(np.int32)
    np.testing.assert_array_equal(unusual_image(tiff(signed))[0].numpy(), signed)


@pytest.mark.parametrize("options", [{}, {"compression": "lzw", "predictor": True}])
def test_colors_of_16_bits_are_not_truncated(options):
    imagecodecs = pytest.importorskip("imagecodecs")
    colors = RANDOM.integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    for data in (imagecodecs.png_encode(colors), tiff(colors, photometric="rgb", **options)):
        np.testing.assert_array_equal(unusual_image(data).permute(1, 2, 0).numpy(), colors)


def test_signed_values_and_floats(encode):
    tomogram = RANDOM.integers(-1024, 3072, (20, 30)).astype(np.int16)
    decoded = decode_image(tiff(tomogram), PixelFormat(1, (-1024, 3071)))
    np.testing.assert_allclose(decoded.image[0].numpy(), (tomogram + 1024.0) / 4095, atol=1e-6)
    floats = RANDOM.random((20, 30), dtype=np.float32)
    for data in (tiff(floats), encode(Image.fromarray(floats), "TIFF"), npy(floats)):
        np.testing.assert_allclose(decode_image(data, PixelFormat(1, (0, 1))).image[0].numpy(), floats, atol=1e-7)
        assert read_image(data).dtype == torch.uint8  # in 0..1, which is known without a range
    with pytest.raises(BadImageError, match=r"values from -1024 to 3071.*--pixel_range"):
        read_image(tiff(np.int16([[-1024, 3071]])))


def test_white_is_zero_is_inverted():
    values = unusual_image(tiff(RADIOGRAPH, photometric="miniswhite"))
    np.testing.assert_array_equal(values[0].numpy(), 65535 - RADIOGRAPH)


def test_bands_in_every_container(encode):
    found = {
        "interleaved": tiff(BANDS, planarconfig="contig", photometric="minisblack"),
        "planar": tiff(BANDS.transpose(2, 0, 1), planarconfig="separate", photometric="minisblack"),
        "lzw": tiff(BANDS, planarconfig="contig", photometric="minisblack", compression="lzw"),
        "pages": pages(BANDS.transpose(2, 0, 1), encode),
        "npy last": npy(BANDS),
        "npy first": npy(BANDS.transpose(2, 0, 1)),
        "npy fortran": npy(np.asfortranarray(BANDS)),
        "big endian": npy(BANDS.astype(">u2")),
        "array": BANDS,
    }
    for name, data in found.items():
        np.testing.assert_array_equal(unusual_image(data).permute(1, 2, 0).numpy(), BANDS, err_msg=name)
        with pytest.raises(BadImageError, match="channels"):
            decode_image(data, PixelFormat(5, (0, 4095)))


def test_layout_of_arrays():
    square = np.zeros((4, 9, 4), np.uint8)
    with pytest.raises(BadImageError, match="--input_data_format"):
        decode_image(square, PixelFormat(4))
    assert decode_image(square, PixelFormat(4, input_data_format="channels_first")).image.shape == (4, 9, 4)
    assert decode_image(square, PixelFormat(4, input_data_format="channels_last")).image.shape == (4, 4, 9)


def test_alpha_is_not_a_band_unless_it_is_asked_for(encode):
    rgba = RANDOM.integers(0, 256, (20, 30, 4)).astype(np.uint8)
    data = encode(Image.fromarray(rgba), "PNG")
    assert unusual_image(data) is None
    assert decode_image(data, PixelFormat(4)).image.permute(1, 2, 0).numpy().tolist() == rgba.tolist()
    near_infrared = tiff(rgba, photometric="rgb", extrasamples=[0])
    assert unusual_image(near_infrared).shape == (4, 20, 30)
    assert torch.equal(read_image(near_infrared), decode_rgb(near_infrared))
    assert unusual_image(tiff(rgba, photometric="rgb", extrasamples=[2])) is None


def test_8_bit_images_are_those_of_decode_rgb(make_jpeg, make_png, encode):
    document = pages(RANDOM.integers(0, 256, (5, 20, 30)).astype(np.uint8), encode)
    for data in (make_jpeg(), make_png(), document):
        assert torch.equal(decode_image(data).image, decode_rgb(data))
        assert decode_image(data).image.dtype == torch.uint8
    gray = Image.open(io.BytesIO(make_png())).convert("L")
    decoded = decode_image(make_png(), PixelFormat(1)).image
    assert decoded[0].tolist() == np.asarray(gray).tolist()  # PIL's grayscale
    # Among deep images they keep their own range.
    assert torch.equal(decode_image(make_png(), PixelFormat(3, (0, 4095))).image, decode_rgb(make_png()) / 255)


def test_pixels_without_data_are_filled_with_the_mean_of_their_channel():
    image = np.stack([np.full((4, 4), 10.0), np.arange(16.0).reshape(4, 4), np.zeros((4, 4))]).astype(np.float32)
    image[0, 0, 0], image[1, 1, 1], image[1, 2, 2] = np.nan, np.inf, -9999
    image[2] = np.nan
    decoded = decode_image(image, PixelFormat(3, (0, 20), nodata=-9999, fill=(0.1, 0.2, 0.3)))
    kept = [value for value in range(16) if value not in (5, 10)]
    assert decoded.num_filled == 1 + 2 + 16
    assert decoded.image[0].unique().tolist() == [0.5]
    assert decoded.image[1, 1, 1] == decoded.image[1, 2, 2] == pytest.approx(np.mean(kept) / 20)
    assert decoded.image[2].unique().tolist() == [pytest.approx(0.3)]
    with pytest.raises(BadImageError, match="no pixel with data"):
        decode_image(np.full((3, 4, 4), np.nan), PixelFormat(3, (0, 20)))


def test_nodata_that_a_geotiff_declares():
    bands = BANDS.astype(np.float32)
    bands[3, 4, 2] = -9999
    options = {"planarconfig": "contig", "photometric": "minisblack"}
    data = tiff(bands, extratags=[(42113, 2, 6, "-9999", True)], **options)
    assert torch.isnan(unusual_image(data)).sum() == 1
    levels = (BANDS // 17).astype(np.uint8)
    levels[0, 0] = 255
    data = tiff(levels, extratags=[(42113, 2, 4, "255", True)], **options)
    assert decode_image(data, PixelFormat(7)).image[0, 0, 0] == round(levels[..., 0].ravel()[1:].mean())


@pytest.mark.parametrize(
    "data",
    [
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x09\x00" + bytes(100),
        npy(BANDS)[:-1],
        npy(np.array([{"a": 1}], dtype=object)),
        npy(np.zeros((3, 4), "complex64")),
        npy(np.zeros((0, 4, 4), "uint8")),
        npy(np.uint8(3)),
        npy(BANDS).replace(b"(20, 30, 7)", b"(20,3**9,7)"),
        npy(BANDS).replace(b"(20, 30, 7)", b"(20,309999)"),
        b"II*\0" + b"\xff" * 40,
        b"MM\0+" + bytes(40),
        b"\x89PNG\r\n\x1a\n" + bytes(16) + b"\x10" + bytes(30),
        None,
        b"",
    ],
    ids=lambda data: repr(data)[:30],
)
def test_damaged_files_are_bad_images(data):
    with pytest.raises(BadImageError):
        decode_image(data, PixelFormat(7, (0, 4095)))


def test_mutated_files_are_decoded_or_refused(encode):
    """A short form of many thousands: nothing but `BadImageError`, in one line, and no more memory than is allowed."""
    imagecodecs = pytest.importorskip("imagecodecs")
    options = {"planarconfig": "contig", "photometric": "minisblack"}
    files = [tiff(BANDS, **options), tiff(BANDS, compression="lzw", **options), npy(BANDS)]
    files += [tiff(BANDS.astype(np.float32), tile=(16, 16), compression="zlib", predictor=True, **options)]
    files += [imagecodecs.png_encode(BANDS[..., :3].copy()), pages(BANDS.transpose(2, 0, 1), encode)]
    draw = np.random.default_rng(1)
    for number in range(180):
        data = bytearray(files[number % len(files)])
        for _ in range(draw.integers(1, 6)):
            data[draw.integers(min(len(data), 400) if number % 2 else len(data))] = draw.integers(256)
        reason = ""
        try:
            decode_image(bytes(data), PixelFormat(7, (0, 4095)))
        except BadImageError as error:
            reason = str(error)
        assert "\n" not in reason


def test_small_files_cannot_declare_many_pixels(encode):
    data = bytearray(encode(Image.fromarray(RADIOGRAPH), "TIFF", compression="tiff_lzw"))
    height = re.search(rb"\x01\x01[\x03\x04]\x00\x01\x00\x00\x00", data)  # tag 257, one value
    data[height.start() : height.end() + 4] = struct.pack("<HHII", 257, 4, 1, 5 << 20)
    with pytest.raises(BadImageError, match="too few for the shape"):
        unusual_image(bytes(data))


def test_too_large_arrays_are_refused():
    with pytest.raises(BadImageError, match="more than the allowed 100"):
        decode_image(np.zeros((7, 8, 8), np.uint8), PixelFormat(7), max_pixels=100)


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, missing):
    data = tiff(BANDS, planarconfig="contig", photometric="minisblack", compression="lzw")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(MissingPackageError, match=rf'needs {missing}: pip install "mocov3_hf\[multichannel\]"'):
        estimate_pixels(Listed([data]))


# Statistics


def test_8_bit_data_needs_no_statistics(make_jpeg):
    found = estimate_pixels(Listed([make_jpeg(seed) for seed in range(3)]))
    assert found.pixel_format.is_rgb8
    assert found.mean is None
    assert not found.notes


def test_range_of_radiographs(encode):
    images = [np.array(RADIOGRAPH) for _ in range(5)]
    images[0][:1, :1] = 65535  # a marker
    found = estimate_pixels(Listed([encode(Image.fromarray(image), "PNG") for image in images]), num_channels=1)
    low, high = found.pixel_format.pixel_range
    assert low == np.floor(np.percentile(np.stack(images), 0.5))
    assert high == np.ceil(np.percentile(np.stack(images), 99.5))
    assert "uint16" in found.notes[1]
    # A model of RGB images takes them as gray ones.
    assert estimate_pixels(Listed([encode(Image.fromarray(RADIOGRAPH), "PNG")])).pixel_format.num_channels == 3


def test_statistics_of_bands_with_gaps():
    scales = np.array([1, 1000, 0])[:, None, None]
    bands = [(RANDOM.random((3, 16, 16)) * scales).astype(np.float32) for _ in range(8)]
    bands = [np.concatenate([image, image[:1] + 5]) for image in bands]
    bands[0][0, 0, 0] = np.nan
    found = estimate_pixels(Listed(bands))
    assert found.pixel_format.num_channels == 4
    assert len(found.pixel_format.pixel_range) == 4
    assert found.pixel_format.pixel_range[2] == (0, 1)  # a constant band
    assert found.std[2] == 1
    assert found.filled_fraction == pytest.approx(1 / (8 * 4 * 256))
    pixels = torch.cat([decode_image(image, found.pixel_format).image.flatten(1) for image in bands], dim=1)
    np.testing.assert_allclose(found.mean, pixels.mean(dim=1), atol=1e-4)
    np.testing.assert_allclose(found.std[:2], pixels.std(dim=1)[:2], atol=1e-3)


def test_mean_of_8_bit_images(make_png):
    images = [make_png(seed) for seed in range(4)]
    mean, std, filled = mean_and_std(images, PixelFormat())
    pixels = torch.stack([decode_rgb(image) for image in images]).transpose(0, 1).flatten(1) / 255
    np.testing.assert_allclose(mean, pixels.mean(dim=1), atol=1e-4)
    np.testing.assert_allclose(std, pixels.std(dim=1), atol=1e-3)
    assert filled == 0


def test_wrong_numbers_of_channels(make_jpeg):
    with pytest.raises(ValueError, match="3 channels, expected 5"):
        estimate_pixels(Listed([make_jpeg()]), num_channels=5)
    with pytest.raises(ValueError, match=r"3 \(1 images\), 7 \(2 images\)"):
        estimate_pixels(Listed([make_jpeg(), BANDS, BANDS]))
    with pytest.raises(ValueError, match="no image of a sample can be used"):
        estimate_pixels(Listed([b"\x93NUMPY\x01\x00"]))
