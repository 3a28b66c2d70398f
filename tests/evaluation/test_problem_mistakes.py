"""Options and labels that do not fit a problem type: one line each."""

import numpy as np
import pytest

import mocov3_hf
from mocov3_hf.data.labeled import LabeledImages
from mocov3_hf.evaluation import finetune, linear_probe
from mocov3_hf.evaluation.problems import TargetScale
from tests.evaluation.test_problem_types import SHORT


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("tagged", {"mixup_alpha": 0.8}, "--mixup_alpha is for one class per image, not multi_label_classification"),
        ("measured", {"label_smoothing_factor": 0.1}, "--label_smoothing_factor is for one class per image"),
        ("tagged", {"class_balanced_sampling": True}, "--class_balanced_sampling is for one class per image"),
        ("tagged", {"metric_for_best_model": "top5"}, "takes one of map, micro_f1, macro_f1, loss, got 'top5'"),
        ("tagged", {"problem_type": "single_label_classification"}, "must hold classes, integers or text, got List"),
        ("tagged", {"problem_type": "regression"}, "regression needs numbers"),
    ],
)
def test_options_that_do_not_fit(kind, options, message, model_folder, tmp_path, request):
    with pytest.raises(ValueError, match=message) as raised:
        mocov3_hf.finetune(model_folder, request.getfixturevalue(kind), output_dir=tmp_path, **(SHORT | options))
    assert "\n" not in str(raised.value)


def test_a_fraction_that_holds_out_nothing_is_refused_before_the_features(model_folder, pictures, tmp_path):
    one_each = [(image, number) for number, image in enumerate(pictures["train"][0][:12])]
    data = {"train": one_each, "test": one_each}
    message = r"--validation_fraction 0.1 holds out 0 of 12 images: .* \(the largest class has 1\)"
    for options in ({"cached": True}, {"validation_fraction": 0.1, "train_batch_size": 4}):
        with pytest.raises(ValueError, match=message):
            mocov3_hf.linear_probe(model_folder, data, output_dir=tmp_path, **options)


def test_what_labels_may_mean_is_printed(model_folder, pictures, tmp_path, capsys):
    images = pictures["train"][0][:8]
    for labels, line in (
        (["ant|bee", "ant"] * 4, "labels: 'ant|bee' is one class: --problem_type multi_label_classification takes it"),
        (["1.5", "2.5", "3e1", "tall"] * 2, "labels: most classes look like numbers, not all"),
        ([*range(20, 27), 20], "labels: most images have a number of their own: for quantities"),
        (["1", "2"] * 4, None),
    ):
        pairs = list(zip(images, labels, strict=True))
        mocov3_hf.knn(model_folder, {"train": pairs, "test": pairs}, k=[1], output_dir=tmp_path)
        lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("labels: ")]
        assert len(lines) == (1 if line is None else 2)
        assert line is None or lines[1].startswith(line)


def test_neighbors_of_a_constant_target_are_refused(model_folder, measured, tmp_path):
    data = {split: [(image, 7.0) for image, _ in pairs] for split, pairs in measured.items()}
    with pytest.raises(ValueError, match="the target 'label' is 7 in all training images"):
        mocov3_hf.knn(model_folder, data, output_dir=tmp_path)


def test_mistakes_of_commands(model_folder, image_folder, tmp_path, fails):
    arguments = ("--model", model_folder, "--dataset_name", image_folder, "--output_dir", tmp_path)
    line = fails(finetune.main, [*arguments, "--problem_type", "regression"])
    assert "holds classes (ant, bee, cow): regression needs numbers" in line
    line = fails(linear_probe.main, [*arguments, "--cached", "--class_balanced_sampling"])
    assert "--class_balanced_sampling works only without --cached" in line


def test_mistakes_of_cached_features(model_folder, tagged, measured, tmp_path):
    options = {"cached": True, "output_dir": tmp_path}
    with pytest.raises(ValueError, match="few-shot images are drawn by class"):
        mocov3_hf.linear_probe(model_folder, tagged, few_shot=[1], **options)
    with pytest.raises(ValueError, match="regression is solved exactly"):
        mocov3_hf.linear_probe(model_folder, measured, learning_rates=[1.0], **options)
    with pytest.raises(ValueError, match="the target '1' is 7 in all training images: leave it out"):
        TargetScale.of(LabeledImages(None, np.array([[1.0, 7], [2, 7]]), None))
