"""Every evaluation on bands and on 16-bit images, from the data set to the saved classifier."""

import json

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.evaluation import evaluate, finetune, knn, linear_probe
from mocov3_hf.inference import FeatureExtractor, ImageClassifier
from mocov3_hf.processing import PixelFormat, build_image_processor, pixel_format_of
from tests.factories import VIT


RANGES = ((0, 2), (0, 20), (0, 2e4), (0, 2))
SHORT = ["--num_train_epochs", 6, "--train_batch_size", 12, "--eval_strategy", "no", "--save_strategy", "no"]


@pytest.fixture(scope="session")
def bands(tmp_path_factory):
    """Three classes that differ in bands 1 to 3, with gaps; arrays in parquet."""
    folder = tmp_path_factory.mktemp("bands")
    rng = np.random.default_rng(0)
    feature = Features({"bands": Array3D((4, 20, 24), "float32"), "label": ClassLabel(names=["a", "b", "c"])})
    for split, number in {"train": 36, "test": 18}.items():
        labels = np.arange(number) % 3
        images = rng.random((number, 4, 5, 6)).repeat(4, 2).repeat(4, 3)
        images[np.arange(number), 1 + labels] += 1
        images = images * np.array([1, 10, 1e4, 1])[:, None, None]
        images[:, 0, :3], images[0, 3] = np.nan, np.inf
        table = {"bands": list(images.astype(np.float32)), "label": labels.tolist()}
        Dataset.from_dict(table, features=feature).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def radiographs(tmp_path_factory):
    """Two classes of 12-bit images with an offset in 16-bit PNG: dark and bright within the range."""
    folder = tmp_path_factory.mktemp("radiographs")
    rng = np.random.default_rng(0)
    for split, number in {"train": 12, "test": 6}.items():
        for label in range(2):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(number):
                levels = 1000 + 1000 * label + rng.integers(0, 500, (40, 40))
                Image.fromarray(levels.astype(np.uint16)).save(folder / split / str(label) / f"{index}.png")
    return folder


def save_model(folder, channels, pixel_format=None):
    torch.manual_seed(0)
    backbone = VIT | {"num_channels": channels}
    MoCoV3ForPreTraining(
        MoCoV3Config(backbone_config=backbone, head_hidden_size=16, projection_dim=8)
    ).save_pretrained(folder)
    build_image_processor(32, pixel_format=pixel_format).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def band_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), 4, PixelFormat(4, RANGES))


def arguments(*values):
    return [str(value) for value in values]


def test_knn_and_cached_linear(band_model, bands, tmp_path):
    options = arguments(band_model, "--dataset_name", bands, "--output_dir", tmp_path, "--cache_dir", tmp_path)
    assert knn.main([*options, "--k", "3"])["knn3_top1"] > 0.8
    assert linear_probe.main([*options, "--cached", "--train_batch_size", "12"])["linear_top1"] > 0.8
    first, _ = json.loads((tmp_path / "results.json").read_text())["results"]
    assert json.loads(first["settings"]["transform"])["pixel_range"] == [list(pair) for pair in RANGES]


@pytest.mark.slow
def test_a_trained_classifier_takes_its_bands_along(band_model, bands, tmp_path):
    options = ["--dataset_name", bands, "--output_dir", tmp_path, *SHORT, "--base_learning_rate", 30]
    metrics = linear_probe.main(arguments(band_model, *options))
    assert metrics["linear_top1"] > 0.6
    found = evaluate.main(arguments(tmp_path, "--dataset_name", bands))
    assert found["top1"] == metrics["linear_top1"]
    table = Dataset.from_parquet(str(bands / "test.parquet"))
    images = [np.asarray(image, np.float32) for image in table["bands"]]
    answers = ImageClassifier(tmp_path, num_workers=0)(images, top_k=1)
    hits = [
        int("abc".index(answer[0]["label"]) == label) for answer, label in zip(answers, table["label"], strict=True)
    ]
    assert np.mean(hits) == found["top1"]


def test_features_of_arrays_files_and_tensors(band_model, bands, tmp_path):
    image = np.asarray(Dataset.from_parquet(str(bands / "test.parquet"))[3]["bands"], np.float32)
    np.save(tmp_path / "image.npy", image)
    extract = FeatureExtractor(band_model, num_workers=0, dtype="float32")
    processor = AutoImageProcessor.from_pretrained(band_model)
    with torch.no_grad():
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        expected = AutoModel.from_pretrained(band_model).eval()(pixel_values).pooler_output
    assert expected.isfinite().all()
    inputs = [image, image.transpose(1, 2, 0), torch.from_numpy(image), str(tmp_path / "image.npy")]
    for features in (extract(inputs), *(extract([one]) for one in inputs)):
        torch.testing.assert_close(features, expected.expand_as(features))
    torch.testing.assert_close(extract(image), expected)
    with pytest.raises(ValueError, match="expected an axis of 4 channels"):
        extract(image[:2])
    with pytest.raises(ValueError, match="no pixel with data"):
        extract(np.full_like(image, np.nan))


@pytest.mark.slow
def test_rgb_weights_are_fine_tuned_on_bands(bands, tmp_path, fails):
    rgb = save_model(tmp_path / "rgb", 3)
    options = ["--dataset_name", bands, *SHORT, "--warmup_epochs", 1, "--base_learning_rate", 0.05]
    line = fails(finetune.main, [rgb, *options, "--output_dir", tmp_path / "refused"])
    assert "the images have 4 channels" in line
    assert "takes 3" in line
    out = tmp_path / "bands"
    metrics = finetune.main(
        arguments(rgb, *options, "--adapt_input_channels", "--pixel_range", "auto", "--output_dir", out)
    )
    assert metrics["finetune_top1"] > 0.5
    processor = AutoImageProcessor.from_pretrained(out)
    assert pixel_format_of(processor).num_channels == 4
    assert len(processor.pixel_range) == len(processor.image_mean) == 4
    options += ["--adapt_input_channels", "--rand_augment_num_ops", 2]
    assert "RandAugment" in fails(finetune.main, [rgb, *options, "--output_dir", tmp_path / "other"])


@pytest.mark.slow
def test_an_8_bit_model_sees_the_contrast_of_radiographs(radiographs, tmp_path, capsys):
    rgb = save_model(tmp_path / "rgb", 3)
    metrics = knn.main(arguments(rgb, "--dataset_name", radiographs, "--k", 3))
    assert metrics["knn3_top1"] == 1
    assert "images: values scaled from 1" in capsys.readouterr().out
    options = ["--dataset_name", radiographs, "--output_dir", tmp_path / "out", *SHORT, "--base_learning_rate", 30]
    linear_probe.main(arguments(rgb, *options))
    low, high = pixel_format_of(AutoImageProcessor.from_pretrained(tmp_path / "out")).pixel_range
    assert 1000 <= low < 1100
    assert 2400 < high <= 2500
    # Loaded again, without a training split to estimate a range from.
    assert evaluate.main(arguments(tmp_path / "out", "--dataset_name", radiographs))["top1"] > 0.9
    classify = ImageClassifier(tmp_path / "out", num_workers=0)
    paths = [str(radiographs / "test" / label / "0.png") for label in "01"]
    assert [answer[0]["label"] for answer in classify(paths)] == ["0", "1"]
