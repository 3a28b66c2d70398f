"""kNN evaluation from a folder to results.json, by function and by command."""

import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch

from mocov3_hf import loading
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.evaluation.common import table
from mocov3_hf.evaluation.feature_cache import data_fingerprint
from mocov3_hf.evaluation.features import Features
from mocov3_hf.evaluation.knn import evaluate_knn, knn_metrics, main
from mocov3_hf.loading import load_encoder
from mocov3_hf.metrics import knn_accuracy
from mocov3_hf.results import read_results
from tests.factories import pretraining_model
from tests.fork_server import Forked


SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "knn.py"


def command(model_folder, image_folder, *more):
    return ["--model", str(model_folder), "--dataset_name", str(image_folder), "--k", "1", "5", *map(str, more)]


def test_command_evaluates_prints_and_records(model_folder, image_folder, tmp_path, capsys):
    metrics = main(command(model_folder, image_folder, "--output_dir", tmp_path, "--batch_size", 8))
    assert set(metrics) == {"knn1_top1", "knn5_top1", "feature_std_ratio", "effective_rank"}
    assert metrics["knn5_top1"] > 0.9, "three colors are easy, even for an untrained network"
    printed = capsys.readouterr().out
    assert f"{100 * metrics['knn5_top1']:.2f} %" in printed
    assert str(tmp_path / "results.json") in printed
    (result,) = read_results(tmp_path)
    assert result["task"] == "knn"
    assert result["metrics"] == metrics
    assert (result["settings"]["k"], result["settings"]["temperature"]) == ([1, 5], 0.07)
    assert result["dataset"]["fingerprint"] == data_fingerprint(open_labeled(str(image_folder), split="test"))
    assert (result["dataset"]["train_size"], result["dataset"]["size"]) == (45, 21)
    assert '"shortest_edge": 37' in result["settings"]["transform"]


def test_command_and_function_agree(model_folder, image_folder, tmp_path):
    options = ("--output_dir", tmp_path, "--cache_dir", tmp_path / "cache", "--mixed_precision", "no")
    by_command = main(command(model_folder, image_folder, *options))
    train, test = (open_labeled(str(image_folder), split=split) for split in ("train", "test"))
    by_function = evaluate_knn(load_encoder(model_folder), train, test, k=[1, 5], progress=False)
    assert by_function == by_command
    pretraining = evaluate_knn(pretraining_model().train(), train, test, k=[1, 5], progress=False)
    assert pretraining == by_command, "the model as training holds it"
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(("found", "precision"), [({}, "no"), ({"avx512_bf16": True}, "bf16")])
def test_the_precision_of_this_machine_is_recorded(
    model_folder, image_folder, tmp_path, monkeypatch, found, precision
):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    metrics = main(command(model_folder, image_folder, "--output_dir", tmp_path, "--mixed_precision", "auto"))
    (result,) = read_results(tmp_path)
    assert result["settings"]["mixed_precision"] == precision
    asked = main(command(model_folder, image_folder, "--output_dir", tmp_path, "--mixed_precision", precision))
    assert asked == metrics


def test_results_stand_next_to_the_model_by_default(image_folder, tmp_path):
    pretraining_model().save_pretrained(tmp_path)
    main(command(tmp_path, image_folder))
    main(command(tmp_path, image_folder, "--temperature", 0.2))
    assert [result["settings"]["temperature"] for result in read_results(tmp_path)] == [0.07, 0.2]


def test_parquet_with_other_column_names_and_splits(model_folder, image_folder, tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    for source, split in (("train", "train"), ("test", "validation")):
        dataset = datasets.load_dataset(str(image_folder), split=source)
        dataset.rename_columns({"image": "photo", "label": "kind"}).to_parquet(folder / f"{split}-0.parquet")
    names = ("--image_column", "photo", "--label_column", "kind", "--test_split", "validation")
    metrics = main(command(model_folder, folder, *names, "--output_dir", tmp_path))
    assert metrics == main(command(model_folder, image_folder, "--output_dir", tmp_path))


@pytest.mark.parametrize("change", [{"k": [0]}, {"k": [100]}, {"temperature": 0.0}])
def test_bad_values_are_found_before_the_pass(image_folder, change):
    """The model is never called: there is none."""
    train = open_labeled(str(image_folder), split="train")
    with pytest.raises(ValueError, match=r"k must be|every k|temperature must be"):
        evaluate_knn(None, train, train, **({"k": [1]} | change))


def features(rows, labels, num_classes):
    return Features(rows, torch.as_tensor(labels), None, num_classes)


def test_metrics_are_those_of_the_probes():
    generator = torch.Generator().manual_seed(0)
    train = features(torch.randn(80, 6, generator=generator), torch.arange(80) % 8, 8)
    test = features(torch.randn(40, 6, generator=generator), torch.arange(40) % 8, 8)
    metrics = knn_metrics(train, test, k=[1, 10, 40])
    assert set(metrics) == {
        *("knn1_top1", "knn10_top1", "knn10_top5", "knn40_top1", "knn40_top5"),
        *("feature_std_ratio", "effective_rank"),
    }
    expected = knn_accuracy(test.features, test.labels, train.features, train.labels, [1, 10, 40])
    assert {k: metrics[f"knn{k}_top1"] for k in expected} == expected
    assert metrics["knn40_top1"] < metrics["knn40_top5"] < 1


def test_collapsed_features_are_called_so():
    noise = 1e-4 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    collapsed = features(torch.ones(40, 6) + noise, torch.arange(40) % 4, 4)
    with pytest.warns(UserWarning, match="the features have collapsed"):
        metrics = knn_metrics(collapsed, collapsed, k=[5])
    assert metrics["feature_std_ratio"] < 1e-3


def test_k_beyond_the_training_split_is_skipped_with_a_warning(model_folder, image_folder):
    train, test = (open_labeled(str(image_folder), split=split) for split in ("train", "test"))
    with pytest.warns(UserWarning, match="skipped k = 200: the training split has 45 images"):
        metrics = evaluate_knn(load_encoder(model_folder), train, test, k=[20, 200], progress=False)
    assert "knn20_top1" in metrics
    assert "knn200_top1" not in metrics
    with pytest.raises(ValueError, match=r"every k \(100, 200\) exceeds the 45 images"):
        evaluate_knn(load_encoder(model_folder), train, test, k=[100, 200], progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--test_split", "val"], "split 'val' does not exist .* it has: train, test. .* as --test_split$"),
        (["--label_column", "kind"], "label column 'kind' does not exist; columns: image, label"),
        (["--image_column", "photo"], "image column 'photo' does not exist; columns: image, label"),
        (["--dataset_name", "/nowhere"], "'/nowhere' does not exist"),
        (["--model", "/nowhere"], "model folder '/nowhere' does not exist"),
        (["--temperature", "0"], "--temperature must be above 0, got 0"),
        (["--k", "0"], "--k must be at least 1, got 0"),
        (["--temprature", "1"], "there is no option '--temprature'; did you mean '--temperature'"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers must be at least 0, got -1"),
        (["--mixed_precision", "fp8"], "--mixed_precision takes one of auto, no, bf16, fp16, got 'fp8'"),
        (["--k"], "--k needs a value: one integer"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--image_size", "0"], "--image_size must be at least 1, got 0"),
        (["--cache_dir", __file__], "--cache_dir '.*' is a file: pass a folder"),
    ],
)
def test_mistakes_are_one_line(model_folder, image_folder, tmp_path, change, message, fails):
    line = fails(main, command(model_folder, image_folder, "--output_dir", tmp_path, *change))
    assert re.search(message, line)
    assert not (tmp_path / "results.json").exists()


def test_images_without_labels(model_folder, image_folder, tmp_path, fails):
    flat = tmp_path / "flat"
    for split in ("train", "test"):
        (flat / split).mkdir(parents=True)
        for number, path in enumerate(sorted(image_folder.glob(f"{split}/*/*.png"))):
            (flat / split / f"{number}.png").write_bytes(path.read_bytes())
    line = fails(main, command(model_folder, flat, "--output_dir", tmp_path))
    assert "images without labels: expected class folders (train/<class>/<image>)" in line


def test_a_model_on_the_hub_needs_an_output_dir(image_folder, fails):
    line = fails(main, command("someone/model", image_folder))
    assert line == (
        "error: model folder 'someone/model' does not exist; for a model on the Hub pass --output_dir for results.json"
    )


def test_a_folder_of_weights_alone_is_not_a_model(image_folder, tmp_path, fails):
    assert f"folder '{tmp_path}' holds no model (no config.json)" in fails(main, command(tmp_path, image_folder))


def test_the_earlier_name_of_the_workers_is_deprecated(model_folder, image_folder, tmp_path, capsys):
    main(command(model_folder, image_folder, "--output_dir", tmp_path, "--num_workers", 1))
    assert "warning: --num_workers is deprecated: use --dataloader_num_workers" in capsys.readouterr().err
    assert "dataloader_num_workers" not in read_results(tmp_path)[0]["settings"], "without influence on the metrics"


def test_a_published_name_is_found_in_the_zoo(model_folder, image_folder, tmp_path, monkeypatch):
    """The name as typed is recorded; next to the model, or in the output folder."""
    name = "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k"
    folder = tmp_path / "fetched"
    shutil.copytree(model_folder, folder)
    monkeypatch.setattr(loading, "fetch", {name: str(folder)}.__getitem__)
    main(command(name, image_folder))
    main(command(name, image_folder, "--output_dir", tmp_path / "results"))
    for found in (folder, tmp_path / "results"):
        assert [result["model"]["name"] for result in read_results(found)] == [name]


def test_table_shows_accuracies_in_percent():
    lines = table({"knn20_top1": 0.98765, "effective_rank": 12.3456, "per_class": {"a": 1.0}}, "title").splitlines()
    assert lines[0] == "title"
    assert lines[1].split() == ["knn20_top1", "98.77", "%"]
    assert lines[2].split() == ["effective_rank", "12.35"]
    assert len(lines) == 3


@pytest.mark.slow
def test_script_ends_with_one_line(image_folder, tmp_path):
    process = Forked([str(SCRIPT), *map(str, command(tmp_path, image_folder))])
    output, _ = process.communicate()
    assert process.returncode == 2
    assert output.strip().splitlines()[-1].startswith("error: folder ")
    assert "Traceback" not in output
