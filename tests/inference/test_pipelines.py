"""`ImageClassifier` and `FeatureExtractor` against transformers' own pipelines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, ConvNextImageProcessor, pipeline
from transformers.utils import logging

from mocov3_hf.inference import FeatureExtractor, ImageClassifier
from mocov3_hf.inference.images import decode
from mocov3_hf.inference.preprocessing import Preprocessing
from tests.factories import NUM_LABELS, save_classifier, smooth


# transformers' `load_image` leaves the files it opens to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning"
)


def classifier_of(folder, **options):
    return ImageClassifier(folder, **{"dtype": "float32", "device": "cpu", "batch_size": 4} | options)


def scores(results):
    return np.array([[{one["label"]: one["score"] for one in result}[f"class {n}"] for n in range(NUM_LABELS)]
                     for result in results])  # fmt: skip


def assert_same(found, expected, atol=1e-5):
    assert [[one["label"] for one in result] for result in found] == [
        [one["label"] for one in result] for result in expected
    ]
    np.testing.assert_allclose(
        [[one["score"] for one in result] for result in found],
        [[one["score"] for one in result] for result in expected],
        atol=atol,
        rtol=1e-5,
    )


def test_classes_of_files(classifier, files):
    expected = pipeline("image-classification", model=classifier, device="cpu")(files)
    found = classifier_of(classifier)(files)
    assert_same(found, expected)
    assert len(found[0]) == 5  # the pipeline's default
    assert np.ptp([max(one["score"] for one in result) for result in expected]) > 0.02, (
        "the images must not look alike to the model"
    )


@pytest.mark.parametrize("top_k", [1, 3, 100])
@pytest.mark.parametrize("function", [None, "softmax", "SIGMOID", "none"])
def test_options(vit, files, top_k, function):
    options = {"top_k": top_k, "function_to_apply": function}
    expected = pipeline("image-classification", model=vit, device="cpu")(files[:3], **options)
    assert_same(classifier_of(vit)(files[:3], **options), expected)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"problem_type": "multi_label_classification"}, {}),
        # Told in words: the pipelines of early versions take softmax here.
        ({"problem_type": "regression"}, {"function_to_apply": "none"}),
        ({"num_labels": 1}, {}),
    ],
)
def test_function_by_configuration(tmp_path, files, config, options):
    folder = save_classifier(tmp_path, "vit", **config)
    expected = pipeline("image-classification", model=folder, device="cpu")(files[:3], **options)
    assert_same(classifier_of(folder)(files[:3]), expected)
    assert abs(sum(one["score"] for one in expected[0]) - 1) > 1e-3, "softmax would pass too"


def test_images_in_memory(vit, files):
    images = []
    for path in files:
        with Image.open(path) as image:
            image.load()
            images.append(image)
    expected = pipeline("image-classification", model=vit, device="cpu")(images)
    assert_same(classifier_of(vit)(images), expected)
    assert_same(classifier_of(vit)(decode(path) for path in files), expected)
    assert_same(classifier_of(vit)(Path(path).read_bytes() for path in files), expected)


def test_one_image_is_one_list(vit, files):
    expected = pipeline("image-classification", model=vit, device="cpu")(files[0])
    classify = classifier_of(vit)
    with Image.open(files[0]) as opened:
        for image in (files[0], opened, decode(files[0])):
            assert_same([classify(image)], [expected])


def test_folder_is_all_its_images_in_order(vit, files):
    classify = classifier_of(vit)
    folder = files[0].rsplit("/", 1)[0]
    assert [name for name, _ in classify.stream(folder)] == files
    assert_same(classify(folder), classify(files))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_features(tmp_path, files, kind):
    folder = save_classifier(tmp_path, kind)
    expected = pipeline("image-feature-extraction", model=folder, device="cpu", pool=True)(files)
    found = FeatureExtractor(folder, dtype="float32", device="cpu", batch_size=4)(files)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected)[:, 0], atol=2e-5, rtol=1e-5)


def test_pixels_are_the_processors_own(classifier, files):
    processor = AutoImageProcessor.from_pretrained(classifier)
    preprocessing = Preprocessing(processor)
    assert preprocessing.is_batched
    for path in files:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        expected = processor(upright, return_tensors="pt")["pixel_values"]
        found = preprocessing.finish([preprocessing.prepare(decode(path))], torch.device("cpu"))
        assert torch.equal(found, expected)


def test_other_processors_are_called_as_they_are(vit, tmp_path, files):
    """ConvNeXt's resizes by a crop fraction of its own."""
    folder = save_classifier(tmp_path, "vit")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8).save_pretrained(folder)
    classify = classifier_of(folder)
    assert not classify.preprocessing.is_batched
    assert_same(classify(files), pipeline("image-classification", model=folder, device="cpu")(files))
    with pytest.raises(AssertionError):
        assert_same(classifier_of(vit)(files), classify(files))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 9, 50])
def test_order_and_remainders(vit, files, workers, batch_size):
    many = files * 3
    found = classifier_of(vit, num_workers=workers, batch_size=batch_size)(many, top_k=2)
    assert_same(found, classifier_of(vit, num_workers=0)(files, top_k=2) * 3)


def test_input_is_read_as_needed(vit):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield torch.from_numpy(smooth(32, 32, len(taken))).permute(2, 0, 1)

    stream = classifier_of(vit, num_workers=2).stream(endless())
    for _ in range(10):
        next(stream)
    stream.close()
    assert len(taken) <= 10 + 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_bf16_scores(classifier, files, dtype):
    expected = scores(pipeline("image-classification", model=classifier, device="cpu")(files, top_k=NUM_LABELS))
    found = scores(classifier_of(classifier, dtype=dtype)(files, top_k=NUM_LABELS))
    np.testing.assert_allclose(found, expected, atol=0.06)
    if dtype == "bfloat16":
        assert not np.allclose(found, expected, atol=1e-6), "this is not bfloat16"


def test_bf16_on_a_cpu_without_it_works_and_warns(vit, files, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    logging.enable_propagation()
    try:
        classify = classifier_of(vit, dtype="bfloat16")
    finally:
        logging.disable_propagation()
    assert "no instructions for torch.bfloat16" in caplog.text
    assert np.isfinite(scores(classify(files, top_k=NUM_LABELS))).all()
    assert classifier_of(vit, dtype="auto").dtype == torch.float32


def test_results_are_json(vit, files):
    json.dumps(classifier_of(vit, dtype="bfloat16")(files))
