"""Runs on deep images and on other numbers of channels than 3."""

import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Array3D, ClassLabel, Dataset, Features
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from mocov3_hf.loading import adapt_input_weight, with_input_channels
from mocov3_hf.model.modeling_mocov3_pretraining import MoCoV3ForPreTraining
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.processing import pixel_format_of
from tests.factories import pretraining_model
from tests.pretraining.test_run import read_metrics, without_times


@pytest.fixture(scope="session")
def radiographs(pictures, tmp_path_factory):
    """The pictures as 12-bit values with an offset in 16-bit PNG."""
    folder = tmp_path_factory.mktemp("radiographs")
    for file in pictures.glob("*.png"):
        levels = np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 16 + 300
        Image.fromarray(levels).save(folder / file.name)
    return folder


@pytest.fixture(scope="session")
def bands(tmp_path_factory):
    """Four bands of different ranges with gaps, of two classes, as an array column of parquet."""
    folder = tmp_path_factory.mktemp("bands")
    rng = np.random.default_rng(0)
    feature = Features({"bands": Array3D((4, 24, 24), "float32"), "label": ClassLabel(names=["low", "high"])})
    for split, number in {"train": 16, "test": 8}.items():
        labels = [index % 2 for index in range(number)]
        images = rng.random((number, 4, 6, 6)).repeat(4, 2).repeat(4, 3)
        images = (images + np.array(labels)[:, None, None, None]) * np.array([1, 10, 1e4, 1])[:, None, None]
        images[:, 0, :3] = np.nan
        table = Dataset.from_dict({"bands": list(images.astype(np.float32)), "label": labels}, features=feature)
        table.to_parquet(folder / f"{split}.parquet")
    return folder


def test_radiographs_train_as_gray_and_as_rgb(tmp_path, tiny, radiographs, fresh, capsys):
    main([*tiny, "--dataset_name", str(radiographs), "--num_channels", "1", "--output_dir", str(tmp_path / "gray")])
    assert "images: uint16 values scaled from" in capsys.readouterr().err
    processor = AutoImageProcessor.from_pretrained(tmp_path / "gray")
    low, high = pixel_format_of(processor).pixel_range
    assert 300 <= low < high <= 300 + 255 * 16
    saved = yaml.safe_load((tmp_path / "gray" / "recipe.yaml").read_text())
    assert (saved["num_channels"], saved["pixel_range"]) == (1, [low, high])
    assert saved["image_mean"] == list(processor.image_mean)
    assert AutoModel.from_pretrained(tmp_path / "gray").config.num_channels == 1
    fresh()
    main([*tiny, "--dataset_name", str(radiographs), "--output_dir", str(tmp_path / "rgb")])
    rgb = AutoImageProcessor.from_pretrained(tmp_path / "rgb")
    assert pixel_format_of(rgb).num_channels == 3
    assert pixel_format_of(rgb).pixel_range == (low, high)


@pytest.mark.slow
def test_bands_train_evaluate_and_resume(tmp_path, tiny, bands, fresh, capsys):
    knn = ["--knn_steps", "4", "--knn_k", "3"]
    options = [*tiny, "--dataset_name", str(bands), *knn, "--channel_drop_probability", "0.5"]
    main([*options, "--output_dir", str(tmp_path / "whole")])
    captured = capsys.readouterr()
    assert "images: 4 channels" in captured.err
    assert "images: 3.12% of the values have no data" in captured.err
    assert "pixels without data were filled with the mean of their channel in 32 decoded images" in captured.out
    metrics = read_metrics(tmp_path / "whole")
    assert all(np.isfinite(line["loss"]) for line in metrics)
    (accuracy,) = [
        json.loads(line)["knn_top1"] for line in (tmp_path / "whole" / "knn.jsonl").read_text().splitlines()
    ]
    assert accuracy == 1
    processor = AutoImageProcessor.from_pretrained(tmp_path / "whole")
    assert len(processor.pixel_range) == len(processor.image_mean) == 4
    # In two parts; the second takes the statistics of the first.
    fresh()
    parts = ["--output_dir", str(tmp_path / "parts"), "--save_steps", "2"]
    main([*options, *parts, "--max_steps", "2"])
    fresh()
    main([*options, *parts, "--resume_from_checkpoint", "auto", "--allow_recipe_change"])
    assert AutoImageProcessor.from_pretrained(tmp_path / "parts").to_dict() == processor.to_dict()
    expected = MoCoV3ForPreTraining.from_pretrained(tmp_path / "whole").state_dict().keys()
    assert MoCoV3ForPreTraining.from_pretrained(tmp_path / "parts").state_dict().keys() == expected


def test_plain_images_leave_the_recipe_as_it_is(tmp_path, tiny):
    main([*tiny, "--max_steps", "1", "--output_dir", str(tmp_path)])
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert (saved["num_channels"], saved["pixel_range"], saved["image_mean"]) == (None, "auto", None)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)).__name__ == "BitImageProcessor"


def test_mean_of_plain_images(tmp_path, tiny, fresh):
    options = [*tiny, "--max_steps", "1", "--image_mean", "auto", "--image_std", "0.2", "0.2", "0.2"]
    main([*options, "--output_dir", str(tmp_path)])
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__ == "BitImageProcessor"
    assert list(processor.image_std) == [0.2] * 3
    assert 0.4 < processor.image_mean[0] < 0.6


def test_rgb_weights_start_a_model_of_bands(tmp_path, tiny, bands, fresh, capsys):
    main([*tiny, "--max_steps", "1", "--output_dir", str(tmp_path / "rgb")])
    fresh()
    options = [*tiny, "--dataset_name", str(bands), "--model", str(tmp_path / "rgb")]
    with pytest.raises(SystemExit) as stop:
        main([*options, "--output_dir", str(tmp_path / "refused")])
    assert stop.value.code == 2
    assert "4 channels" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    fresh()
    main([*options, "--adapt_input_channels", "--learning_rate", "0", "--output_dir", str(tmp_path / "adapted")])
    rgb, adapted = (MoCoV3ForPreTraining.from_pretrained(tmp_path / name) for name in ("rgb", "adapted"))
    names = [name for name, value in rgb.state_dict().items() if value.shape != adapted.state_dict()[name].shape]
    assert len(names) == 2  # of the encoder and the momentum encoder
    for name in names:
        torch.testing.assert_close(
            adapted.state_dict()[name], adapt_input_weight(rgb.state_dict()[name], 4), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_input_weights_are_those_of_timm(channels):
    from timm.models import adapt_input_conv

    weight = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(adapt_input_weight(weight, channels), adapt_input_conv(channels, weight))
    model = with_input_channels(pretraining_model(), channels)
    assert model.config.num_channels == channels
    views = [torch.randn(2, channels, 32, 32) for _ in range(2)]
    assert model(*views).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_channels", "5"], "expected 5"),
        (["--pixel_range", "1", "0"], "LOW below HIGH"),
        (["--pixel_range", "0", "1", "2"], "a pair for each of 4 channels"),
        (["--image_mean", "0.5", "--image_std", "0.5"], "one value for each of 4 channels"),
        (["--pixel_range", "wide"], "pixel_range takes"),
        (["--backbone_config", '{"model_type": "mocov3_vit", "patch_size": 8, "num_channels": 3}'], "takes 3"),
    ],
)
def test_mistakes_are_one_line(tmp_path, tiny, bands, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main([*tiny, "--dataset_name", str(bands), *options, "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in error
    assert not (tmp_path / "run").exists()


def test_dry_run_shows_the_images(tmp_path, tiny, bands, capsys):
    main([*tiny, "--dataset_name", str(bands), "--dry_run"])
    output = capsys.readouterr().out
    assert "num_channels: 4" in output
    assert "images: 4 channels" in output


def test_deep_images_are_the_same_run_with_a_worker(tmp_path, tiny, radiographs, fresh):
    options = [*tiny, "--dataset_name", str(radiographs), "--num_channels", "1", "--max_steps", "2"]
    main([*options, "--output_dir", str(tmp_path / "alone")])
    fresh()
    main([*options, "--dataloader_num_workers", "1", "--output_dir", str(tmp_path / "worker")])
    alone, worker = (without_times(read_metrics(tmp_path / name)) for name in ("alone", "worker"))
    assert alone == worker
