"""examples/segmentation.py and examples/detection.py: a few steps on tiny data, their metrics, and mistakes."""

import importlib
import json

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForObjectDetection, UperNetForSemanticSegmentation

from benchmarks.dense_data import make_data
from mocov3_hf.processing import build_image_processor
from tests.factories import VIT, pretraining_model
from tests.launch import ROOT


pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")
IMAGE_SIZE = 64


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "scenes", {"train": 8, "test": 6})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    pretraining_model().save_pretrained(folder)
    build_image_processor(VIT["image_size"]).save_pretrained(folder)
    return folder


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture
def arguments(scenes, encoder, tmp_path):
    values = {
        "dataset_name": scenes,
        "model": encoder,
        "output_dir": tmp_path / "out",
        "image_size": IMAGE_SIZE,
        "max_steps": 2,
        "train_batch_size": 4,
        "decoder_width": 32,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_segmentation(example, arguments, scenes, tmp_path, capsys):
    segmentation = example("segmentation")
    arguments += ["--num_labels", "11"]
    content = segmentation.main(arguments)
    assert content == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(content["results"]) == ["pre-trained", "random"]
    printed = capsys.readouterr().out
    assert printed.count("weights of") == 1
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert rows[0] == "| start | mean IoU |"
    (options,) = segmentation.parse(segmentation.COMMAND, arguments)
    collate = segmentation.Collator(options, 11, False)
    batch = collate(list(datasets.load_from_disk(str(scenes))["test"]))
    for row, (start, result) in zip(rows[1:], content["results"].items(), strict=True):
        assert result["steps"] == 2
        assert row == f"| {start} | {100 * result['mean IoU']:.1f} % |"
        model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out" / start).eval()
        with torch.no_grad():
            found = model(batch["pixel_values"]).logits.argmax(1)
        labels, scores = batch["labels"], []
        for label in range(model.config.num_labels):
            union = ((found == label) | (labels == label)).sum()
            if union > 0:
                scores.append(float(((found == label) & (labels == label)).sum() / union))
        assert result["mean IoU"] == pytest.approx(np.mean(scores), abs=1e-4)


def test_detection(example, arguments, tmp_path, capsys):
    content = example("detection").main([*arguments, "--num_queries", "20", "--decoder_layers", "1"])
    assert content == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "| start | mAP | mAP at IoU 0.5 |" in capsys.readouterr().out.splitlines()
    for start, result in content["results"].items():
        assert result["steps"] == 2
        assert 0 <= result["mAP"] <= result["mAP at IoU 0.5"] <= 1
        model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out" / start)
        assert model.config.id2label[7] == "7"
        assert model.config.backbone_config.out_features == ["stage2", "stage3", "stage4"]


def test_boxes_and_their_average_precision(example, arguments, scenes):
    from torchmetrics.detection import MeanAveragePrecision

    detection = example("detection")
    (options,) = detection.parse(detection.COMMAND, arguments)
    rows = list(datasets.load_from_disk(str(scenes))["test"])
    labels = detection.Collator(options, False)(rows)["labels"]
    for row, label in zip(rows, labels, strict=True):
        for (x, y, width, height), found in zip(row["objects"]["bbox"], label["boxes"].tolist(), strict=True):
            assert found == pytest.approx([(x + width / 2) / 32, (y + height / 2) / 32, width / 32, height / 32])
        assert label["class_labels"].tolist() == row["objects"]["category"]
    # A model that finds every box, and one that finds them too high: 0.7 of 1.3 heights are in both boxes, IoU 0.54.
    logits, boxes = torch.full((len(rows), 5, 10), -9.0), torch.full((len(rows), 5, 4), 0.5)
    for number, label in enumerate(labels):
        boxes[number, : len(label["boxes"])] = label["boxes"]
        for query, category in enumerate(label["class_labels"]):
            logits[number, query, category] = 9.0
    read = detection.read_predictions(IMAGE_SIZE)
    scores = []
    for shift in (0.0, 0.3):
        moved = boxes.clone()
        moved[..., 1] -= shift * boxes[..., 3]
        metric = MeanAveragePrecision()
        metric.update(*read((logits, moved), labels))
        scores.append(float(metric.compute()["map"]))
    assert scores == [1.0, pytest.approx(0.1, abs=0.01)]  # one of ten thresholds, and boxes of low scores


def test_mistakes_are_named_in_one_line(example, arguments, scenes, tmp_path):
    segmentation, detection = example("segmentation"), example("detection")
    for module, more, message in (
        (segmentation, ["--mask_column", "masks"], "no column 'masks' among image, mask, objects: pass --mask_column"),
        (segmentation, ["--num_labels", "2"], r"a mask has class \d+ of 2: pass --num_labels"),
        (segmentation, ["--mask_column", "image"], "masks need one channel, whose values are classes, got mode RGB"),
        (segmentation, ["--test_split", "tset"], "split 'tset' .*test"),
        (segmentation, ["--lerning_rate", "1"], "did you mean '--learning_rate'"),
        (detection, ["--image_size", "80"], "--image_size must be a multiple of 32 for RT-DETR, got 80"),
        (detection, ["--objects_column", "mask"], "objects need `bbox` and `category` with class names"),
        (detection, ["--objects_column", "boxes"], "no column 'boxes' .*: pass --objects_column"),
        (detection, ["--model", str(tmp_path / "nothing")], "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            module.main([*arguments, *more])
