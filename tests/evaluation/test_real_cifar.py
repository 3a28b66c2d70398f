"""All commands on CIFAR-10 as parquet. Set MOCOV3_TEST_DATA to a folder that holds cifar10/."""

import os
from pathlib import Path

import pytest

from mocov3_hf.evaluation import evaluate, finetune, knn, linear_probe


ROOT = os.environ.get("MOCOV3_TEST_DATA")
pytestmark = pytest.mark.skipif(not ROOT, reason="set MOCOV3_TEST_DATA to a folder with cifar10/")
TRAINING = ("--num_train_epochs", 1, "--train_batch_size", 100)


def test_all_commands(model_folder, tmp_path):
    def run(main, name, *more, model=model_folder):
        splits = ["--train_split", "train[:400]", "--test_split", "test[:200]"]
        paths = ["--model", model, "--dataset_name", Path(ROOT) / "cifar10", "--output_dir", tmp_path / name]
        return main([str(value) for value in (*paths, *(splits if main is not evaluate.main else splits[2:]), *more)])

    # Even without training, colors distinguish some of the ten classes.
    assert run(knn.main, "knn", "--k", 20)["knn20_top1"] > 0.12
    assert (
        run(linear_probe.main, "cached", "--cached", "--few_shot", 5, "--num_train_epochs", 20)["linear_top1"] > 0.12
    )
    assert run(linear_probe.main, "linear", *TRAINING)["linear_top5"] > 0.3
    recipe = ("--recipe", "cifar10_vit-tiny-p4_finetune", "--warmup_epochs", 0.5)
    metrics = run(finetune.main, "finetune", *recipe, *TRAINING)
    tested = run(evaluate.main, "tested", model=tmp_path / "finetune")
    assert tested["top1"] == metrics["finetune_top1"]
    assert set(tested["per_class"]) > {"airplane", "truck"}
