"""Whole runs of a tiny model: what they leave behind, and that one process and two do the same."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe
from tests.fork_server import ranks
from tests.launch import ROOT


METRICS = [
    "step",
    "epoch",
    "loss",
    "loss_normalized",
    "positive_top1",
    "learning_rate",
    "ema_decay",
    "grad_norm",
    "images_per_second",
    "data_wait_fraction",
    "skipped_steps",
    "gradient_spikes",
    "rollbacks",
    "first_layer_grad_max",
    "last_layer_grad_max",
    "projection_std_ratio",
    "projection_effective_rank",
    "block_grad_norms",
]
TIMES = ("images_per_second", "data_wait_fraction")


def read_metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics]


def test_a_run_leaves_weights_processor_metrics_and_recipe(tmp_path, tiny, pictures):
    main([*tiny, "--output_dir", str(tmp_path)])
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert list(metrics[0]) == METRICS
    assert metrics[0]["epoch"] == pytest.approx(1 / 3)
    assert metrics[0]["ema_decay"] == pytest.approx(0.9)
    assert all(0 <= line["positive_top1"] <= 1 and line["grad_norm"] > 0 for line in metrics)
    blocks = ["embeddings", "encoder.layer.0", "encoder.layer.1", "layernorm", "projector", "predictor"]
    for line in metrics:
        assert list(line["block_grad_norms"]) == blocks
        assert math.hypot(*line["block_grad_norms"].values()) == pytest.approx(line["grad_norm"], rel=1e-5)

    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.data.dataset_name == str(pictures)
    assert recipe.optimization.max_steps == 4

    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixel_values = processor(torch.zeros(3, 50, 60, dtype=torch.uint8), return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 32, 32)
    assert AutoModel.from_pretrained(tmp_path)(pixel_values).pooler_output.shape == (1, 16)
    model, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "recipe.yaml"}
    # The momentum branch has followed without catching up.
    moved = [not torch.equal(average, source) for average, source in model.momentum_pairs() if source.requires_grad]
    assert all(moved)


def test_the_resolved_recipe_repeats_the_run(tmp_path, tiny):
    main([*tiny, "--output_dir", str(tmp_path / "first")])
    arguments = ["--recipe", str(tmp_path / "first" / "recipe.yaml"), "--output_dir", str(tmp_path / "second")]
    main(arguments)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert without_times(read_metrics(tmp_path / "first")) == without_times(read_metrics(tmp_path / "second"))
    main([*arguments[:2], "--output_dir", str(tmp_path / "third"), "--seed", "1"])
    assert without_times(read_metrics(tmp_path / "first")) != without_times(read_metrics(tmp_path / "third"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_two_processes_train_as_one(tmp_path, tiny, optimizer):
    backbone = ["--optimizer", "adamw"]
    if optimizer == "lars":
        resnet = '{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}'
        backbone = ["--backbone_config", resnet, "--optimizer", "lars", "--base_learning_rate", "0.3"]
    arguments = [*tiny, *backbone]
    main([*arguments, "--output_dir", str(tmp_path / "one")])
    _, output = ranks(2, ROOT / "scripts" / "pretrain.py", *arguments, "--output_dir", str(tmp_path / "two"))
    assert "Warning" not in output, output
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for first, second in zip(one, two, strict=True):
        for name in set(METRICS) - {*TIMES, "block_grad_norms"}:
            assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-6), name
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)


def test_bf16_and_starting_from_weights(tmp_path, tiny):
    main([*tiny, "--output_dir", str(tmp_path / "first"), "--mixed_precision", "bf16"])
    start = ["--model", str(tmp_path / "first"), "--max_steps", "1"]
    main([*tiny, "--output_dir", str(tmp_path / "second"), "--mixed_precision", "bf16", *start])
    weights = load_file(tmp_path / "second" / "model.safetensors")
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights.values())
    # The rate of the first step is zero without warm-up only at the end: one step of one moves the weights.
    before = load_file(tmp_path / "first" / "model.safetensors")
    name = "predictor.layers.0.dense.weight"
    assert not torch.equal(before[name], weights[name])
    assert (before[name] - weights[name]).abs().max() < 0.05


def test_trackers_receive_the_metrics(tmp_path, tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main([*tiny, "--output_dir", str(tmp_path), "--report_to", "tensorboard"])
    events = next(tmp_path.rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3, 4]
    tags = set(accumulator.Tags()["scalars"])
    assert set(METRICS) - {"step", "block_grad_norms"} <= tags
    assert "block_grad_norms/encoder.layer.1" in tags
