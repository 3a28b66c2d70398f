"""Data sets in memory: the same images and labels as from files, and one line for what is not a data set."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mocov3_hf.data.classes import open_labeled_splits
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.data.memory import IN_MEMORY, named
from mocov3_hf.data.pixels import RGB8, read_image
from mocov3_hf.data.sources import open_dataset, open_source
from mocov3_hf.data.streams import StreamReader
from mocov3_hf.processing import PixelFormat
from mocov3_hf.reporting import UsageError


def arrays(number=3, shape=(8, 9, 3), dtype=np.uint8):
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, shape).astype(dtype) for _ in range(number)]


def pixels_of(data, pixel_format=RGB8, **options):
    with named(data) as (name, split):
        source = open_source(name, split=split or "train", **options)
    return [read_image(source.read(row), pixel_format).numpy() for row in range(len(source))]


KINDS = {
    "arrays": list,
    "one array": np.stack,
    "PIL images": lambda images: [Image.fromarray(image) for image in images],
    "tensors": lambda images: [torch.from_numpy(image).permute(2, 0, 1) for image in images],
    "pairs": lambda images: tuple((image, 0) for image in images),
    "Dataset": lambda images: datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in images]},
        features=datasets.Features({"image": datasets.Image()}),
    ).with_format("torch"),
    "splits": lambda images: {"train": images},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_given(kind):
    images = arrays()
    for found, image in zip(pixels_of(KINDS[kind](images)), images, strict=True):
        np.testing.assert_array_equal(found, image.transpose(2, 0, 1))


def test_paths(tmp_path):
    images, paths = arrays(), [tmp_path / f"{row}.png" for row in range(3)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    np.testing.assert_array_equal(pixels_of(paths)[2], images[2].transpose(2, 0, 1))
    with pytest.raises(UsageError, match=r"^item 1 of the sequence is the path 'gone.png', which is not a file$"):
        pixels_of([paths[0], "gone.png"])


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint16, 5), (np.float32, 5), (np.uint8, 5), (np.int32, 1)])
def test_deep_and_multichannel_values_are_exact(dtype, channels):
    images = arrays(2, (8, 9, channels), dtype)
    found = pixels_of(images, PixelFormat(channels, (0.0, 255.0)))
    np.testing.assert_array_equal(found[1], images[1].transpose(2, 0, 1))
    assert found[1].dtype == dtype


def test_pil_images_of_other_modes():
    gray = Image.fromarray(arrays(1, (8, 9))[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(arrays()[0])
    turned.getexif().update(exif)
    cmyk, deep = turned.convert("CMYK"), Image.fromarray(arrays(1, (8, 9), np.uint16)[0] * 200)
    assert pixels_of([gray, gray])[0].shape == (3, 8, 9)
    assert pixels_of([turned, turned])[0].shape == (3, 9, 8)
    np.testing.assert_array_equal(pixels_of([cmyk])[0], np.asarray(cmyk.convert("RGB")).transpose(2, 0, 1))
    np.testing.assert_array_equal(pixels_of([deep], PixelFormat(1, (0.0, 65535.0)))[0][0], np.asarray(deep))


def test_labels_and_splits():
    class WithClasses(list):
        classes = ("ant", "bee")

    pairs = WithClasses((image, row % 2) for row, image in enumerate(arrays(10)))
    with named(pairs) as (name, split):
        assert (name, split) == (IN_MEMORY, "train")
        train, test = open_labeled_splits(name, train_split="train[:60%]", test_split="train[60%:]")
        with pytest.raises(ValueError, match=r"split 'test' does not exist in 'data in memory'; it has: train"):
            open_labeled(name, split="test")
    assert (train.class_names, train.labels.tolist(), test.labels.tolist()) == (["ant", "bee"], [0, 1] * 3, [0, 1] * 2)
    np.testing.assert_array_equal(test.decode(3).numpy(), pairs[9][0].transpose(2, 0, 1))
    with named({"train": [(image, "ant") for image in arrays()], "val": [(arrays()[0], "ant")]}) as (name, split):
        assert split is None
        assert len(open_labeled(name, split="train+validation")) == 4


def test_a_stream():
    def rows():
        for image in arrays(4):
            yield {"number": 1, "picture": Image.fromarray(image)}

    stream = datasets.IterableDataset.from_generator(rows)
    with named(stream) as (name, _):
        source = open_source(name)
        for opening in (open_labeled, open_dataset):
            with pytest.raises(ValueError, match="has no random access"):
                opening(name)
    batch = StreamReader(source, source.shard_sizes(4), 0, 4, window=1, lanes=1).open_batch(0, 0, range(4))
    found = [next(batch.candidates(row)) for row in range(4)]
    for sample_id, reader in found:
        np.testing.assert_array_equal(read_image(reader()).numpy(), arrays(4)[sample_id].transpose(2, 0, 1))
    assert sorted(sample_id for sample_id, _ in found) == [0, 1, 2, 3]


def test_a_name_without_data():
    with pytest.raises(UsageError, match=r"^the images of this recipe were in memory: pass the same data"):
        open_source(IN_MEMORY)


A, B = arrays(2)
MISTAKES = {
    "empty": ([], "the sequence is empty: pass at least two images"),
    "empty split": ({"train": [A], "test": []}, "split 'test' is empty"),
    "empty Dataset": (datasets.Dataset.from_dict({"image": []}), "the data set in memory is empty"),
    "mixed": ([A, Image.fromarray(B)], "item 1 of the sequence is a PIL image, the first one a NumPy array"),
    "mixed labels": ([(A, 0), B], "item 1 of the sequence has no label, unlike the first one"),
    "dtype": ([A, B.astype(complex)], "item 1 of the sequence holds complex128 values, expected integers or floating"),
    "object": ([np.array(["a", None], object)] * 2, "item 0 of the sequence holds object values"),
    "shape": ([A, B[0, 0]], r"item 1 of the sequence has the shape \(3,\), expected \(height, width\)"),
    "one image": (A, r"the sequence is one array of the shape \(8, 9, 3\), expected images of one size"),
    "numbers": ([1, 2], "item 0 of the sequence is of the type int, expected a PIL image"),
    "a generator": ((image for image in [A]), "data of the type generator are not a data set: pass a path"),
    "None": (None, "data of the type NoneType are not"),
    "label": ([(A, 0), (B, "ant")], "label 1 of the sequence is 'ant', expected an integer"),
    "names of splits": ({0: [A]}, r"a mapping in memory takes names of splits to their images, got \[0\]"),
    "no images": (datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}), "no image column found: .*text, n"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_one_line(kind):
    data, message = MISTAKES[kind]
    with pytest.raises(ValueError, match=f"^{message}") as raised, named(data) as (name, _):
        open_source(name)
    assert "\n" not in str(raised.value)
