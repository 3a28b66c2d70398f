"""The two stages of the augmentation for deep images and for other numbers of channels than 3."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mocov3_hf.data import photometric
from mocov3_hf.data.device_cache import DeviceCache
from mocov3_hf.data.loader import TwoViewLoader
from mocov3_hf.data.photometric import PhotometricStage
from mocov3_hf.data.sources import MapSource, find_image_column, open_source
from mocov3_hf.data.views import PARAMETER_NAMES, ViewSettings, crop_box, draw_view, make_views, two_views
from mocov3_hf.processing import PixelFormat


RANDOM = np.random.default_rng(0)
BANDS = PixelFormat(5, (0, 4095))
SETTINGS = two_views(image_size=24)
OPTIONAL = {"vertical_flip_probability": 0.5, "rotation_probability": 0.6, "channel_drop_probability": 0.4}


class Arrays(MapSource):
    """Arrays in memory as a map-style source."""

    def __init__(self, arrays):
        self.arrays, self.num_samples = arrays, len(arrays)

    def read(self, sample_id):
        return self.arrays[int(sample_id)]

    def __getstate__(self):
        return self.__dict__


@pytest.fixture
def bands():
    coarse = RANDOM.integers(0, 4096, (8, 5, 6, 7)).astype(np.uint16)
    return Arrays(list(coarse.repeat(8, 2).repeat(8, 3)))


def values_of(parameters):
    return dict(zip(PARAMETER_NAMES, parameters.tolist(), strict=True))


def test_deep_views_keep_more_than_8_bits(bands):
    views = make_views(bands.open_batch(torch.arange(8)), SETTINGS, 3, 1, BANDS)
    assert views["pixels"].shape == (2, 8, 5, 24, 24)
    assert views["pixels"].dtype == torch.uint16
    draws = draw_view(SETTINGS[1], 3, 1, torch.arange(8), 1)
    for row, image in enumerate(bands.arrays):
        box = [part[row].tolist() for part in (draws.crop_area, draws.crop_ratio, draws.crop_place)]
        top, left, height, width = crop_box(*box, 48, 56, SETTINGS[1])
        crop = torch.from_numpy(image / 4095)[None, :, top : top + height, left : left + width]
        expected = F.interpolate(crop, (24, 24), mode="bilinear", antialias=True)[0]
        assert (views["pixels"][1, row].double() / 65535 - expected).abs().max() < 1e-5


def test_8_bit_bands_travel_as_8_bits():
    arrays = Arrays([RANDOM.integers(0, 256, (40, 50, 4)).astype(np.uint8) for _ in range(2)])
    views = make_views(arrays.open_batch(torch.arange(2)), SETTINGS, 0, 0, PixelFormat(4))
    rgb = Arrays([array[..., :3] for array in arrays.arrays])
    first_three = make_views(rgb.open_batch(torch.arange(2)), SETTINGS, 0, 0)
    assert views["pixels"].dtype == torch.uint8
    assert (views["pixels"][:, :, :3].int() - first_three["pixels"].int()).abs().max() <= 1


def test_workers_and_processes_share_deep_batches(bands):
    options = {"global_batch_size": 4, "seed": 1, "pixel_format": BANDS}
    alone = list(TwoViewLoader(bands, SETTINGS, **options).epoch(0))
    with_worker = list(TwoViewLoader(bands, SETTINGS, num_workers=1, **options).epoch(0))
    for one, other in zip(alone, with_worker, strict=True):
        assert torch.equal(one["pixels"], other["pixels"])
        assert one["pixels"].dtype == torch.uint16


def test_filled_images_are_counted(bands):
    bands.arrays[3] = bands.arrays[3].astype(np.float32)
    bands.arrays[3][:, :9] = np.nan
    loader = TwoViewLoader(bands, SETTINGS, global_batch_size=8, pixel_format=BANDS)
    stage = PhotometricStage([0.5] * 5, [0.2] * 5)
    (batch,) = loader.epoch(0)
    assert loader.num_filled_images == 1
    assert stage(batch["pixels"][0], batch["parameters"][0]).isfinite().all()


def test_cache_on_the_device_has_the_same_pixels(bands):
    cache = DeviceCache(bands, "cpu", pixel_format=BANDS)
    found = cache.make_views(torch.arange(8), SETTINGS, 3, 1)
    expected = make_views(bands.open_batch(torch.arange(8)), SETTINGS, 3, 1, BANDS)
    assert found["pixels"].dtype == torch.uint16
    assert (found["pixels"].int() - expected["pixels"].int()).abs().max() <= 2
    assert torch.equal(found["parameters"], expected["parameters"])


# The device stage


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_both_paths_of_the_stage_agree(channels, dtype):
    largest = 255 if dtype == torch.uint8 else 65535
    pixels = torch.from_numpy(RANDOM.integers(0, largest + 1, (12, channels, 32, 32))).to(dtype)
    settings = replace(SETTINGS[1], solarize_probability=0.5, blur_probability=0.5, **OPTIONAL)
    parameters = draw_view(settings, 0, 0, torch.arange(12), 1).parameters
    stage = PhotometricStage([0.4] * channels, [0.3] * channels, optional_operations=True)
    one_by_one = stage(pixels, parameters)
    assert one_by_one.shape == (12, channels, 32, 32)
    torch.testing.assert_close(one_by_one, stage.batched(pixels, parameters, torch.float32), atol=2e-5, rtol=0)


def test_gray_images_are_augmented_as_their_rgb_copies():
    """Of R = G = B, hue and saturation change nothing, and luma is the channel itself."""
    gray = torch.from_numpy(RANDOM.integers(0, 65536, (12, 1, 32, 32))).to(torch.uint16)
    parameters = draw_view(replace(SETTINGS[1], solarize_probability=0.5), 0, 0, torch.arange(12), 1).parameters
    found = PhotometricStage([0.4], [0.3])(gray, parameters)
    expected = PhotometricStage([0.4] * 3, [0.3] * 3)(gray.expand(-1, 3, -1, -1), parameters)
    torch.testing.assert_close(found.expand(-1, 3, -1, -1), expected, atol=1e-4, rtol=0)


def test_operations_on_bands():
    image = torch.rand(2, 5, 8, 8)
    mean = image.mean(dim=1, keepdim=True)
    torch.testing.assert_close(photometric.grayscale(image), mean)
    blended = 0.7 * image + 0.3 * mean.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(photometric.adjust_contrast(image, 0.7), blended)


def test_optional_operations_one_by_one():
    draws = draw_view(ViewSettings(image_size=16, **OPTIONAL), 0, 0, torch.arange(200), 0).parameters
    pixels = torch.from_numpy(RANDOM.integers(0, 256, (200, 5, 16, 16))).to(torch.uint8)
    neutral = {"brightness": 1, "contrast": 1, "saturation": 1, "solarize_threshold": 256}
    kept = ("vertical_flip", "rotation", "dropped_channel")
    for place, name in enumerate(PARAMETER_NAMES):
        if name not in kept:
            draws[:, place] = neutral.get(name, 0)
    mean = torch.linspace(0.1, 0.9, 5)
    found = PhotometricStage(mean.tolist(), [1.0] * 5, optional_operations=True)(pixels, draws)
    for image, row, result in zip(pixels, draws, found, strict=True):
        values = values_of(row)
        expected = image / 255 - mean[:, None, None]
        expected = expected.flip(1) if values["vertical_flip"] else expected
        expected = torch.rot90(expected, int(values["rotation"]), (1, 2)).clone()
        if values["dropped_channel"]:
            expected[int(values["dropped_channel"] * 5)] = 0
        torch.testing.assert_close(result, expected)
    shares = [(draws[:, PARAMETER_NAMES.index(name)] != 0).float().mean().item() for name in kept]
    assert shares == pytest.approx([0.5, 0.6, 0.4], abs=0.1)
    turns = draws[:, PARAMETER_NAMES.index("rotation")]
    assert {1.0, 2.0, 3.0} < set(turns.tolist())
    assert min((turns == turn).sum() for turn in (1, 2, 3)) > 20


def test_optional_operations_change_no_other_draw():
    plain, more = (draw_view(ViewSettings(**extra), 5, 2, torch.arange(99), 1) for extra in ({}, OPTIONAL))
    first = PARAMETER_NAMES.index("vertical_flip")
    assert torch.equal(plain.parameters[:, :first], more.parameters[:, :first])
    assert torch.equal(plain.crop_place, more.crop_place)
    assert not plain.parameters[:, first:].any()


def test_radiographs_in_a_folder_become_views(encode, tmp_path):

    levels = RANDOM.integers(300, 4396, (4, 30, 40)).astype(np.uint16)
    images = [{"bytes": encode(Image.fromarray(image), "PNG"), "path": None} for image in levels]
    table = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    loader = TwoViewLoader(MapSource(table), SETTINGS, global_batch_size=4, pixel_format=PixelFormat(1, (300, 4395)))
    (batch,) = loader.epoch(0)
    values = batch["pixels"].double() / 65535
    assert 0.4 < values.mean() < 0.6  # neither white nor black
    assert values.std() > 0.1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_arrays_in_parquet(tmp_path, streaming, nested):
    arrays = RANDOM.integers(0, 4096, (6, 4, 8, 9)).astype(np.uint16)
    feature = datasets.Array3D((4, 8, 9), "uint16")
    table = datasets.Dataset.from_dict({"bands": list(arrays)}, features=datasets.Features({"bands": feature}))
    if nested:  # as written without `datasets`
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"bands": pa.array(arrays.tolist())}), tmp_path / "train.parquet")
    else:
        table.to_parquet(tmp_path / "train.parquet")
    source = open_source(str(tmp_path), streaming=streaming, image_column="bands")
    (batch,) = TwoViewLoader(
        source, two_views(image_size=8, crop_scale=(1, 1)), global_batch_size=6, pixel_format=PixelFormat(4, (0, 4095))
    ).epoch(0)
    assert batch["pixels"].shape == (2, 6, 4, 8, 8)
    read = source.shards[0].load().read(3) if streaming else source.read(3)
    np.testing.assert_array_equal(read, arrays[3])
    if not nested:
        assert find_image_column(table) == "bands"
