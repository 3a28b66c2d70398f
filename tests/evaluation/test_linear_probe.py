"""The linear protocol on Trainer: against closed forms, against the cached form, interrupted, on several processes."""

import json
import math
import multiprocessing
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetModel, pipeline

from mocov3_hf import MoCoV3Config, MoCoV3ForImageClassification, MoCoV3ForPreTraining, loading
from mocov3_hf.data.labeled import EvaluationTransform, LabeledImages, TrainingTransform, open_labeled
from mocov3_hf.data.sources import MapSource
from mocov3_hf.evaluation import evaluate
from mocov3_hf.evaluation.classifier import head_parameters, load_with_new_head
from mocov3_hf.evaluation.features import extract_features
from mocov3_hf.evaluation.linear_probe import LinearProbeOptions, build_linear_trainer, main
from mocov3_hf.evaluation.supervised import Splits, newest_checkpoint, share_of_batch
from mocov3_hf.evaluation.sweep import sweep_linear_classifiers
from mocov3_hf.evaluation.trainer_checkpoints import reload_strictly
from mocov3_hf.evaluation.training_images import TrainingImages, training_transform
from mocov3_hf.loading import load_encoder, pooled_features
from mocov3_hf.processing import ProcessorTransform, build_image_processor
from mocov3_hf.results import read_results
from tests.fork_server import ranks


SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "linear_probe.py"
NAMES = ["ant", "bee", "cow"]


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    """A backbone with BatchNorm."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    body = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config = MoCoV3Config(backbone_config=body.to_dict(), head_hidden_size=16, projection_dim=8)
    MoCoV3ForPreTraining(config).save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    return folder


def command(model, images, output_dir, *more):
    paths = ["--model", str(model), "--dataset_name", str(images), "--output_dir", str(output_dir)]
    length = ["--num_train_epochs", "2", "--train_batch_size", "16", "--mixed_precision", "no"]
    return [*paths, *length, *map(str, more)]


def options_of(**changes):
    """45 images in batches of 16 are three steps an epoch, the last of 13 images."""
    given = {
        "num_train_epochs": 2,
        "train_batch_size": 16,
        "save_strategy": "no",
        "eval_strategy": "no",
        "mixed_precision": "no",
    }
    return LinearProbeOptions(model="model", dataset_name="data", **(given | changes))


def trainer_of(model, image_folder, output_dir, transform=None, **changes):
    train, test = (open_labeled(str(image_folder), split=split) for split in ("train", "test"))
    classifier = load_with_new_head(model, NAMES)
    transform = transform or ProcessorTransform(build_image_processor(32))
    splits = Splits(train, test, test, train)
    return build_linear_trainer(classifier, splits, transform, options_of(**changes), str(output_dir))


def backbone_of(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_backbone_is_frozen_bit_for_bit(resnet_folder, image_folder, tmp_path, mixed_precision):
    main(command(resnet_folder, image_folder, tmp_path, "--mixed_precision", mixed_precision))
    before = {f"mocov3.{name}": tensor for name, tensor in load_encoder(resnet_folder).state_dict().items()}
    saved = load_file(tmp_path / "model.safetensors")
    assert any("running_mean" in name for name in before)
    assert same(backbone_of(saved), before)


def test_without_eval_mode_it_would_not_be(resnet_folder, image_folder, tmp_path):
    trainer = trainer_of(resnet_folder, image_folder, tmp_path, num_train_epochs=1)
    before = {name: tensor.clone() for name, tensor in backbone_of(trainer.model.state_dict()).items()}
    trainer.frozen = None
    trainer.train()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, trainer.model.state_dict()[name])}
    assert changed
    assert all("running" in name or "num_batches" in name for name in changed), "weights have no gradient in any case"


def test_steps_are_those_of_the_closed_form(model_folder, image_folder, tmp_path, monkeypatch):
    """SGD written out on the features of the batches that were seen: start, rate, momentum, loss, and no clipping."""
    trainer = trainer_of(model_folder, image_folder, tmp_path, base_learning_rate=8.0, augment=False)
    head = head_parameters(trainer.model)
    start = {name.removeprefix("classifier."): value.detach().clone().double() for name, value in head.items()}
    assert start["weight"].std().item() == pytest.approx(0.01, rel=0.2)
    assert not start["bias"].any()
    assert [group["params"] for group in trainer.optimizer.param_groups] == [list(head.values())]
    batches, compute_loss = [], trainer.compute_loss

    def recorded(model, inputs, **options):
        batches.append((inputs["pixel_values"].clone(), inputs["labels"].clone()))
        return compute_loss(model, inputs, **options)

    monkeypatch.setattr(trainer, "compute_loss", recorded)
    trainer.train()
    assert [len(labels) for _, labels in batches] == [16, 16, 13] * 2
    weight, bias = start["weight"], start["bias"]
    velocity_w, velocity_b = torch.zeros_like(weight), torch.zeros_like(bias)
    encoder = load_encoder(model_folder)
    for step, (pixel_values, labels) in enumerate(batches):
        rate = 8.0 * 16 / 256 * 0.5 * (1 + math.cos(math.pi * step / 6))
        with torch.no_grad():
            x = pooled_features(encoder, pixel_values).double()
        error = (x @ weight.T + bias).softmax(dim=1) - torch.nn.functional.one_hot(labels, 3)
        velocity_w = 0.9 * velocity_w + error.T @ x / len(x)
        velocity_b = 0.9 * velocity_b + error.mean(dim=0)
        weight, bias = weight - rate * velocity_w, bias - rate * velocity_b
    torch.testing.assert_close(head["classifier.weight"].double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head["classifier.bias"].double(), bias, rtol=1e-4, atol=1e-5)
    assert trainer.lr_scheduler.get_last_lr() == [0.0]


def some_digits(begin, end):
    """Some of scikit-learn's digits as a labeled split."""
    digits = load_digits()
    pixels = np.kron(digits.images[begin:end] * 255 / 16, np.ones((4, 4))).astype(np.uint8)
    table = datasets.Dataset.from_dict({"image": list(map(Image.fromarray, pixels))})
    names = [str(digit) for digit in range(10)]
    return LabeledImages(MapSource(table), digits.target[begin:end].astype(np.int64), names)


@pytest.mark.slow
def test_it_learns_digits_as_well_as_the_cached_form(model_folder, tmp_path):
    train, test = some_digits(0, 800), some_digits(1000, 1700)
    transform = EvaluationTransform(32, 32)
    classifier = load_with_new_head(model_folder, train.class_names)
    options = options_of(learning_rate=0.3, train_batch_size=100, num_train_epochs=12, augment=False)
    splits = Splits(train, test, test, train)
    trainer = build_linear_trainer(classifier, splits, transform, options, str(tmp_path))
    trainer.train()
    found = trainer.evaluate()["eval_top1"]
    encoder = load_encoder(model_folder)
    features, held_out = (extract_features(encoder, images, transform, progress=False) for images in (train, test))
    cached = []
    for seed in range(5):
        sweep = sweep_linear_classifiers(
            features,
            torch.from_numpy(train.labels),
            learning_rates=[0.3],
            weight_decays=[0.0],
            num_epochs=12,
            batch_size=100,
            seed=seed,
        )
        cached.append(sweep.accuracies(held_out, torch.from_numpy(test.labels)).item())
    assert np.mean(cached) > 0.3, "three times chance, on features of an untrained network"
    assert found == pytest.approx(np.mean(cached), abs=max(4 * np.std(cached), 0.02))


@pytest.mark.slow
def test_command_saves_a_classifier_that_evaluates_the_same(model_folder, image_folder, tmp_path, capsys, fails):
    metrics = main(command(model_folder, image_folder, tmp_path, "--seed", 3))
    assert metrics["linear_top1"] > 0.8
    assert f"{100 * metrics['linear_top1']:.2f} %" in capsys.readouterr().out
    tested = evaluate.main(["--model", str(tmp_path), "--dataset_name", str(image_folder)])
    assert tested["top1"] == metrics["linear_top1"]
    linear, test = read_results(tmp_path)
    assert (linear["task"], linear["seed"], linear["settings"]["learning_rate"]) == ("linear", 3, 3.0 * 16 / 256)
    assert linear["model"]["classifier"] == test["model"]["weights"]
    assert test["settings"]["classes"] == "by name"
    with Image.open(next(image_folder.glob("test/cow/*.png"))) as image:
        answer = pipeline("image-classification", model=str(tmp_path))(image)[0]
    assert answer["label"] == "cow"
    line = fails(main, command(model_folder, image_folder, tmp_path))
    assert "holds a model: pass another, or --overwrite_output_dir" in line


@pytest.mark.slow
def test_interrupted_and_resumed_it_is_bit_identical(model_folder, image_folder, tmp_path):
    main(command(model_folder, image_folder, tmp_path / "whole", "--save_total_limit", 2))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    (tmp_path / "resumed" / "checkpoint-6").mkdir()  # a crash while saving
    assert newest_checkpoint(tmp_path / "resumed") == str(tmp_path / "resumed" / "checkpoint-3")
    main(command(model_folder, image_folder, tmp_path / "resumed", "--resume_from_checkpoint", "auto"))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert same(whole, resumed)
    first = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert not torch.equal(first["classifier.weight"], whole["classifier.weight"])


@pytest.mark.slow
def test_weights_that_do_not_match_are_refused(model_folder, image_folder, tmp_path, fails):
    main(command(model_folder, image_folder, tmp_path))
    weights = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    weights["classifier.old_weight"] = weights.pop("classifier.weight")
    save_file(weights, tmp_path / "checkpoint-6" / "model.safetensors", metadata={"format": "pt"})
    classifier = load_with_new_head(model_folder, NAMES)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 missing \(classifier.weight\); 1 unexpected \(classifier.old_weight\)"):
        reload_strictly(classifier, tmp_path / "checkpoint-6")
    assert same(before, classifier.state_dict())
    again = command(model_folder, image_folder, tmp_path, "--resume_from_checkpoint", "auto")
    assert "its content is not what was written" in fails(main, again)
    settings = json.loads((tmp_path / "checkpoint-6" / "settings.json").read_text())
    del settings["sha256"]  # as checkpoints of earlier versions
    (tmp_path / "checkpoint-6" / "settings.json").write_text(json.dumps(settings))
    assert "1 missing" in fails(main, again)
    with pytest.raises(ValueError, match="holds another model than the one in training"):
        reload_strictly(load_with_new_head(model_folder, ["a", "b"]), tmp_path)


@pytest.mark.slow
def test_one_process_and_two_train_the_same_classifier(model_folder, image_folder, tmp_path):
    """The same images and crops in every step. 32 images are two whole steps, which nothing has to fill up."""
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    for path in sorted(images.glob("train/*/*.png"))[:39:3]:
        path.unlink()
    assert len(list(images.glob("train/*/*.png"))) == 32
    main(command(model_folder, images, tmp_path / "1"))
    ranks(2, SCRIPT, *command(model_folder, images, tmp_path / "2"))
    (one,), (two,) = read_results(tmp_path / "1"), read_results(tmp_path / "2")
    assert two["hardware"]["num_processes"] == 2
    assert one["settings"] == two["settings"]
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-4)  # weights differ in the last bit
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    assert same(backbone_of(first), backbone_of(second))
    torch.testing.assert_close(first["classifier.weight"], second["classifier.weight"], rtol=1e-3, atol=1e-5)


def test_what_is_drawn_depends_on_seed_epoch_and_row_only(image_folder):
    images = open_labeled(str(image_folder), split="train")
    dataset = TrainingImages(images, TrainingTransform(32), seed=1)
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    first = dataset[5]["pixel_values"]
    assert torch.equal(torch.rand(4), expected), "the generator of the process is left alone"
    assert torch.equal(dataset[5]["pixel_values"], first)
    assert not torch.equal(TrainingImages(images, TrainingTransform(32), seed=2)[5]["pixel_values"], first)
    dataset.epoch = 1
    assert not torch.equal(dataset[5]["pixel_values"], first)


def test_training_sees_images_in_the_preprocessing_of_the_model():
    found = training_transform(ProcessorTransform(build_image_processor(48, "bicubic")), [0.5, 1.0])
    assert found == TrainingTransform(48, (0.5, 1.0), interpolation="bicubic")
    assert training_transform(ProcessorTransform(build_image_processor(32))) == TrainingTransform(32)


@pytest.mark.parametrize(
    ("given", "expected"),
    [((1024, None, 8, 5000), 128), ((1024, 16, 8, 5000), 16), ((45, None, 1, 45), 45)],
)
def test_share_of_the_batch(given, expected):
    assert share_of_batch(*given) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--recipe", "vit-small_linear"], "there is no recipe 'vit-small_linear'.*[;?] mocov3 recipes lists all"),
        (["--train_batch_size", "64"], r"between 1 image and the 45 of the training split, got 64"),
        (["--train_batch_size", "0"], "--train_batch_size must be at least 1, got 0"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be at least 1, got 0"),
        (["--momentum", "1"], "--momentum must be at least 0 and below 1, got 1"),
        (["--crop_scale", "0.5"], r"--crop_scale takes two numbers, .* got \[0\.5\]"),
        (["--crop_scale", "0.5", "0.1"], "the smallest and the largest area"),
        (["--crop_scale", "0.5", "2"], "--crop_scale must be above 0 and at most 1, got 2"),
        (["--batch_sise", "8"], "there is no option '--batch_sise'; did you mean '--batch_size'"),
        (["--resume_from_checkpoint", "/nowhere"], "checkpoint '/nowhere' does not exist"),
        (["--test_split", "val"], "it has: train, test"),
        (["--model", "/nowhere"], "model folder '/nowhere' does not exist"),
    ],
)
def test_mistakes_are_one_line(model_folder, image_folder, tmp_path, change, message, fails):
    strategy = ["--save_strategy", "no", "--eval_strategy", "no"]
    line = fails(main, command(model_folder, image_folder, tmp_path, *strategy, *change))
    assert re.search(message, line)
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("kind", ["base", "classifier", "vit", "native"])
def test_any_encoder_gets_a_head(model_folder, tmp_path, kind):
    pretraining = MoCoV3ForPreTraining.from_pretrained(model_folder)
    if kind == "native":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        encoder = ResNetModel(ResNetConfig(**sizes))
    elif kind == "classifier":
        encoder = MoCoV3ForImageClassification.from_pretrained(model_folder, num_labels=7)
    else:
        encoder = pretraining.mocov3 if kind == "base" else pretraining.mocov3.backbone
    encoder.save_pretrained(tmp_path)
    classifier = load_with_new_head(tmp_path, NAMES).eval()
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weight, bias = sorted(head_parameters(classifier).values(), key=lambda value: -value.ndim)
    with torch.no_grad():
        expected = pooled_features(load_encoder(tmp_path), pixel_values) @ weight.T + bias
        torch.testing.assert_close(classifier(pixel_values).logits, expected)
    assert weight.shape[0] == 3
    assert classifier.config.id2label == dict(enumerate(NAMES))


def test_divergence_is_a_failure_at_run_time(model_folder, image_folder, tmp_path, fails):
    line = fails(main, command(model_folder, image_folder, tmp_path, "--learning_rate", "3e38"), code=1)
    assert re.search("training has diverged, classifier.* is not finite: pass a smaller learning rate", line)
    assert not (tmp_path / "config.json").exists()


def test_the_model_is_not_overwritten(model_folder, image_folder, tmp_path, monkeypatch, fails):
    line = fails(main, command(model_folder, image_folder, model_folder, "--overwrite_output_dir"))
    assert "is the folder of the model, which would be lost" in line
    line = fails(main, ["--model", model_folder, "--dataset_name", image_folder])
    assert "--output_dir is missing: the classifier needs a folder of its own" in line
    monkeypatch.setattr(loading, "load_zoo", lambda: {"published": None})
    monkeypatch.setattr(loading, "fetch", lambda name: str(model_folder))
    line = fails(main, command("published", image_folder, model_folder, "--overwrite_output_dir"))
    assert "is the folder of the model, which would be lost" in line


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_decoded_are_named(model_folder, image_folder, tmp_path, workers, fails):
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "train" / "ant" / "003.png").write_bytes(b"no image")
    line = fails(main, command(model_folder, images, tmp_path / "output", "--dataloader_num_workers", workers))
    advice = "repair or remove it, or pass --on_bad_image skip"
    assert re.fullmatch(f"error: image in row 3 of the training split .*: {advice}", line)
    # They ignore SIGTERM: the program would wait for them at its end, and they for it.
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_an_image_that_only_the_second_process_decodes_is_named(model_folder, image_folder, tmp_path):
    """Each of two processes has one of two images."""
    images = tmp_path / "images"
    for split in ("train", "test"):
        for name in NAMES[:2]:
            (images / split / name).mkdir(parents=True)
            shutil.copy(sorted((image_folder / split / name).iterdir())[0], images / split / name)
    next((images / "train" / "bee").iterdir()).write_bytes(b"no image")
    paths = ["--model", str(model_folder), "--dataset_name", str(images), "--output_dir", str(tmp_path / "output")]
    options = ["--train_batch_size", "2", "--num_train_epochs", "1"]
    codes, output = ranks(2, SCRIPT, *paths, *options, check=False)
    assert all(codes)
    assert "error: image in row 1 of the training split" in output
