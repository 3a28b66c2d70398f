"""kNN accuracy during training: correct, the same on any number of processes, and without side effects."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from mocov3_hf import MoCoV3Model
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.metrics.knn import knn_accuracy
from mocov3_hf.pretraining.pretrain import main
from tests.fork_server import ranks
from tests.launch import ROOT


KNN = ["--knn_steps", "2", "--knn_k", "3"]


def read(folder):
    return [json.loads(line) for line in (folder / "knn.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def arguments(tiny, labeled):
    return [*tiny, "--dataset_name", str(labeled), *KNN]


def test_the_accuracy_is_that_of_the_saved_model(tmp_path, arguments, labeled):
    main([*arguments, "--output_dir", str(tmp_path)])
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert [line["epoch"] for line in lines] == [1.0, 2.0]
    model, processor = MoCoV3Model.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)

    def features(split):
        images = open_labeled(str(labeled), split=split)
        pixel_values = processor([images.decode(row) for row in range(len(images))], return_tensors="pt").pixel_values
        with torch.no_grad():
            return model(pixel_values).pooler_output, torch.from_numpy(images.labels)

    expected = knn_accuracy(*features("test"), *features("train"), 3)[3]
    assert lines[-1]["knn_top1"] == pytest.approx(expected)
    labels = features("test")[1]
    assert lines[-1]["knn_test_images"] == len(labels)
    assert lines[-1]["knn_chance"] == max((labels == label).sum() for label in labels) / len(labels)
    assert expected > 0.9, "dark and bright are easy to separate"


def test_evaluation_has_no_side_effects(tmp_path, arguments, fresh):
    main([*arguments, "--output_dir", str(tmp_path / "watched")])
    fresh()
    unwatched = [argument for argument in arguments if argument not in ("--knn_steps", "2", "--knn_k", "3")]
    main([*unwatched, "--output_dir", str(tmp_path / "unwatched")])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("watched", "unwatched"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (tmp_path / "unwatched" / "knn.jsonl").exists()


@pytest.mark.slow
def test_two_processes_and_resuming_give_the_same_curve(tmp_path, arguments, fresh):
    main([*arguments, "--output_dir", str(tmp_path / "one")])
    ranks(2, ROOT / "scripts" / "pretrain.py", *arguments, "--output_dir", str(tmp_path / "two"))
    assert read(tmp_path / "two") == read(tmp_path / "one")
    fresh()
    with (tmp_path / "one" / "knn.jsonl").open("a") as file:
        file.write('{"step": 6, "epoch": 3.0, "knn_top1": 0.1}\n{"step": 8, "ep')
    more = [*arguments, "--resume_from_checkpoint", "auto", "--allow_recipe_change", "--max_steps", "6"]
    main([*more, "--output_dir", str(tmp_path / "one")])
    assert [line["step"] for line in read(tmp_path / "one")] == [2, 4, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--knn_test_split", "validation"], ". Pass one of them as --knn_test_split"),
        (["--knn_k", "17"], "--knn_k 17 is more than the 16 images"),
        (["--knn_steps", "0"], "knn_steps must be at least 1"),
    ],
)
def test_mistakes(tmp_path, arguments, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *options, "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.rstrip().splitlines()[-1]


@pytest.fixture
def damaged(labeled, tmp_path):
    """The labeled pictures with one that is cut short in each split."""
    folder = tmp_path / "damaged"
    shutil.copytree(labeled, folder)
    for path in (folder / "train" / "bright" / "3.png", folder / "test" / "dark" / "0.png"):
        path.write_bytes(path.read_bytes()[:200])
    return folder


def test_bad_images_are_left_out(tmp_path, arguments, labeled, damaged, capsys):
    """The accuracy is that of splits without them."""
    without = tmp_path / "without"
    shutil.copytree(damaged, without)
    for path in (without / "train" / "bright" / "3.png", without / "test" / "dark" / "0.png"):
        path.unlink()
    arguments = [*arguments, "--max_bad_fraction", "0.1"]
    main([*arguments, "--knn_dataset_name", str(damaged), "--output_dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert "warning: 1 of the 16 images of the kNN training split cannot be decoded" in error
    assert re.search(r"for example the image in row 3, which cannot be decoded: .*bright/3\.png\)", error)
    assert error.count("are left out") == 2
    main([*arguments, "--knn_dataset_name", str(without), "--output_dir", str(tmp_path / "run without")])
    assert read(tmp_path / "run") == read(tmp_path / "run without")


def test_a_bad_image_ends_a_run_that_stops_at_them(tmp_path, arguments, damaged, capsys):
    more = ["--knn_dataset_name", str(damaged), "--on_bad_image", "stop", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *more])
    assert stop.value.code == 1
    line = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert line.startswith("error: 1 of the 7 images of the kNN test split cannot be decoded, for example")
    assert line.endswith("pass --on_bad_image skip")
