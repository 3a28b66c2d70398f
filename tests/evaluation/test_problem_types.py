"""Multi-label classification, regression and imbalanced sets, from labels to a saved model, against scikit-learn."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score, f1_score, mean_absolute_error, r2_score
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, pipeline

import mocov3_hf
from mocov3_hf.data.labeled import LabeledImages
from mocov3_hf.evaluation import finetune
from mocov3_hf.evaluation.classifier import load_with_new_head
from mocov3_hf.evaluation.linear import fit_linear_regressions
from mocov3_hf.evaluation.problems import target_metrics
from mocov3_hf.evaluation.sweep import choose_linear_classifier, choose_linear_regression, sweep_linear_classifiers
from mocov3_hf.evaluation.training_images import BalancedSampler, TrainingImages
from mocov3_hf.inference import ImageClassifier
from mocov3_hf.results import read_results


SHORT = {"num_train_epochs": 3, "train_batch_size": 12, "augment": False, "mixed_precision": "no"}


class _Decoded:
    """A source of encoded images in memory."""

    def __init__(self, images):
        self.images = images

    def read(self, row):
        buffer = io.BytesIO()
        self.images[row].save(buffer, "PNG")
        return buffer.getvalue()


def logits_of(folder, images):
    """Of a plain loop with transformers alone."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**processor(image, return_tensors="pt")).logits for image in images])


def test_multi_label(model_folder, tagged, tmp_path, capsys):
    options = {
        "validation_fraction": 0.3,
        "load_best_model_at_end": True,
        "base_learning_rate": 0.02,
        "ema_decay": 0.5,
    }
    run = mocov3_hf.finetune(model_folder, tagged, output_dir=tmp_path, **SHORT, **options)
    assert "problem_type=multi_label_classification, classes=3 (blue, green, red)" in capsys.readouterr().err
    config = json.loads((tmp_path / "config.json").read_text())
    names = ["blue", "green", "red"]
    assert (config["problem_type"], list(config["id2label"].values())) == ("multi_label_classification", names)
    probabilities = logits_of(tmp_path, [image for image, _ in tagged["test"]]).sigmoid().numpy()
    labels = np.array([[name in tags for name in names] for _, tags in tagged["test"]])
    metrics = run.results
    assert metrics["finetune_map_ema"] == pytest.approx(average_precision_score(labels, probabilities))
    thresholds = config["label_thresholds"]
    assert thresholds != [0.5] * 3, "chosen on held-out images"
    for average in ("micro", "macro"):
        expected = f1_score(labels, probabilities >= thresholds, average=average)
        assert metrics[f"finetune_{average}_f1_ema"] == pytest.approx(expected)
    # The classifier is tested with its own thresholds; the loss is that of transformers.
    tested = mocov3_hf.evaluate(run, tagged["test"], mixed_precision="no")
    assert (tested["map"], tested["micro_f1"]) == (metrics["finetune_map_ema"], metrics["finetune_micro_f1_ema"])
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(tagged["test"][0][0], return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, labels=torch.tensor(labels[:1], dtype=torch.float32))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, torch.tensor(labels[:1]).float())
    assert output.loss == expected
    first, _ = read_results(tmp_path)
    assert first["dataset"]["problem_type"] == "multi_label_classification"
    assert first["settings"]["best"]["metric"] == pytest.approx(max(run.metrics["eval_map"].dropna()))
    assert [row[0] for row in first["plots"]["average_precision"]] == names
    found = ImageClassifier(tmp_path, dtype="float32")(tagged["test"][0][0])
    by_name = {label["label"]: label for label in found}
    for name, probability, threshold in zip(names, probabilities[0], thresholds, strict=True):
        assert by_name[name]["score"] == pytest.approx(probability, abs=1e-5)
        assert by_name[name]["is_predicted"] == (by_name[name]["score"] >= threshold)
    again = load_with_new_head(tmp_path, ["a", "b"])
    assert again.config.problem_type is None
    assert "label_thresholds" not in again.config.to_dict()


@pytest.mark.slow
def test_thresholds_do_not_depend_on_the_test_split(model_folder, tagged, tmp_path):
    options = SHORT | {"base_learning_rate": 1.0, "num_train_epochs": 1}
    with pytest.warns(UserWarning, match="the threshold of every class is 0.5"):
        run = mocov3_hf.linear_probe(model_folder, tagged, output_dir=tmp_path / "none", **options)
    assert not hasattr(run.model.config, "label_thresholds")
    found = []
    for name, test in (("all", tagged["test"]), ("few", tagged["test"][:12])):
        data = {"train": tagged["train"], "test": test}
        run = mocov3_hf.linear_probe(
            model_folder, data, output_dir=tmp_path / name, validation_fraction=0.3, **options
        )
        found.append(run.model.config.label_thresholds)
    assert found[0] == found[1]


def test_regression(model_folder, measured, tmp_path):
    options = SHORT | {"base_learning_rate": 1.0, "mixed_precision": "bf16"}
    run = mocov3_hf.linear_probe(model_folder, measured, output_dir=tmp_path, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["problem_type"] == "regression"
    images = [image for image, _ in measured["test"]]
    targets = np.array([values for _, values in measured["test"]])
    predictions = logits_of(tmp_path, images).double().numpy()
    assert run.results["linear_r2"] == pytest.approx(r2_score(targets, predictions), abs=1e-5)
    assert run.results["linear_mae"] == pytest.approx(mean_absolute_error(targets, predictions), rel=1e-4)
    assert run.results["linear_r2"] > 0.2, "both targets are learned, whatever their units"
    tested = mocov3_hf.evaluate(run, measured["test"])
    assert tested["r2"] == run.results["linear_r2"]
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    scores = classify(images[0], top_k=None, function_to_apply="none")  # by default, transformers 5.17 takes softmax
    assert max(label["score"] for label in scores) == pytest.approx(predictions[0, 0], rel=1e-6)
    found = ImageClassifier(tmp_path)(images[:1], top_k=2)[0]
    assert max(label["score"] for label in found) == pytest.approx(predictions[0, 0], rel=1e-6), "not rounded"
    scatter = read_results(tmp_path)[0]["plots"]["scatter"]
    np.testing.assert_allclose(np.array(scatter["true"]).T, targets, rtol=1e-4)
    np.testing.assert_allclose(np.array(scatter["predicted"]).T, predictions, rtol=1e-4)


@pytest.mark.parametrize("batch", [4, 60])
def test_a_linear_probe_of_a_regression_does_not_diverge(batch, model_folder, measured, tmp_path, capsys):
    options = SHORT | {"train_batch_size": batch, "base_learning_rate": 300.0, "eval_strategy": "no"}
    run = mocov3_hf.linear_probe(model_folder, measured, output_dir=tmp_path, **options)
    assert "lowered to" in capsys.readouterr().err
    assert run.results["linear_r2"] > (0 if batch == 4 else -1)


def test_predictions_worse_than_the_mean_are_a_warning(model_folder, measured, tmp_path):
    options = SHORT | {"max_steps": 1, "optimizer": "sgd", "max_grad_norm": 0.0, "warmup_epochs": 0.0}
    with pytest.warns(UserWarning, match="R² is -.*: the predictions are worse than the mean"):
        mocov3_hf.finetune(model_folder, measured, output_dir=tmp_path, learning_rate=2.0, **options)
    with pytest.warns(UserWarning, match="worse than the mean"):
        mocov3_hf.evaluate(tmp_path, measured["test"])


def test_a_checkpoint_of_a_regression_is_not_a_classifier(model_folder, measured, tmp_path):
    data = {split: pairs[:24] for split, pairs in measured.items()}
    options = SHORT | {"num_train_epochs": 1}
    run = mocov3_hf.finetune(model_folder, data, output_dir=tmp_path / "run", **options)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    for use in (lambda: mocov3_hf.evaluate(checkpoint, data["test"], output_dir=tmp_path), lambda: load(checkpoint)):
        with pytest.raises(ValueError, match="checkpoint within a regression, not in the units of its targets"):
            use()
    assert not hasattr(run.model.config, "standardized_targets")
    # As the start of another training it is an encoder like any other.
    again = mocov3_hf.finetune(checkpoint, data, output_dir=tmp_path / "again", **options)
    assert mocov3_hf.evaluate(again, data["test"], mixed_precision="no")["r2"] == again.results["finetune_r2"]


def load(folder):
    return ImageClassifier(folder)


def test_scatter_plots_keep_the_digits_that_differ():
    seconds = 1.7e9 + np.linspace(0, 1e4, 7)[:, None]
    targets = np.concatenate([seconds, np.linspace(-3e-7, 3e-7, 7)[:, None]], axis=1)
    scatter = target_metrics(torch.tensor(targets).float(), targets, ["date", "weight"], None)["plots"]["scatter"]
    assert scatter["names"] == ["date", "weight"]
    for kept, exact in zip(scatter["true"], targets.T, strict=True):
        np.testing.assert_allclose(kept, exact, atol=1e-4 * np.ptp(exact), rtol=0)


@pytest.mark.slow
def test_regression_resumes_exactly(model_folder, measured, tmp_path):
    data = {split: [(image, values[0]) for image, values in pairs] for split, pairs in measured.items()}
    options = SHORT | {"num_train_epochs": 2, "base_learning_rate": 0.02, "metric_for_best_model": "mae"}
    options["load_best_model_at_end"] = True

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == 3

    whole = mocov3_hf.finetune(model_folder, data, output_dir=tmp_path / "whole", **options)
    mocov3_hf.finetune(model_folder, data, output_dir=tmp_path / "part", callbacks=[Stop], **options)
    part = mocov3_hf.finetune(
        model_folder, data, output_dir=tmp_path / "part", resume_from_checkpoint="auto", **options
    )
    assert part.results == whole.results


@pytest.mark.parametrize("kind", ["tagged", "measured"])
def test_cached_and_neighbors(kind, model_folder, tmp_path, request):
    data = request.getfixturevalue(kind)
    metric = {"tagged": "map", "measured": "r2"}[kind]
    found = mocov3_hf.knn(model_folder, data, k=[1, 5], output_dir=tmp_path)
    assert found[f"knn5_{metric}"] > 0.8
    given = {"learning_rates": [0.1, 1.0], "weight_decays": [0.0]} if kind == "tagged" else {}
    run = mocov3_hf.linear_probe(
        model_folder, data, cached=True, output_dir=tmp_path, num_train_epochs=30, train_batch_size=12, **given
    )
    assert run.results[f"linear_{metric}"] > 0.8
    _, result = read_results(tmp_path)
    assert "plots" in result
    assert (result["settings"]["chosen"]["thresholds"] is None) == (kind == "measured")


def test_a_sweep_minimizes_the_binary_cross_entropy():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    labels = (torch.rand(40, 3, generator=draw) < 0.4).to(torch.uint8)
    options = {"num_epochs": 3, "batch_size": 16, "seed": 1}
    sweep = sweep_linear_classifiers(features, labels, learning_rates=[0.5, 2.0], weight_decays=[0.01], **options)
    generator = torch.Generator().manual_seed(1)
    weight = (0.01 * torch.randn(3, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr=2.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for _ in range(3):
        for rows in torch.randperm(40, generator=generator).split(16):
            logits = features[rows] @ weight.T + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[rows].double())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(sweep.weight[1], weight.detach().float())
    torch.testing.assert_close(sweep.bias[1], bias.detach().float())
    logits = sweep.classifier(1).logits(features).numpy()
    assert sweep.accuracies(features, labels)[1] == pytest.approx(average_precision_score(labels.numpy(), logits))
    chosen = choose_linear_classifier(features, labels, learning_rates=[0.5], validation_fraction=0.25, **options)
    assert len(chosen.thresholds) == 3


def test_ridge_regression_is_that_of_scikit_learn():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(50, 8)) * draw.uniform(0.1, 10, 8) + 3
    targets = features @ draw.normal(size=(8, 2)) * [1, 100] + draw.normal(size=(50, 2)) + [5, 2000]
    mean, std = features.mean(axis=0), features.std(axis=0)
    both = [torch.from_numpy(values) for values in (features, targets)]
    for penalty, found in zip([0.01, 2.0], fit_linear_regressions(*both, [0.01, 2.0]), strict=True):
        expected = Ridge(alpha=penalty * 50).fit((features - mean) / std, targets)
        predicted = expected.predict((features - mean) / std)
        np.testing.assert_allclose(found.logits(both[0]).numpy(), predicted, rtol=1e-4, atol=1e-3)
    chosen = choose_linear_regression(*both)
    assert chosen.validation_accuracy == max(chosen.validation_accuracies.values())


def test_class_balanced_sampling():
    labels = np.array([0] * 90 + [3] * 8 + [1] * 2)
    images = TrainingImages(LabeledImages(None, labels, None), lambda image: image, seed=5)
    sampler = BalancedSampler(images, 3000)
    drawn = list(sampler)
    rows = np.array(drawn) % 100
    assert (len(drawn), len(sampler), set(rows)) == (3000, 3000, set(range(100)))
    counts = np.bincount(labels[rows], minlength=4)
    assert np.abs(counts[[0, 1, 3]] - 1000).max() < 100
    assert list(sampler) == drawn
    images.epoch = 1
    assert list(sampler) != drawn


def test_each_repetition_of_an_image_is_augmented_differently(pictures):
    kept = LabeledImages(_Decoded(pictures["train"][0][:4]), np.array([0, 0, 0, 1]), None)
    images = TrainingImages(kept, lambda image: torch.rand(2), seed=5)
    drawn = list(BalancedSampler(images, 40))
    of_the_rare = [images[index]["pixel_values"].tolist() for index in drawn if index % 4 == 3]
    assert len(of_the_rare) > 10
    assert len(set(map(tuple, of_the_rare))) == len(of_the_rare)
    assert {images[index]["labels"] for index in drawn if index % 4 == 3} == {1}


def test_an_imbalanced_set_with_superclasses(model_folder, pictures, tmp_path):
    def split(name):
        images, kinds = pictures[name]
        labels = [int(red) + 2 * int(green) for red, green, _ in kinds]
        parents = ["bright" if label else "dark" for label in labels]
        return datasets.Dataset.from_dict({"image": images, "label": labels, "kind": parents})

    data = {name: split(name) for name in ("train", "test")}
    options = {"superclass_column": "kind", "class_balanced_sampling": True, "label_column": "label"}
    runs = [
        mocov3_hf.linear_probe(
            model_folder, data, output_dir=tmp_path / str(index), **SHORT, base_learning_rate=1.0, **options
        )
        for index in range(2)
    ]
    assert runs[0].results == runs[1].results, "draws are a function of the seed"
    run = runs[0]
    assert run.model.config.superclasses == ["dark", "bright", "bright", "bright"]
    predicted = logits_of(tmp_path / "0", data["test"]["image"]).argmax(dim=1).numpy()
    labels = np.array(data["test"]["label"])
    assert run.results["linear_superclass_top1"] == pytest.approx(((predicted > 0) == (labels > 0)).mean())
    # The classifier knows the superclasses, also for data without them.
    tested = mocov3_hf.evaluate(run, data["test"], label_column="label", mixed_precision="no")
    assert tested["superclass_top1"] == run.results["linear_superclass_top1"]
    (result,) = read_results(tmp_path / "1")
    assert result["settings"]["class_balanced_sampling"] is True
    assert result["settings"]["label_column"] == "label"
    assert sum(result["plots"]["reliability"]["count"]) == 30


def test_warmup_fits_into_one_epoch(model_folder, image_folder, tmp_path, capsys):
    arguments = [*map(str, ("--model", model_folder, "--dataset_name", image_folder, "--output_dir", tmp_path))]
    metrics = finetune.main([*arguments, "--num_train_epochs", "1", "--train_batch_size", "16"])
    assert "finetune_top1" in metrics
    expected = "--warmup_epochs 5 does not fit into --num_train_epochs 1: shortened to a tenth, 0.1"
    assert expected in capsys.readouterr().err
    assert read_results(tmp_path)[0]["settings"]["warmup_epochs"] == 0.1


def test_evaluation_of_some_classes(model_folder, pictures, tmp_path):
    """Columns that are left out say nothing; class numbers that do not occur are classes without images."""
    columns = ("red", "green", "blue")

    def split(name, chosen):
        images, kinds = pictures[name]
        labels = {column: kinds[:, number].astype(int).tolist() for number, column in enumerate(columns)}
        return datasets.Dataset.from_dict({"image": images} | {name: labels[name] for name in chosen})

    data = {name: split(name, columns) for name in ("train", "test")}
    options = SHORT | {"num_train_epochs": 1, "label_column": list(columns), "eval_strategy": "no"}
    with pytest.warns(UserWarning, match="threshold"):
        run = mocov3_hf.linear_probe(model_folder, data, output_dir=tmp_path / "named", **options)
    test = split("test", ("blue", "red"))
    with pytest.raises(ValueError, match="lacks 1 of the 3 classes of the model, such as 'green'"):
        mocov3_hf.evaluate(run, test, label_column=["blue", "red"])
    images, kinds = pictures["test"]
    numbers = [np.flatnonzero(row).tolist() for row in kinds]
    few = [(image, row) for image, row in zip(images, numbers, strict=True) if 2 not in row]
    found = mocov3_hf.evaluate(run, few, match_classes="number", mixed_precision="no")
    both = [(image, row) for image, row in few if row == [0, 1]]
    assert mocov3_hf.evaluate(run, both, match_classes="number", mixed_precision="no")["map"] == pytest.approx(1)
    probabilities = logits_of(tmp_path / "named", [image for image, _ in few]).sigmoid().numpy()
    labels = np.array([[number in row for number in range(3)] for _, row in few])
    assert found["micro_f1"] == pytest.approx(f1_score(labels, probabilities >= 0.5, average="micro"))
