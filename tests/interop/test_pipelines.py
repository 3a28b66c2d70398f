"""Converted models in the library's pipelines: paths, URLs, images and batches, and both backends of the processor."""

import functools
import http.server
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from mocov3_hf.interop import convert_checkpoint
from tests.interop.conftest import OVERRIDES, mmpretrain_classification, official


LABELS = ["cat", "dog", "hen", "owl", "pig"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for body in ("vit", "resnet"):
        torch.save(official(body), root / f"{body}.pth")
        convert_checkpoint(root / f"{body}.pth", root / body, **OVERRIDES[body])
        torch.save(mmpretrain_classification(body), root / f"{body}-cls.pth")
        convert_checkpoint(root / f"{body}-cls.pth", root / f"{body}-cls", labels=LABELS, **OVERRIDES[body])
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((140, 180), Image.Resampling.BICUBIC).save(root / "image.png")
    return root


@pytest.fixture
def image(folders):
    return Image.open(folders / "image.png")


@pytest.fixture
def url(folders):
    handler = functools.partial(QuietHandler, directory=str(folders))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/image.png"
    server.shutdown()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_classification_of_every_kind_of_input(folders, body, image, url):
    classify = pipeline("image-classification", model=str(folders / f"{body}-cls"))
    model = AutoModelForImageClassification.from_pretrained(folders / f"{body}-cls")
    inputs = AutoImageProcessor.from_pretrained(folders / f"{body}-cls")(image, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits[0].softmax(-1)
    expected = sorted(zip(probabilities.tolist(), LABELS, strict=True), reverse=True)
    for source in (image, str(folders / "image.png"), url):
        answer = classify(source)
        assert [row["label"] for row in answer] == [label for _, label in expected]
        np.testing.assert_allclose([row["score"] for row in answer], [score for score, _ in expected], atol=1e-5)
    batch = classify([image, str(folders / "image.png"), url], batch_size=2, top_k=1)
    assert [rows[0]["label"] for rows in batch] == [expected[0][1]] * 3


@pytest.mark.slow
def test_features_are_the_pooled_vector(folders, body, image):
    extract = pipeline("image-feature-extraction", model=str(folders / body), pool=True)
    inputs = AutoImageProcessor.from_pretrained(folders / body)(image, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folders / body)(**inputs).pooler_output[0]
    np.testing.assert_allclose(extract(image)[0], expected.numpy(), rtol=0, atol=1e-5)
    batch = extract([image, str(folders / "image.png")], batch_size=2)
    np.testing.assert_allclose(batch[1][0], expected.numpy(), rtol=0, atol=1e-5)


def test_backends_of_the_processor_agree(folders, body, image):
    with_torchvision, with_pil = (
        AutoImageProcessor.from_pretrained(folders / body, backend=backend)(image, return_tensors="pt")["pixel_values"]
        for backend in ("torchvision", "pil")
    )
    assert with_torchvision.shape == with_pil.shape
    # One level of 255 is 0.0175 after division by the smallest deviation: the two round differently.
    assert (with_torchvision - with_pil).abs().max() < 2 * 0.0175


def test_processor_normalizes_as_the_evaluation_does(folders, body):
    processor = AutoImageProcessor.from_pretrained(folders / body)
    side = {"vit": 32, "resnet": 64}[body]
    red = Image.new("RGB", (200, 100), (255, 0, 128))
    values = processor(red, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, side, side)
    expected = (torch.tensor([255, 0, 128]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(values, expected.view(1, 3, 1, 1).expand_as(values), rtol=0, atol=1e-5)
    gray = processor(Image.new("L", (100, 100), 128), return_tensors="pt")["pixel_values"]
    assert gray.shape == (1, 3, side, side)
