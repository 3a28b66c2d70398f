"""A fingerprint is that of the images, wherever and however they are stored, and changes with each of them."""

import os
import shutil

import datasets
import numpy as np
import pytest

from mocov3_hf.data import fingerprint as module
from mocov3_hf.data.fingerprint import fingerprint, labeled_fingerprint
from mocov3_hf.data.labeled import LabeledImages, open_labeled
from mocov3_hf.data.sources import open_source
from tests.data.test_archives import tar_of, zip_of


def of(name, **options) -> str:
    return fingerprint(open_source(str(name), **options))


@pytest.fixture(params=["folder", "tar", "zip", "parquet", "arrow", "csv"])
def data(request, tmp_path, make_jpeg):
    """A function (images by number) -> data set of one kind, written again."""

    def make(numbers, name="data"):
        path = tmp_path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        images = {f"{index:02}.jpg": make_jpeg(number, 16, 12) for index, number in enumerate(numbers)}
        if request.param in ("folder", "csv"):
            for file, content in images.items():
                (path / file).write_bytes(content)
            if request.param == "csv":
                (path / "train.csv").write_text("path\n" + "".join(f"{file}\n" for file in images))
        elif request.param == "tar":
            tar_of(path / "a.tar", images)
        elif request.param == "zip":
            zip_of(path / "a.zip", images)
        else:
            rows = [{"bytes": content, "path": None} for content in images.values()]
            features = datasets.Features({"image": datasets.Image()})
            table = datasets.Dataset.from_dict({"image": rows}, features=features, split="train")
            if request.param == "arrow":
                table.save_to_disk(path)
            else:
                table.to_parquet(path / "train.parquet", batch_size=3)
        return path

    return make


@pytest.mark.parametrize("streaming", [False, True])
def test_the_same_images_elsewhere_and_later_have_the_same(data, streaming):
    first = of(data(range(8)), streaming=streaming)
    assert of(data(range(8), "elsewhere"), streaming=streaming) == first
    for path in data(range(8)).rglob("*"):
        os.utime(path, (1, 1))
    assert of(data(range(8)), streaming=streaming) == first


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("numbers", [range(7), range(9), [0, 1, 2, 9, 4, 5, 6, 7], [1, 0, 2, 3, 4, 5, 6, 7]])
def test_other_images_have_another(data, numbers, streaming):
    assert of(data(numbers), streaming=streaming) != of(data(range(8), "other"), streaming=streaming)


def test_map_style_and_streamed_files_are_the_same_data(tmp_path, jpeg_folder):
    folder = jpeg_folder(5)
    assert of(folder) == of(folder, streaming=True)


def test_content_of_a_sample_and_sizes_of_all(tmp_path, jpeg_folder, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED_IMAGES", 3)
    folder = jpeg_folder(9, classes=0)
    first = of(folder)
    files = sorted(folder.iterdir())
    same_size = bytearray(files[4].read_bytes())
    same_size[len(same_size) // 2] ^= 1
    files[4].write_bytes(same_size)  # the middle of the sample
    assert of(folder) != first
    same_size[len(same_size) // 2] ^= 1
    files[4].write_bytes(same_size)
    assert of(folder) == first
    files[3].write_bytes(files[3].read_bytes() + b"\0")
    assert of(folder) != first


def test_labels_and_chosen_rows_count(tmp_path, jpeg_folder):
    images = open_labeled(str(jpeg_folder(6)), split="train")
    first = labeled_fingerprint(images)
    assert labeled_fingerprint(open_labeled(str(jpeg_folder(6)), split="train")) == first
    others = [images.select(np.arange(5)), images.select(np.arange(1, 6)), images.select(np.arange(6)[::-1])]
    relabeled = LabeledImages(images.source, 1 - images.labels, images.class_names)
    assert len({first, *map(labeled_fingerprint, [*others, relabeled])}) == 5


def test_missing_files_and_pixels_in_tables():
    rows = {"image": [None, {"bytes": None, "path": "/nowhere/1.jpg"}]}
    from mocov3_hf.data.sources import MapSource

    features = datasets.Features({"image": datasets.Image()})
    assert len(fingerprint(MapSource(datasets.Dataset.from_dict(rows, features=features)))) == 32
