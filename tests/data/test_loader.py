"""The loader: identical pixels for any number of workers and processes, exact resume, bad images, dead workers."""

import json
import os
import signal

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from mocov3_hf.data import bad_images
from mocov3_hf.data.bad_images import TooManyBadImagesError
from mocov3_hf.data.decode import decode_rgb
from mocov3_hf.data.loader import TwoViewLoader
from mocov3_hf.data.shards import ListedRows
from mocov3_hf.data.sources import MapSource, StreamSource
from mocov3_hf.data.views import NUM_PARAMETERS, crop_boxes, draw_view, two_views
from mocov3_hf.data.workers import LostWorkerError


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SETTINGS = two_views(image_size=24)


class ListShard:
    """A shard in memory, with known or unknown size."""

    def __init__(self, images, tell_size=True):
        self.images, self.num_rows = images, len(images) if tell_size else None

    def load(self):
        return ListedRows(self.images)

    def describe(self, row):
        return f"row {row} of the shard"


def map_source(images) -> MapSource:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
    return MapSource(datasets.Dataset.from_dict({"image": rows}, features=features))


def stream_source(images, sizes, tell_size=True) -> StreamSource:
    shards, start = [], 0
    for size in sizes:
        shards.append(ListShard(images[start : start + size], tell_size))
        start += size
    assert start == len(images)
    return StreamSource(shards)


@pytest.fixture(scope="module")
def images():
    from io import BytesIO

    import numpy as np

    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(60):
        small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        buffer = BytesIO()
        small.resize((40, 30), Image.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


SOURCES = {
    "map": map_source,
    "equal shards": lambda images: stream_source(images, [10] * 6),
    "unequal shards": lambda images: stream_source(images, [3, 17, 0, 1, 22, 8, 9]),
    "sizes unknown": lambda images: stream_source(images, [13, 20, 9, 18], tell_size=False),
}


def load(source, epoch=0, start_step=0, **options) -> list[dict]:
    options = {"global_batch_size": 12, "steps_per_epoch": 5, "window": 2, "lanes": 4, **options}
    return list(TwoViewLoader(source, SETTINGS, **options).epoch(epoch, start_step))


def same(one: list[dict], other: list[dict]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a
    )


def joined(by_process: list[list[dict]]) -> list[dict]:
    return [
        {
            "pixels": torch.cat([batch["pixels"] for batch in step], dim=1),
            "parameters": torch.cat([batch["parameters"] for batch in step], dim=1),
            "sample_ids": torch.cat([batch["sample_ids"] for batch in step]),
        }
        for step in zip(*by_process, strict=True)
    ]


@pytest.mark.parametrize("kind", SOURCES)
def test_batches_hold_what_they_promise(images, kind):
    batches = load(SOURCES[kind](images))
    assert len(batches) == 5
    for batch in batches:
        assert set(batch) == {"pixels", "parameters", "sample_ids"}
        assert batch["pixels"].shape == (2, 12, 3, 24, 24)
        assert batch["pixels"].dtype == torch.uint8
        assert batch["parameters"].shape == (2, 12, NUM_PARAMETERS)
        assert batch["parameters"].dtype == torch.float32
        assert batch["sample_ids"].shape == (12,)
        assert batch["sample_ids"].dtype == torch.int64
    if kind != "sizes unknown":
        assert sorted(torch.cat([batch["sample_ids"] for batch in batches]).tolist()) == list(range(60))


@pytest.mark.parametrize("kind", ["map", "unequal shards"])
def test_views_are_crops_of_the_sample_they_name(images, kind):
    batch = load(SOURCES[kind](images), epoch=3, seed=5)[2]
    for view in range(2):
        draws = draw_view(SETTINGS[view], 5, 3, batch["sample_ids"], view)
        assert torch.equal(batch["parameters"][view], draws.parameters)
        boxes = crop_boxes(draws, torch.full((12,), 30), torch.full((12,), 40), SETTINGS[view]).tolist()
        for row, (top, left, height, width) in enumerate(boxes):
            image = decode_rgb(images[batch["sample_ids"][row]])[None, :, top : top + height, left : left + width]
            expected = torch.nn.functional.interpolate(image, size=24, mode="bilinear", antialias=True)[0]
            assert torch.equal(batch["pixels"][view, row], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_workers_and_processes_change_no_pixel(images, kind):
    source = SOURCES[kind](images)
    expected = load(source)
    for workers in (1, 3):
        assert same(load(source, num_workers=workers), expected)
    for processes in (2, 3):
        parts = [load(source, num_processes=processes, process_index=index) for index in range(processes)]
        assert len({len(part) for part in parts}) == 1
        assert same(joined(parts), expected)
    parts = [load(source, num_processes=2, process_index=index, num_workers=2) for index in range(2)]
    assert same(joined(parts), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_resuming_anywhere_gives_the_rest(images, kind):
    source = SOURCES[kind](images)
    for epoch in (0, 2):
        whole = load(source, epoch)
        for start_step in range(6):
            assert same(load(source, epoch, start_step), whole[start_step:])
    assert same(load(source, 2, 3, num_workers=2), whole[3:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_one_loader_serves_epoch_after_epoch(images, kind):
    source = SOURCES[kind](images)
    loader = TwoViewLoader(source, SETTINGS, global_batch_size=12, steps_per_epoch=5, num_workers=2, window=2, lanes=4)
    interrupted = loader.epoch(0)
    next(interrupted)
    interrupted.close()
    assert same(list(loader.epoch(0)), load(source, 0))
    assert same(list(loader.epoch(1, 2)), load(source, 1)[2:])
    assert not same(load(source, 0), load(source, 1))


@pytest.mark.slow
def test_workers_that_inherit_nothing(images):
    source = map_source(images)
    assert same(load(source, num_workers=1, multiprocessing_context="spawn"), load(source))


def test_a_stream_lets_go_of_what_is_behind(images):
    source = stream_source(images, [3] * 20)
    loader = TwoViewLoader(source, SETTINGS, global_batch_size=6, window=2, lanes=2)
    reader = loader._loader.dataset.reader
    held = [len(reader._loading) for _ in loader.epoch(0)]
    # Two lanes, each with the current window, possibly the previous one in the same batch, and the next one.
    assert max(held) <= 2 * 3 * 2
    assert len(held) == 10


def test_resuming_a_stream_reads_no_more_than_the_windows_in_use(images):
    source, loaded = stream_source(images, [3] * 20), []
    for index, shard in enumerate(source.shards):
        shard.load = lambda shard=shard, index=index: (loaded.append(index), ListedRows(shard.images))[1]
    loader = TwoViewLoader(source, SETTINGS, global_batch_size=6, window=2, lanes=2)
    next(loader.epoch(0, 8))
    assert len(set(loaded)) == len(loaded) <= 2 * 3 * 2


def test_sizes_that_are_unknown_need_steps(images):
    source = stream_source(images, [30, 30], tell_size=False)
    with pytest.raises(ValueError, match="length of this streamed data set is unknown: pass --steps_per_epoch"):
        TwoViewLoader(source, SETTINGS, global_batch_size=12)
    # Each shard contributes half of the epoch, so each image comes once.
    batches = load(source, steps_per_epoch=5)
    assert len(torch.cat([batch["sample_ids"] for batch in batches]).unique()) == 60


def test_sizes_that_do_not_fit_are_refused(images):
    source = map_source(images)
    with pytest.raises(ValueError, match="global batch size 61 is larger than the data set of 60 images"):
        TwoViewLoader(source, SETTINGS, global_batch_size=61)
    with pytest.raises(ValueError, match="steps_per_epoch is 6, but 60 images are only 5 batches of 12"):
        TwoViewLoader(source, SETTINGS, global_batch_size=12, steps_per_epoch=6)
    with pytest.raises(ValueError, match="same image size"):
        TwoViewLoader(source, (two_views(image_size=24)[0], two_views(image_size=32)[1]), global_batch_size=12)
    with pytest.raises(ValueError, match="start_step"):
        next(TwoViewLoader(source, SETTINGS, global_batch_size=12).epoch(0, -1))


def damaged(images, *places):
    images = list(images)
    kinds = [b"", images[0][: len(images[0]) // 2], b"no image", {"bytes": None, "path": "/gone/for/ever.jpg"}]
    for number, place in enumerate(places):
        images[place] = kinds[number % len(kinds)]
    return images


@pytest.mark.parametrize("kind", ["map", "unequal shards"])
def test_bad_images_are_replaced_counted_and_listed(images, tmp_path, kind):
    bad = damaged(images, 7, 8, 30, 59)
    if kind != "map":
        bad = [image["path"] if isinstance(image, dict) else image for image in bad]
    source, file = SOURCES[kind](bad), tmp_path / "out" / "bad_images.jsonl"
    good = load(SOURCES[kind](images))
    options = {"max_bad_fraction": 0.1, "bad_images_file": file}
    loader = TwoViewLoader(
        source, SETTINGS, global_batch_size=12, steps_per_epoch=5, window=2, lanes=4, num_workers=2, **options
    )
    assert loader.num_bad_images == 0
    batches = list(loader.epoch(0))
    assert loader.num_bad_images == 4
    listed = {line["id"]: line["reason"] for line in map(json.loads, file.read_text().splitlines())}
    assert set(listed) == {7, 8, 30, 59}
    assert listed[7] == "is empty (0 bytes)"
    paths = {line["id"]: line["path"] for line in map(json.loads, file.read_text().splitlines())}
    assert paths[59] == "/gone/for/ever.jpg"
    assert paths[7] == (None if kind == "map" else "row 4 of the shard")
    assert "cannot be decoded" in listed[8]
    assert "No such file" in listed[59]
    for batch, expected in zip(batches, good, strict=True):
        assert torch.equal(batch["sample_ids"], expected["sample_ids"])
        assert torch.equal(batch["parameters"], expected["parameters"])
        for row, sample_id in enumerate(batch["sample_ids"].tolist()):
            replaced = not torch.equal(batch["pixels"][:, row], expected["pixels"][:, row])
            assert replaced == (sample_id in listed)
    # The same for other numbers of processes, and no id is counted or listed twice.
    parts = [load(source, num_processes=3, process_index=index, **options) for index in range(3)]
    assert same(joined(parts), batches)
    list(loader.epoch(0))
    assert loader.num_bad_images == 4
    assert len(file.read_text().splitlines()) == 4
    assert TwoViewLoader(source, SETTINGS, global_batch_size=12, **options).num_bad_images == 4


def test_the_neighbor_is_the_next_good_image(images):
    source = map_source(damaged(images, 58, 59, 0))
    batches = load(source, max_bad_fraction=1)
    draws = draw_view(SETTINGS[0], 0, 0, torch.tensor([58]), 0)
    top, left, height, width = crop_boxes(draws, torch.tensor([30]), torch.tensor([40]), SETTINGS[0])[0].tolist()
    crop = decode_rgb(images[1])[None, :, top : top + height, left : left + width]
    expected = torch.nn.functional.interpolate(crop, size=24, mode="bilinear", antialias=True)[0]
    found = [batch["pixels"][0, batch["sample_ids"] == 58] for batch in batches]
    assert torch.equal(torch.cat(found)[0], expected)


def test_a_stream_of_few_images_replaces_a_bad_one_from_the_next_shard(images):
    """Every lane has a single row, and so does its window."""
    source = stream_source(damaged(images[:8], 3), [4, 4])
    options = {"global_batch_size": 8, "steps_per_epoch": None, "lanes": 8, "max_bad_fraction": 1}
    batches = load(source, **options)
    [batch] = batches
    assert sorted(batch["sample_ids"].tolist()) == list(range(8))
    good = stream_source([*images[:3], images[0], *images[4:8]], [4, 4])
    assert same(load(good, **options), batches)
    parts = [load(source, num_processes=2, process_index=index, **options) for index in range(2)]
    assert same(joined(parts), batches)
    with pytest.raises(TooManyBadImagesError, match=r"^8 images in a row are unusable"):
        load(stream_source([b"x"] * 8, [4, 4]), **options)


def test_too_many_bad_images_end_the_run(images, tmp_path):
    file = tmp_path / "bad_images.jsonl"
    source = map_source(damaged(images, 3, 9, 20, 40))
    with pytest.raises(
        TooManyBadImagesError, match=r"more than the allowed fraction of 0\.05.*--max_bad_fraction"
    ) as error:
        load(source, max_bad_fraction=0.05, bad_images_file=file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(load(map_source(damaged(images, 3, 9, 20)), max_bad_fraction=0.05)) == 5


def test_a_bad_image_can_be_an_error(images):
    with pytest.raises(TooManyBadImagesError, match=r"image 9 is empty.*--on_bad_image skip"):
        load(map_source(damaged(images, 9)), on_bad_image="error", num_workers=1)
    with pytest.raises(ValueError, match="on_bad_image must be 'skip' or 'error', got 'ignore'"):
        load(map_source(images), on_bad_image="ignore")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_storage_that_is_gone_is_no_bad_image(images, monkeypatch, num_workers):
    monkeypatch.setattr(bad_images, "MAX_NEIGHBOURS", 5)
    source = map_source([b""] * 20 + images[20:])
    with pytest.raises(
        TooManyBadImagesError, match=r"^5 images in a row are unusable.*check that the storage is available$"
    ):
        load(source, max_bad_fraction=1, num_workers=num_workers)


class KillingSource(MapSource):
    """Its worker is killed at the first image, as by the kernel when memory runs out."""

    def read(self, sample_id):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(sample_id)


class FailingSource(MapSource):
    def read(self, sample_id):
        raise OSError("the disk is on fire")


def in_memory(cls):
    source = cls.__new__(cls)
    source.__dict__.update(map_source([b"x"] * 24).__dict__)
    return source


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_with_its_cause():
    with pytest.raises(LostWorkerError, match=r"worker died \(worker \d+: killed \(signal 9\), probably out of mem"):
        load(in_memory(KillingSource), steps_per_epoch=2, num_workers=1)


@pytest.mark.slow
def test_one_of_several_processes_decodes_without_its_lost_worker(images):
    """The others wait for it in a step that they have begun."""
    source = KillingSource.__new__(KillingSource)
    source.__dict__.update(map_source(images).__dict__)
    options = {"global_batch_size": 4, "num_processes": 2, "process_index": 1}
    loader = TwoViewLoader(source, SETTINGS, num_workers=2, **options)
    assert loader.lost_worker is None
    expected = TwoViewLoader(map_source(images), SETTINGS, **options)
    for epoch in range(2):
        assert same(list(loader.epoch(epoch)), list(expected.epoch(epoch)))
        assert "killed (signal 9)" in str(loader.lost_worker)


@pytest.mark.slow
def test_an_error_in_a_worker_keeps_its_cause():
    with pytest.raises(OSError, match="the disk is on fire"):
        load(in_memory(FailingSource), steps_per_epoch=2, num_workers=1)
