"""The image processor of images with any number of channels and any bit depth."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessor, pipeline

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ImageProcessor
from mocov3_hf.processing import (
    PixelFormat,
    ProcessorTransform,
    adapted,
    build_image_processor,
    checked_range,
    for_pixels,
    pixel_format_of,
)
from tests.factories import VIT, smooth


RANDOM = np.random.default_rng(0)
BANDS = RANDOM.integers(0, 4096, (40, 48, 5)).astype(np.uint16)


def pixel_values(processor, image, **options):
    return processor(image, return_tensors="pt", **options)["pixel_values"]


def test_plain_rgb_has_the_processor_of_transformers():
    assert type(build_image_processor(32)) is BitImageProcessor
    assert type(build_image_processor(32, image_mean=[0.1] * 3, image_std=[0.2] * 3)) is BitImageProcessor
    assert pixel_format_of(build_image_processor(32)).is_rgb8


def test_8_bit_images_agree_with_the_processor_of_transformers():
    image = torch.from_numpy(smooth(60, 90, 0)).permute(2, 0, 1)
    plain = build_image_processor(32)
    ours = for_pixels(plain, PixelFormat(3, (0, 4095)))
    # One level at most: BitImageProcessor rounds after each of the two passes of resizing.
    torch.testing.assert_close(pixel_values(ours, image), pixel_values(plain, image), atol=1.01 / 255 / 0.22, rtol=0)
    gray = pixel_values(build_image_processor(32, num_channels=1), Image.fromarray(smooth(60, 90, 0)))
    luma = np.asarray(Image.fromarray(smooth(60, 90, 0)).convert("L"))
    assert gray.shape == (1, 1, 32, 32)
    assert torch.equal(gray, pixel_values(build_image_processor(32, num_channels=1), luma))


def test_every_kind_of_input_gives_the_same_pixels():
    ranges = tuple((0, 1000 * (channel + 1)) for channel in range(5))
    processor = build_image_processor(32, pixel_format=PixelFormat(5, ranges))
    expected = torch.stack(
        [(torch.from_numpy(BANDS[..., c]).float() / (1000 * (c + 1))).clamp(0, 1) for c in range(5)]
    )
    for image in (BANDS, BANDS.transpose(2, 0, 1), torch.from_numpy(BANDS), BANDS.astype(np.int64), [BANDS]):
        found = pixel_values(processor, image, do_resize=False, do_center_crop=False, do_normalize=False)
        torch.testing.assert_close(found[0], expected)
    assert pixel_values(processor, [BANDS, BANDS]).shape == (2, 5, 32, 32)
    assert ProcessorTransform(processor)(torch.from_numpy(BANDS).permute(2, 0, 1)).shape == (5, 32, 32)


def test_pil_images_of_any_mode(tmp_path):
    processor = build_image_processor(32, pixel_format=PixelFormat(1, (300, 4395)))
    deep = np.ascontiguousarray(BANDS[..., 0])
    expected = pixel_values(processor, deep)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32)), str(tmp_path / "deep.png")):
        assert torch.equal(pixel_values(processor, image), expected)
    for mode in ("L", "RGB", "RGBA", "P", "CMYK", "1"):
        found = pixel_values(processor, Image.fromarray(smooth(40, 48, 1)).convert(mode))
        assert found.shape == (1, 1, 32, 32)
        assert found.std() > 0.05


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.float64])
def test_a_device_without_float64_gets_float32(monkeypatch, dtype):
    original, moved = torch.Tensor.to, []

    def to(tensor, *where, **options):
        if where != (torch.device("mps"),):
            return original(tensor, *where, **options)
        moved.append(tensor.dtype)
        return tensor

    image = BANDS[..., :3].astype(dtype)
    processor = build_image_processor(32, pixel_format=PixelFormat(1, (0, 4096)))
    expected = processor.process_image(image, pixel_range=(0, 4096))
    monkeypatch.setattr(torch.Tensor, "to", to)
    found = processor.process_image(image, pixel_range=(0, 4096), device="mps")
    assert moved == [torch.float32]
    assert torch.equal(found, expected)


def test_pixels_without_data_do_not_reach_the_model():
    image = RANDOM.normal(size=(5, 40, 48)).astype(np.float32)
    image[0, :20], image[1], image[2, 3, 4] = np.nan, -9999, np.inf
    pixel_format = PixelFormat(5, (-4, 4), nodata=-9999)
    mean = [0.5, 0.25, 0.5, 0.5, 0.5]
    found = pixel_values(build_image_processor(32, pixel_format=pixel_format, image_mean=mean), image)
    assert found.isfinite().all()
    assert found[0, 1].abs().max() < 1e-6  # the mean of the data set, for a channel without any data
    with pytest.raises(ValueError, match="no pixel with data"):
        pixel_values(build_image_processor(32, pixel_format=pixel_format), np.full((5, 40, 48), np.nan))


def test_mistakes():
    processor = build_image_processor(32, pixel_format=PixelFormat(5, (0, 4095)))
    with pytest.raises(ValueError, match="expected an axis of 5 channels"):
        pixel_values(processor, BANDS[..., :4])
    with pytest.raises(ValueError, match="pass input_data_format"):
        pixel_values(processor, np.zeros((5, 9, 5), np.uint16))
    with pytest.raises(ValueError, match="int16 values from 0 to 9, whose range is not known"):
        pixel_values(build_image_processor(32, num_channels=5), np.arange(10, dtype=np.int16).reshape(5, 1, 2))
    for wrong in ([0, 1, 2], [1, 1], [[0, 1]] * 4):
        with pytest.raises(ValueError, match="pixel_range takes"):
            PixelFormat(5, wrong)
    with pytest.raises(ValueError, match="one value for each of 5 channels"):
        build_image_processor(32, num_channels=5, image_mean=[0.5] * 3)
    with pytest.raises(ValueError, match="normalizes 3 channels, the images have 5"):
        for_pixels(build_image_processor(32), PixelFormat(5))
    assert checked_range([0, 1, 2, 3], 2) == ((0, 1), (2, 3))


def test_saves_and_loads(tmp_path):
    ranges = tuple((0, 1000 * (channel + 1)) for channel in range(5))
    processor = build_image_processor(32, pixel_format=PixelFormat(5, ranges, nodata=0))
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MoCoV3ImageProcessor
    assert pixel_format_of(loaded) == PixelFormat(5, ranges, nodata=0)
    assert torch.equal(pixel_values(loaded, BANDS), pixel_values(processor, BANDS))
    assert pixel_values(adapted(loaded, image_size=48), BANDS).shape == (1, 5, 48, 48)


def test_pipeline_takes_arrays_of_bands(tmp_path):
    torch.manual_seed(0)
    config = MoCoV3Config(backbone_config=VIT | {"num_channels": 5}, num_labels=3)
    model = MoCoV3ForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = build_image_processor(32, pixel_format=PixelFormat(5, (0, 4095)))
    processor.save_pretrained(tmp_path)
    found = pipeline("image-classification", model=str(tmp_path))(BANDS, top_k=3)
    with torch.no_grad():
        expected = model(pixel_values(processor, BANDS)).logits.softmax(-1)[0]
    assert [entry["score"] for entry in found] == pytest.approx(expected.sort(descending=True).values.tolist())
