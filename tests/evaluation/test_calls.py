"""`mocov3_hf.knn()` and the other calls: the commands, with data and models in memory, and exceptions."""

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, TrainerCallback

import mocov3_hf
from mocov3_hf.evaluation import knn as knn_command
from mocov3_hf.results import read_results
from mocov3_hf.run_folder import read_run_folder
from tests.evaluation.finetuning import NAMES


SHORT = {"num_train_epochs": 2, "train_batch_size": 16, "base_learning_rate": 0.016, "logging_steps": 1}


@pytest.fixture(scope="module")
def images(image_folder):
    """The same as pairs in memory, in the order of the folder."""
    return {
        split: [(Image.open(file), file.parent.name) for file in sorted((image_folder / split).glob("*/*.png"))]
        for split in ("train", "test")
    }


def test_knn_of_model_and_images_in_memory_is_that_of_the_command(
    model_folder, image_folder, images, tmp_path, capsys
):
    arguments = ["--model", str(model_folder), "--dataset_name", str(image_folder), "--k", "1", "5"]
    expected = knn_command.main([*arguments, "--output_dir", str(tmp_path)])
    capsys.readouterr()
    model = AutoModel.from_pretrained(model_folder)
    processor = AutoImageProcessor.from_pretrained(model_folder)
    assert mocov3_hf.knn(model, images, processor=processor, k=[1, 5]) == expected
    out = capsys.readouterr().out
    assert "kNN: model in memory on data in memory, split test" in out
    assert "recorded" not in out
    assert mocov3_hf.knn(mocov3_hf.Run(model_folder), images, k=[1, 5], output_dir=tmp_path) == expected
    first, second = read_results(tmp_path)
    assert (second["dataset"]["name"], second["dataset"]["size"]) == ("data in memory", first["dataset"]["size"])


def test_a_model_in_memory_that_was_trained_further(model_folder, images):
    model = AutoModel.from_pretrained(model_folder)
    before = mocov3_hf.knn(model, images, k=[5])
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.warns(UserWarning, match="have collapsed"):
        after = mocov3_hf.knn(model, images, k=[5])
    assert after["knn5_top1"] < before["knn5_top1"]


class Epochs(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_train_end(self, args, state, control, **kwargs):
        self.losses.append("end")


@pytest.mark.slow
def test_linear_probe_evaluate_and_report(model_folder, images, tmp_path):
    recorder = Epochs()
    run = mocov3_hf.linear_probe(
        mocov3_hf.Run(model_folder), images, {"command": "linear-probe", **SHORT}, tmp_path, [recorder], augment=False
    )
    assert [*run.metrics["loss"].dropna(), "end"] == recorder.losses
    assert list(run.model.config.id2label.values()) == NAMES
    # Of data in memory with one split, that one is tested.
    tested = mocov3_hf.evaluate(run, images["test"])
    assert tested["top1"] == run.results["linear_top1"]
    page = mocov3_hf.report(run, images["test"], num_images=9, output=tmp_path / "page.html")
    assert page == tmp_path / "page.html"
    assert "data in memory" in page.read_text()
    assert run.report == tmp_path / "report.html"
    assert run.report.is_file()


def test_few_shot_on_cached_features(model_folder, images, tmp_path):
    options = {"cached": True, "few_shot": [2], "output_dir": tmp_path, "num_train_epochs": 2}
    run = mocov3_hf.linear_probe(model_folder, images, learning_rates=[0.1], weight_decays=[0.0], **options)
    assert run.output_dir == tmp_path
    assert {name for name in run.results if "shot" in name}
    with pytest.raises(ValueError, match="callbacks are for training with augmentation"):
        mocov3_hf.linear_probe(model_folder, images, callbacks=[Epochs], **options)


def test_finetune_stopped_by_a_callback_resumes(model_folder, images, tmp_path, capsys):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == 1

    options = SHORT | {"warmup_epochs": 1}
    stopped = mocov3_hf.finetune(model_folder, images, output_dir=tmp_path, callbacks=[Stop], **options)
    run = mocov3_hf.finetune(model_folder, images, output_dir=tmp_path, resume_from_checkpoint="auto", **options)
    assert run.results["finetune_top1"] >= stopped.results["finetune_top1"]
    assert read_run_folder(tmp_path).metrics[-1]["step"] == 4


def test_data_are_forgotten_after_the_call(model_folder, images, tmp_path):
    mocov3_hf.knn(model_folder, images, k=[1], output_dir=tmp_path)
    with pytest.raises(ValueError, match="images of this recipe were in memory"):
        mocov3_hf.knn(model_folder, "data in memory")


MISTAKES = {
    "^split 'test' does not exist in 'data in memory'": lambda folder, images: mocov3_hf.knn(folder, images["train"]),
    "^no label column found": lambda folder, images: mocov3_hf.knn(folder, [image for image, _ in images["train"]]),
    "^the sequence is empty": lambda folder, images: mocov3_hf.knn(folder, []),
    r"^knn\(\): there is no option 'neighbors'": lambda folder, images: mocov3_hf.knn(folder, images, neighbors=3),
    "^model takes a folder .* got a module$": lambda folder, images: mocov3_hf.knn(np, images),
    "^processor is for a model in memory": lambda folder, images: mocov3_hf.knn(folder, images, processor=1),
    "^--output_dir is missing": lambda folder, images: mocov3_hf.linear_probe(folder, images),
    r"^linear_probe\(\): there is no option 'lr'": lambda folder, images: mocov3_hf.linear_probe(folder, images, lr=1),
    "^there is no recipe 'nothing'": lambda folder, images: mocov3_hf.finetune(folder, images, "nothing"),
    "^folder 'nowhere' does not exist": lambda folder, images: mocov3_hf.report("nowhere"),
    "without a classification head": lambda folder, images: mocov3_hf.evaluate(folder, images),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_raise(model_folder, images, message):
    with pytest.raises(ValueError, match=message) as raised:
        MISTAKES[message](model_folder, images)
    assert "\n" not in str(raised.value)
