"""The device cache returns the views of the CPU stage."""

import threading

import pytest
import torch

from mocov3_hf.data.device_cache import DeviceCache, crop_and_resize_batch
from mocov3_hf.data.loader import TwoViewLoader, one_ahead
from mocov3_hf.data.sources import open_source
from mocov3_hf.data.views import two_views


SETTINGS = two_views(image_size=24)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_cached_batches_are_those_of_the_cpu_stage(jpeg_folder, tmp_path, sizes, make_jpeg):
    folder = jpeg_folder(20)
    if sizes == "unequal":
        for index, path in enumerate(sorted(folder.rglob("*.jpg"))):
            path.write_bytes(make_jpeg(index, width=10 + 7 * index, height=90 - 4 * index))
    source = open_source(str(folder))
    plain = TwoViewLoader(source, SETTINGS, global_batch_size=6, seed=2)
    for processes in (1, 2):
        cached = TwoViewLoader(
            source, SETTINGS, global_batch_size=6, seed=2, cache_on_device="cpu", num_processes=processes
        )
        rows = 6 // processes
        assert cached.steps_per_epoch == 3
        found = list(cached.epoch(4, 1))
        assert len(found) == 2
        for one, other in zip(found, list(plain.epoch(4, 1)), strict=True):
            assert torch.equal(one["sample_ids"], other["sample_ids"][:rows])
            assert torch.equal(one["parameters"], other["parameters"][:, :rows])
            assert one["pixels"].dtype == torch.uint8
            apart = (one["pixels"].int() - other["pixels"][:, :rows].int()).abs()
            assert apart.max() <= 1
            assert apart.float().mean() < 0.25


def test_crops_never_read_beyond_themselves():
    image = torch.full((1, 3, 40, 50), 255.0)
    image[:, :, 10:30, 5:45] = 100
    boxes = torch.tensor([[10, 5, 20, 40]])
    for size in (8, 24, 64):
        assert (crop_and_resize_batch(image, boxes, size) == 100).all()


def test_bad_images_of_the_cache_are_counted(jpeg_folder, tmp_path):
    folder, file = jpeg_folder(20), tmp_path / "bad_images.jsonl"
    sorted(folder.rglob("*.jpg"))[3].write_bytes(b"not an image")
    source = open_source(str(folder))
    loader = TwoViewLoader(
        source, SETTINGS, global_batch_size=20, cache_on_device="cpu", max_bad_fraction=0.1, bad_images_file=file
    )
    assert loader.num_bad_images == 1
    assert '"id": 3' in file.read_text()
    cache = DeviceCache(source, "cpu")
    assert torch.equal(cache.images[3], cache.images[4])
    with pytest.raises(RuntimeError, match="1 of 20 images are bad"):
        TwoViewLoader(source, SETTINGS, global_batch_size=20, cache_on_device="cpu")


def test_what_does_not_fit_is_refused(jpeg_folder):
    folder = str(jpeg_folder(20))
    with pytest.raises(
        ValueError, match=r"need .* MiB of device memory, more than the allowed 0 MiB: remove --cache_images_on"
    ):
        DeviceCache(open_source(folder), "cpu", max_bytes=20_000)
    with pytest.raises(ValueError, match=r"cannot be cached on the device: remove --streaming"):
        TwoViewLoader(open_source(folder, streaming=True), SETTINGS, global_batch_size=6, cache_on_device="cpu")
    wide, tall = sorted((jpeg_folder(20)).rglob("*.jpg"))[:2]
    from PIL import Image

    Image.new("RGB", (900, 2)).save(wide)
    Image.new("RGB", (2, 900)).save(tall)
    with pytest.raises(
        ValueError,
        match="20 images padded to 900x900 pixels need 46 MiB of device memory, more than the allowed 9 MiB",
    ):
        DeviceCache(open_source(folder), "cpu", max_bytes=10_000_000)


def test_the_next_is_drawn_while_one_is_used():
    started = [threading.Event() for _ in range(3)]

    def draw(number):
        started[number].set()
        return number

    ahead = one_ahead(draw, range(3))
    assert next(ahead) == 0
    assert started[1].wait(timeout=10)
    assert not started[2].is_set()  # one, not all
    assert list(ahead) == [1, 2]


def test_drawing_ahead_keeps_order_and_errors_and_can_be_left():
    def double(number):
        if number == 3:
            raise ValueError("three")
        return 2 * number

    assert list(one_ahead(double, range(3))) == [0, 2, 4]
    assert list(one_ahead(double, range(0))) == []
    ahead = one_ahead(double, range(5))
    assert [next(ahead), next(ahead), next(ahead)] == [0, 2, 4]
    with pytest.raises(ValueError, match="three"):
        next(ahead)
    left = one_ahead(double, range(3))
    next(left)
    left.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
