"""Every form in which images are passed, read lazily, and the errors that name the item."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocov3_hf.inference import FeatureExtractor, ImageClassifier
from mocov3_hf.inference.images import decode


OPTIONS = {"device": "cpu", "dtype": "float32", "batch_size": 2}


@pytest.fixture(scope="module", params=[0, 2], ids=["in the caller's thread", "in threads"])
def extract(request, vit):
    return FeatureExtractor(vit, num_workers=request.param, **OPTIONS)


def opened(files):
    """A file for each path, closed as soon as the next one is asked for."""
    for path in files:
        with open(path, "rb") as file:
            yield file


def opened_by_pil(files):
    for path in files:
        with Image.open(path) as image:
            yield image


FORMS = {
    "paths": list,
    "pathlib": lambda files: [Path(path) for path in files],
    "folder": lambda files: Path(files[0]).parent,
    "bytes": lambda files: [Path(path).read_bytes() for path in files],
    "bytearray": lambda files: [bytearray(Path(path).read_bytes()) for path in files],
    "memoryview": lambda files: [memoryview(Path(path).read_bytes()) for path in files],
    "BytesIO": lambda files: [io.BytesIO(Path(path).read_bytes()) for path in files],
    "generator of paths": iter,
    "generator of files that it closes": opened,
    "generator of PIL images that it closes": opened_by_pil,
    "arrays": lambda files: [decode(path).permute(1, 2, 0).numpy() for path in files],
    "tensors": lambda files: [decode(path) for path in files],
    "a mixture": lambda files: [files[0], Path(files[1]).read_bytes(), *map(decode, files[2:])],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_several_images(extract, files, form):
    torch.testing.assert_close(extract(FORMS[form](files)), extract(files), atol=1e-6, rtol=0)


def test_one_image_in_any_form_is_one_row(extract, files):
    expected = extract(files[:1])
    assert expected.shape == (1, 32)
    data = Path(files[0]).read_bytes()
    pixels = decode(files[0])
    forms = [files[0], Path(files[0]), data, bytearray(data), memoryview(data), io.BytesIO(data), pixels]
    for image in (*forms, pixels.permute(1, 2, 0).numpy(), Image.open(files[0])):
        torch.testing.assert_close(extract(image), expected, atol=1e-6, rtol=0)
    assert len(extract(torch.stack([pixels, pixels]))) == 2
    assert len(extract(np.stack([pixels, pixels]))) == 2


def test_a_list_of_one_is_a_list(vit, files):
    classify = ImageClassifier(vit, **OPTIONS)
    assert classify(files[:1]) == [classify(files[0])]
    assert classify(iter(files[:1])) == [classify(files[0])]
    assert classify([]) == []
    assert [name for name, _ in classify.stream([files[0], Path(files[1]).read_bytes()])] == [files[0], "image 1"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([None], "image 0: an image must be a path, encoded bytes, .* got NoneType"),
        (7, "image 0: an image must be .*, got int"),
        ({"image": b""}, "image 0: an image must be .*, got dict"),
        ([b"\xff\xd8\xff no"], "image 0 cannot be decoded"),
        ([b""], "image 0 .*empty"),
        (np.zeros((8, 8, 5), np.uint8), r"image 0 .*\(8, 8, 5\)"),
        (np.array([["a"]]), "image 0 .*numbers"),
        (torch.zeros(2, 3, 8, 8), "image 0: a tensor must be one image"),
        (io.StringIO("text"), 'image 0: the file is opened as text: open it with mode "rb"'),
        ("no/such.png", "no/such.png cannot be read: No such file"),
        ([], "no features: there are no images"),
    ],
)
def test_what_is_wrong_is_named(extract, images, message):
    with pytest.raises(ValueError, match=message) as raised:
        extract(images)
    assert "\n" not in str(raised.value)


def test_the_item_among_others_is_named(extract, files):
    with pytest.raises(ValueError, match=r"^image 3: an image must be"):
        extract([*files[:3], 3.5])
    with pytest.raises(ValueError, match=r"^image 1 cannot be decoded"):
        extract(image for image in (files[0], b"no image"))
    closed = io.BytesIO(b"")
    closed.close()
    with pytest.raises(ValueError, match=r"^image 0 cannot be read: I/O operation on closed file"):
        extract([closed])


def test_a_generator_is_read_as_needed(extract, files):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield files[0]

    stream = extract.stream(endless())
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(taken) <= 3 * 2 + 2 * 2 + 2
