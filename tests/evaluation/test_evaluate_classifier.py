"""The test of saved classifiers: metrics, classes matched by name, any number of processes, mistakes."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from transformers import AutoImageProcessor, AutoModelForImageClassification

from mocov3_hf.data.labeled import LabeledImages, open_labeled
from mocov3_hf.evaluation.classifier import build_classifier
from mocov3_hf.evaluation.evaluate import main, match_classes
from mocov3_hf.evaluation.features import labeled_features
from mocov3_hf.evaluation.linear import fit_linear_classifier
from mocov3_hf.loading import load_encoder, load_processor
from mocov3_hf.processing import ProcessorTransform
from mocov3_hf.results import read_results
from tests.fork_server import ranks
from tests.launch import python


SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "evaluate.py"


@pytest.fixture(scope="module")
def classifier_folder(model_folder, image_folder, tmp_path_factory):
    """Tells colors apart, except for a bias that makes some answers wrong."""
    folder = tmp_path_factory.mktemp("classifier")
    encoder = load_encoder(model_folder)
    transform = ProcessorTransform(load_processor(model_folder, encoder.config))
    train = labeled_features(encoder, open_labeled(str(image_folder), split="train"), transform, progress=False)
    linear = fit_linear_classifier(train.features, train.labels)
    rows = linear.logits(train.features)
    linear.bias[0] += (rows.amax(dim=1) - rows[:, 0]).quantile(0.6)
    build_classifier(encoder, linear, ["ant", "bee", "cow"]).save_pretrained(folder)
    transform.processor.save_pretrained(folder)
    return folder


def command(model, images, *more):
    return ["--model", str(model), "--dataset_name", str(images), "--batch_size", "4", *map(str, more)]


def with_config(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_metrics_are_those_of_a_plain_loop(classifier_folder, image_folder, tmp_path, capsys):
    metrics = main(command(classifier_folder, image_folder, "--output_dir", tmp_path))
    model = AutoModelForImageClassification.from_pretrained(classifier_folder).eval()
    processor = AutoImageProcessor.from_pretrained(classifier_folder)
    labels, predicted = [], []
    for path in sorted(image_folder.glob("test/*/*.png")):
        with Image.open(path) as image, torch.no_grad():
            logits = model(**processor(image.convert("RGB"), return_tensors="pt")).logits
        labels.append(path.parent.name)
        predicted.append(model.config.id2label[int(logits.argmax())])
    assert metrics["top1"] == accuracy_score(labels, predicted)
    assert metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert 0.4 < metrics["top1"] < 1, "neither chance nor perfect, or little would be tested"
    printed = capsys.readouterr().out
    assert f"{100 * metrics['top1']:.2f} %" in printed
    assert "21 images, classes matched by name" in printed
    (result,) = read_results(tmp_path)
    assert (result["task"], result["metrics"], result["settings"]["classes"]) == ("evaluate", metrics, "by name")
    assert result["dataset"]["size"] == 21
    assert set(result["metrics"]["per_class"]) == {"ant", "bee", "cow"}


def test_classes_in_another_order_are_matched_by_name(classifier_folder, image_folder, tmp_path, capsys):
    """The same images whose data set numbers the classes cow, ant, bee."""
    expected = main(command(classifier_folder, image_folder, "--output_dir", tmp_path))
    dataset = datasets.load_dataset(str(image_folder), split="test")
    names = ["cow", "ant", "bee"]
    numbers = [names.index(dataset.features["label"].int2str(label)) for label in dataset["label"]]
    (tmp_path / "data").mkdir()
    dataset = dataset.remove_columns("label").add_column("label", numbers)
    dataset = dataset.cast_column("label", datasets.ClassLabel(names=names))
    dataset.to_parquet(tmp_path / "data" / "test-0.parquet")
    metrics = main(command(classifier_folder, tmp_path / "data", "--output_dir", tmp_path))
    assert metrics == expected
    assert "by name, in another order" in capsys.readouterr().out
    by_number = main(
        command(classifier_folder, tmp_path / "data", "--output_dir", tmp_path, "--match_classes", "number")
    )
    assert by_number["top1"] < expected["top1"] - 0.2


def test_a_data_set_with_fewer_classes_is_a_part_of_the_head(classifier_folder, image_folder, tmp_path):
    whole = main(command(classifier_folder, image_folder, "--output_dir", tmp_path))
    shutil.copytree(image_folder / "test" / "bee", tmp_path / "data" / "test" / "bee")
    shutil.copytree(image_folder / "test" / "cow", tmp_path / "data" / "test" / "cow")
    metrics = main(command(classifier_folder, tmp_path / "data", "--output_dir", tmp_path))
    assert metrics["per_class"] == whole["per_class"] | {"ant": None}
    assert read_results(tmp_path)[1]["settings"]["classes"] == "by name, 2 of 3"


def test_numbers_are_taken_where_there_are_no_names(classifier_folder, image_folder, tmp_path):
    labels = {str(number): f"LABEL_{number}" for number in range(3)}
    folder = with_config(
        classifier_folder, tmp_path / "m", id2label=labels, label2id={name: int(n) for n, name in labels.items()}
    )
    metrics = main(command(folder, image_folder))
    assert metrics["top1"] == main(command(classifier_folder, image_folder, "--output_dir", tmp_path))["top1"]
    assert read_results(folder)[0]["settings"]["classes"] == "by number"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_one_process_and_several_give_the_same_file(classifier_folder, image_folder, tmp_path, processes):
    """21 images in batches of 4 are six batches, the last of a single image: three or two for each process."""
    main(command(classifier_folder, image_folder, "--output_dir", tmp_path / "one"))
    ranks(processes, SCRIPT, *command(classifier_folder, image_folder, "--output_dir", tmp_path / "more"))
    (one,), (more,) = read_results(tmp_path / "one"), read_results(tmp_path / "more")
    assert (one["hardware"]["num_processes"], more["hardware"]["num_processes"]) == (1, processes)
    assert one["metrics"] == more["metrics"], "to the last bit of the loss"
    assert one["model"] == more["model"]


@pytest.mark.slow
def test_a_published_name_stands_for_its_folder(classifier_folder, image_folder, tmp_path, fails):
    """Found in the cache of the zoo, as a fetch leaves it; the name is what is recorded."""
    name = "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k"
    folder = tmp_path / "mocov3_hf" / "models" / name
    shutil.copytree(classifier_folder, folder)
    (folder / "conversion.json").write_text("{}")
    done = python(SCRIPT, *command(name, image_folder), HF_HOME=str(tmp_path))
    (result,) = read_results(folder)
    assert result["model"]["name"] == name
    assert f"classifier: {name} on" in done.stdout
    assert "model folder 'vit-small-p16_in1k' does not exist" in fails(
        main, command("vit-small-p16_in1k", image_folder)
    )


def test_a_classifier_with_one_answer_is_reported_as_collapsed(classifier_folder, image_folder, tmp_path):
    state = load_file(classifier_folder / "model.safetensors")
    state["classifier.weight"].zero_()
    state["classifier.bias"].copy_(torch.tensor([0.0, 1.0, 0.0]))
    shutil.copytree(classifier_folder, tmp_path / "model")
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="the same class is predicted for all 21 images: the model has collapsed"):
        metrics = main(command(tmp_path / "model", image_folder))
    assert (metrics["answered_classes"], metrics["top1"]) == (1, pytest.approx(1 / 3))


class Config:
    def __init__(self, names):
        self.id2label, self.num_labels = dict(enumerate(names)), len(names)


def split_of(labels, class_names):
    return LabeledImages(None, np.asarray(labels), class_names)


@pytest.mark.parametrize(
    ("labels", "own", "names", "by", "message"),
    [
        ([0], ["a", "x"], ["a", "b"], "name", "1 of 2 classes of the data set are not among the 2 of the classifier"),
        ([0], ["a", "x"], ["a", "b"], "name", r"\(such as 'x'; the classifier has 'a', 'b'\): pass"),
        ([0], ["a", "b"], ["a", "b", "b"], "name", "the classifier has the class 'b' twice"),
        ([0], ["a", "b"], ["LABEL_0"], "name", "the data set has 2 classes, the classifier 1"),
        ([0], ["a", "b"], ["x", "y", "z"], "number", "the data set has 2 classes, the classifier 3"),
        ([0, 2, 3], None, ["x", "y"], "name", r"2 labels are outside the classifier's 2 classes \(first in row 1: 2"),
    ],
)
def test_classes_that_do_not_match_are_refused_in_one_line(labels, own, names, by, message):
    with pytest.raises(ValueError, match=message) as error:
        match_classes(split_of(labels, own), Config(names), by)
    assert "\n" not in str(error.value)


def test_equal_lists_with_a_name_twice_need_no_matching():
    """ImageNet's crane is a bird and a machine."""
    split = split_of([0, 1], ["crane", "crane"])
    assert match_classes(split, Config(["crane", "crane"])) == (split, "by name", ["crane", "crane"])


def broken_folder(classifier_folder, target, what):
    if what == "config":
        labels = {str(number): f"c{number}" for number in range(5)}
        return with_config(classifier_folder, target, id2label=labels, label2id={})
    shutil.copytree(classifier_folder, target)
    weights = load_file(target / "model.safetensors")
    del weights["mocov3.backbone.layernorm.weight"]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", r"holds classifier\.\w+ of shape \(3.*\), but its config\.json \(5 classes\) expects"),
        ("weights", r"lacks 1 weights of MoCoV3ForImageClassification \(mocov3\.backbone\.layernorm\.weight\)"),
    ],
)
def test_damaged_classifiers_are_refused(classifier_folder, image_folder, tmp_path, what, message, fails):
    folder = broken_folder(classifier_folder, tmp_path / "model", what)
    assert re.search(message, fails(main, command(folder, image_folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--test_split", "val"], "split 'val' does not exist .* it has: train, test. .* as --test_split$"),
        (["--model", "/nowhere"], "model folder '/nowhere' does not exist"),
        (["--model", "someone/model"], "does not exist; for a model on the Hub pass --output_dir for results.json"),
        (["--batch_size", "many"], "--batch_size takes one integer, got 'many'"),
        (["--match_clases", "name"], "there is no option '--match_clases'; did you mean '--match_classes'"),
        (["--mixed_precision", "int8"], "takes one of auto, no, bf16, fp16, got 'int8'"),
        (["--match_classes", "shape"], "--match_classes takes one of name, number, got 'shape'"),
    ],
)
def test_mistakes_are_one_line(classifier_folder, image_folder, change, message, fails):
    before = sorted(path.name for path in classifier_folder.iterdir())
    assert re.search(message, fails(main, command(classifier_folder, image_folder, *change)))
    assert sorted(path.name for path in classifier_folder.iterdir()) == before


def test_encoders_without_a_head_are_refused(model_folder, image_folder, fails):
    line = fails(main, command(model_folder, image_folder))
    assert "is an encoder without a classification head (classifier.bias, classifier.weight missing)" in line
