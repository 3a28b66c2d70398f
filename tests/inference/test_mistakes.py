"""Bad images and invalid arguments: each error names the thing and the fix."""

from pathlib import Path

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
    with pytest.raises(ValueError, match="none of the 1 images could be decoded"):
        FeatureExtractor(vit, **options)([broken])


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
