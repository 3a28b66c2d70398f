"""One damaged image among a hundred: named by its path and skipped by every command that may skip it."""

import json
import shutil

import pytest
from safetensors import safe_open

from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.evaluation import evaluate, finetune, knn, linear_probe
from mocov3_hf.evaluation.usable_images import without_bad_images
from mocov3_hf.inference import files
from mocov3_hf.report.images import open_samples
from mocov3_hf.results import read_results
from tests.factories import save_classifier


SKIP = ["--on_bad_image", "skip"]


@pytest.fixture(scope="module")
def damaged(image_folder, tmp_path_factory):
    """A copy of the image folder whose second training and first test image are damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "images"
    shutil.copytree(image_folder, folder)
    train, test = (sorted((folder / split).rglob("*.png")) for split in ("train", "test"))
    train[1].write_bytes(train[1].read_bytes()[:-60])
    test[0].write_bytes(b"no image")
    return folder, train[1], test[0]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("classifier"), names=["ant", "bee", "cow"])


def command(name: str, model, classifier, folder, output_dir) -> tuple:
    """(main function, arguments) of an evaluation that takes seconds."""
    training = ["--train_batch_size", "8", "--max_steps", "2", "--output_dir", output_dir]
    options = {
        "knn": (knn.main, model, ["--k", "3", "--output_dir", output_dir]),
        "linear_probe": (
            linear_probe.main,
            model,
            [*training[:2], "--num_train_epochs", "1", "--cached", "true", *training[-2:]],
        ),
        "finetune": (finetune.main, model, [*training, "--min_learning_rate", "0"]),
        "evaluate": (evaluate.main, classifier, ["--output_dir", output_dir]),
    }
    main, path, more = options[name]
    return main, [str(word) for word in (path, "--dataset_name", folder, *more)]


@pytest.mark.parametrize("name", ["knn", "linear_probe", "evaluate"])
def test_evaluations_skip_it_on_request(name, model_folder, classifier, damaged, tmp_path, capsys):
    folder, train, test = damaged
    main, arguments = command(name, model_folder, classifier, folder, tmp_path)
    main([*arguments, *SKIP])
    error = capsys.readouterr().err
    assert "skipped: image in row 0 of split 'test' cannot be decoded: it is not JPEG" in error
    assert f"({test})" in error
    assert "skipped 1 of the 21 images of split 'test'" in error
    (result,) = read_results(tmp_path)
    assert result["dataset"]["size"] == 20
    assert result["settings"]["on_bad_image"] == "skip"
    if name != "evaluate":
        assert f"({train})" in error
        assert result["dataset"]["train_size"] == 44


@pytest.mark.parametrize("name", ["knn", "evaluate"])
def test_evaluations_stop_at_it_by_default(name, model_folder, classifier, damaged, tmp_path, fails):
    folder, train, test = damaged
    main, arguments = command(name, model_folder, classifier, folder, tmp_path)
    line = fails(main, arguments)
    assert f"({test if name == 'evaluate' else train})" in line
    assert "--on_bad_image skip" in line


@pytest.mark.slow
def test_training_skips_it_on_request_and_stops_otherwise(model_folder, classifier, damaged, tmp_path, fails):
    main, arguments = command("finetune", model_folder, classifier, damaged[0], tmp_path / "skipped")
    main([*arguments, *SKIP])
    assert read_results(tmp_path / "skipped")[0]["dataset"]["train_size"] == 44
    main, arguments = command("finetune", model_folder, classifier, damaged[0], tmp_path / "stopped")
    assert "--on_bad_image skip" in fails(main, arguments)


def test_workers_find_the_same(damaged, image_folder):
    images = open_labeled(str(damaged[0]), split="train")
    kept = without_bad_images(images, "train", num_workers=2)
    assert len(kept) == 44
    assert kept.read(1) == images.read(2)
    assert kept.labels.tolist() == [label for row, label in enumerate(images.labels.tolist()) if row != 1]
    whole = open_labeled(str(image_folder), split="train")
    assert without_bad_images(whole, "train") is whole


def test_a_split_of_bad_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 2 images of split 'train' can be decoded"):
        without_bad_images(open_labeled(str(tmp_path), split="train"), "train")


def test_inference_skips_it_on_request(classifier, damaged, tmp_path, capsys, caplog, fails):
    folder, _, test = damaged
    arguments = [folder / "test", "--model", classifier, "--device", "cpu", "--output", tmp_path / "out.jsonl"]
    line = fails(files.classify, arguments)
    assert f"{test} cannot be decoded" in line
    assert line.count(str(test)) == 1
    files.classify([str(word) for word in (*arguments, *SKIP)])
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["image"] for line in found if line["labels"] is None] == [str(test)]
    assert len(found) == 21
    output = tmp_path / "out.safetensors"
    arguments = ["--model", classifier, "--dataset_name", folder, "--device", "cpu", "--output", output, *SKIP]
    files.extract([str(word) for word in arguments])
    with safe_open(output, "pt") as file:
        assert file.get_slice("features").get_shape()[0] == 20
        assert json.loads(file.metadata()["images"]) == [f"test[{row}]" for row in range(1, 21)]


def test_a_report_takes_another_image(damaged, capsys):
    folder = damaged[0]
    samples = open_samples(str(folder), num_images=21)
    with pytest.raises(ValueError, match=r"image in row 0 of .* cannot be decoded: .*--on_bad_image skip"):
        samples.decode(samples.rows.tolist().index(0))
    samples = open_samples(str(folder), num_images=21, bad_images="skip")
    assert "skipped: image in row 0 cannot be decoded: it is not JPEG" in capsys.readouterr().err
    assert sorted(samples.rows) == list(range(1, 21))
    assert [samples.decode(index).shape[0] for index in range(20)] == [3] * 20
