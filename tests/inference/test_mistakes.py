"""Bad images and invalid arguments: each error names the thing and the fix."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import logging

from mocov3_hf import MoCoV3Config, MoCoV3Model
from mocov3_hf.inference import FeatureExtractor, ImageClassifier
from mocov3_hf.processing import build_image_processor
from tests.factories import BACKBONES


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff no image")
    return str(path)


def test_bad_image_stops_by_name(vit, files, broken):
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"broken\.jpg cannot be decoded"):
            ImageClassifier(vit, device="cpu", num_workers=workers)([files[0], broken, files[1]])


def test_bad_images_are_skipped(vit, files, broken):
    images = [files[0], broken, files[1], "no/such/file.png"]
    options = {"device": "cpu", "dtype": "float32", "bad_images": "skip"}
    classify, extract = ImageClassifier(vit, **options), FeatureExtractor(vit, **options)
    found = classify(images)
    assert found[1] is None
    assert found[3] is None
    assert [found[0], found[2]] == classify([files[0], files[1]])
    features = extract(images)
    assert features[[1, 3]].isnan().all()
    assert torch.equal(features[[0, 2]], extract([files[0], files[1]]))
    assert [name for names, _ in extract.stream(images) for name in names] == [files[0], files[1]]


def test_only_bad_images(vit, broken):
    options = {"device": "cpu", "bad_images": "skip"}
    assert ImageClassifier(vit, **options)([broken]) == [None]
    with pytest.raises(ValueError, match="0 of 1 images could be decoded"):
        FeatureExtractor(vit, **options)([broken])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("", "image 0 has an empty path"),
        ("https://host/cat.jpg", "cat.jpg is a URL, which is not downloaded: repair it"),
        (b"", r"image 0 is empty \(0 bytes\): repair it, or skip it with .* \(in Python bad_images='skip'\)"),
        (np.zeros((0, 32, 3), np.uint8), r"image 0 has the shape \(0, 32, 3\), which holds no values"),
        (np.zeros((40, 40, 3), np.uint8), r"has the shape \(40, 40, 3\), 4800 values, more than the allowed 4000"),
        (None, "image 0: an image must be a path"),
    ],
)
def test_each_mistake_has_its_message(vit, image, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(vit, device="cpu", max_pixels=4000)([image])


def test_more_pixels_than_allowed(vit, files, tmp_path):
    Image.new("L", (200, 200)).save(tmp_path / "bomb.png")
    data = (tmp_path / "bomb.png").read_bytes()
    extract = FeatureExtractor(vit, device="cpu", max_pixels=39_999)
    for image in (tmp_path / "bomb.png", data, io.BytesIO(data)):
        with pytest.raises(ValueError, match="200x200 pixels, more than the allowed 39999"):
            extract([image])
    assert len(extract(files[0])) == 1


def test_a_folder_in_a_list_and_a_folder_of_other_files(vit, files, tmp_path, capsys):
    extract = FeatureExtractor(vit, device="cpu")
    with pytest.raises(ValueError, match="is a folder inside a list of images"):
        extract([str(tmp_path)])
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match="only 1 of the kind: parquet file, pass the folder as --dataset_name"):
        extract(tmp_path)
    (tmp_path / "photo.png").write_bytes(Path(files[0]).read_bytes())
    for name in ("b.zip", "notes.txt", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    assert len(extract(tmp_path)) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    for text in (
        "1 broken link, such as broken.jpg",
        "1 side file (.txt)",
        "1 archive, pass it by itself, such as b.zip",
    ):
        assert text in line
    assert "hidden" not in line


def test_an_array_is_height_width_channels(vit):
    wide = np.random.default_rng(0).integers(256, size=(3, 50, 3), dtype=np.uint8)
    extract = FeatureExtractor(vit, device="cpu")
    assert torch.equal(extract(wide), extract(Image.fromarray(wide)))


def test_arguments_of_another_type(vit):
    for options in ({"batch_size": 2.5}, {"batch_size": "8"}, {"num_workers": -1}):
        with pytest.raises(ValueError, match=r"must be at least [01] and an integer, got"):
            FeatureExtractor(vit, device="cpu", **options)
    with pytest.raises(ValueError, match="got NoneType: save a model with save_pretrained and pass its folder"):
        FeatureExtractor(None)


def test_truncated_image_in_memory(vit, files, tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(Path(files[0]).read_bytes()[:-200])
    with Image.open(path) as image, pytest.raises(ValueError, match=r"cut\.jpg cannot be decoded"):
        ImageClassifier(vit, device="cpu")([image])


def test_encoder_is_no_classifier(tmp_path, files):
    MoCoV3Model(MoCoV3Config(backbone_config=BACKBONES["vit"])).save_pretrained(tmp_path)
    build_image_processor(32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder without a classification head \(classifier.*mocov3 linear-probe"):
        ImageClassifier(tmp_path, device="cpu")
    assert FeatureExtractor(tmp_path, device="cpu")(files).shape == (len(files), 32)


def test_model_without_processor_gets_the_default_with_a_warning(tmp_path, files, caplog):
    MoCoV3Model(MoCoV3Config(backbone_config=BACKBONES["vit"])).save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        features = FeatureExtractor(tmp_path, device="cpu", dtype="float32")(files)
    finally:
        logging.disable_propagation()
    assert "has no image processor: resizing to 37, cropping to 32" in caplog.text
    build_image_processor(32).save_pretrained(tmp_path)
    assert torch.equal(features, FeatureExtractor(tmp_path, device="cpu", dtype="float32")(files))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of auto, float32"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"bad_images": "ignore"}, "bad_images must be one of stop, skip"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
    ],
)
def test_wrong_options(vit, options, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(vit, **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), r"uint8 \(3, H, W\), got torch.float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"got torch.uint8 \(8, 8, 3\)"),
        (7, "got int"),
    ],
)
def test_wrong_images(vit, image, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(vit, device="cpu")([image])


def test_wrong_calls(vit, files, tmp_path):
    classify = ImageClassifier(vit, device="cpu")
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        classify(files, top_k=0)
    with pytest.raises(ValueError, match="function_to_apply must be one of"):
        classify(files, function_to_apply="tanh")
    with pytest.raises(ValueError, match="holds no images"):
        classify(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        ImageClassifier(tmp_path / "nothing")
