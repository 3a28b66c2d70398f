"""Linear evaluation on cached features, from a folder to results.json."""

import re

import pytest
import torch

from mocov3_hf import MoCoV3Config, MoCoV3Model
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.evaluation import cached_linear
from mocov3_hf.evaluation.cached_linear import CachedLinearOptions, few_shot_metrics, linear_metrics
from mocov3_hf.evaluation.features import Features, labeled_features
from mocov3_hf.evaluation.linear_probe import main, parse_options
from mocov3_hf.evaluation.sweep import choose_linear_classifier
from mocov3_hf.loading import load_encoder, load_processor
from mocov3_hf.processing import ProcessorTransform
from mocov3_hf.results import read_results
from tests.factories import VIT


GRID = ("--learning_rates", "0.1", "1", "--weight_decays", "0", "--num_train_epochs", "5", "--train_batch_size", "16")


def command(model, images, *more):
    return ["--cached", "--model", str(model), "--dataset_name", str(images), *GRID, *map(str, more)]


def test_command_trains_prints_and_records(model_folder, image_folder, tmp_path, capsys):
    metrics = main(command(model_folder, image_folder, "--output_dir", tmp_path, "--few_shot", 1, 5, "--seed", 4))
    assert set(metrics) == {
        *("linear_top1", "linear_mean_per_class", "linear_validation_top1", "feature_std_ratio", "effective_rank"),
        *("1shot_top1", "1shot_top1_std", "5shot_top1", "5shot_top1_std"),
    }
    assert metrics["linear_top1"] > 0.9, "three colors are easy, even for an untrained network"
    printed = capsys.readouterr().out
    assert f"{100 * metrics['linear_top1']:.2f} %" in printed
    assert "selected: pooled, learning rate " in printed
    (result,) = read_results(tmp_path)
    assert (result["task"], result["seed"], result["metrics"]) == ("linear_cached", 4, metrics)
    assert set(result["settings"]["chosen"]["validation_accuracies"]["pooled"]) == {"lr=0.1 wd=0", "lr=1 wd=0"}


def test_metrics_are_those_of_the_parts(model_folder, image_folder, tmp_path):
    encoder = load_encoder(model_folder)
    transform = ProcessorTransform(load_processor(model_folder, encoder.config))
    train, test = (
        labeled_features(encoder, open_labeled(str(image_folder), split=split), transform, progress=False)
        for split in ("train", "test")
    )
    metrics = main(command(model_folder, image_folder, "--output_dir", tmp_path, "--few_shot_fractions", 0.2))
    chosen = choose_linear_classifier(
        train.features, train.labels, learning_rates=[0.1, 1.0], weight_decays=[0.0], num_epochs=5, batch_size=16
    )
    assert metrics["linear_top1"] == chosen.classifier.accuracy(test.features, test.labels)
    assert metrics["linear_validation_top1"] == chosen.validation_accuracy
    assert metrics["20percent_top1"] == few_shot_metrics(train, test, fractions=[0.2])["20percent_top1"]


def test_features_are_compared_on_the_held_out_part():
    """Only the patches know the label: the choice must fall on them, and the test accuracy be theirs."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for rows in (200, 100):
        labels = torch.randint(4, (rows,), generator=generator)
        layers = torch.randn(rows, 5 * 6, generator=generator)
        layers[torch.arange(rows), 4 * 6 + labels] += 6  # the mean of the patches
        sides.append(Features(layers, labels, None, 4))
    options = CachedLinearOptions(
        model="model",
        dataset_name="data",
        features=["pooled", "pooled_mean", "last4"],
        learning_rates=[0.1],
        weight_decays=[0.0],
        num_train_epochs=30,
        train_batch_size=50,
    )
    metrics, choice = linear_metrics(*sides, options, progress=False)
    assert choice["feature"] == "pooled_mean"
    assert set(choice["validation_accuracies"]) == {"pooled", "pooled_mean", "last4"}
    assert metrics["linear_top1"] > 0.9
    assert choice["validation_accuracies"]["last4"]["lr=0.1 wd=0"] < 0.6


def test_choice_of_features_from_the_command(image_folder, tmp_path):
    torch.manual_seed(0)
    config = MoCoV3Config(backbone_config=VIT | {"num_hidden_layers": 4}, head_hidden_size=16, projection_dim=8)
    MoCoV3Model(config).save_pretrained(tmp_path / "model")
    main(command(tmp_path / "model", image_folder, "--features", "last4", "pooled"))
    (result,) = read_results(tmp_path / "model")
    assert set(result["settings"]["chosen"]["validation_accuracies"]) == {"last4", "pooled"}


@pytest.mark.parametrize(
    "change",
    [["--few_shot", "16"], ["--few_shot_fractions", "2"], ["--learning_rates", "0"], ["--validation_fraction", "1"]],
)
def test_bad_values_are_found_before_the_pass(model_folder, image_folder, change, monkeypatch, fails):
    def refuse(*args, **kwargs):
        raise AssertionError("a pass over the images")

    monkeypatch.setattr(cached_linear, "labeled_features", refuse)
    fails(main, command(model_folder, image_folder, *change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--features", "attention"], "--features takes one of pooled, pooled_mean, last4, got 'attention'"),
        (["--features", "last4"], "has 2 layers, expected at least 4: pass --features pooled"),
        (["--learning_rates", "-1"], "--learning_rates must be above 0, got -1.0"),
        (["--few_shot", "16"], "class 0 has 15 images, expected at least 16: pass a smaller --few_shot"),
        (["--validation_fraction", "0"], "--validation_fraction must be above 0 and below 1, got 0.0"),
        (["--test_split", "val"], "it has: train, test"),
        (["--crop_scale", "0.5", "1"], "--crop_scale works only without --cached: leave out one of them"),
        (["--recipe", "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k"], "works only without --cached"),
    ],
)
def test_mistakes_are_one_line(model_folder, image_folder, tmp_path, change, message, fails):
    line = fails(main, command(model_folder, image_folder, "--output_dir", tmp_path, *change))
    assert re.search(message, line)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("name", ["few_shot", "cache_dir", "learning_rates"])
def test_options_of_cached_features_need_cached(model_folder, image_folder, tmp_path, name, fails):
    shared = ["--model", model_folder, "--dataset_name", image_folder, "--output_dir", tmp_path]
    line = fails(main, [*shared, f"--{name}", "1"])
    assert line == f"error: --{name} works only with --cached: add --cached, or leave it out"


def test_defaults_of_the_two_forms():
    shared = ["--model", "m", "--dataset_name", "d"]
    plain, cached = parse_options(shared), parse_options([*shared, "--cached"])
    assert isinstance(cached, CachedLinearOptions)
    assert (plain.validation_fraction, cached.validation_fraction) == (0.0, 0.1)
    assert parse_options([*shared, "--cached", "--validation_fraction", "0.2"]).validation_fraction == 0.2
    for name in ("num_train_epochs", "train_batch_size", "seed"):
        assert getattr(plain, name) == getattr(cached, name)
