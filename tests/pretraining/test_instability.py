"""Instability: steps with NaN gradients are skipped and counted on all processes; spikes and divergence are found."""

import copy
import json
import math
import random
import statistics
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from mocov3_hf.optim import LARS
from mocov3_hf.pretraining import loop
from mocov3_hf.pretraining.instability import (
    DivergenceDetector,
    GradientWatch,
    SpikeDetector,
    block_of,
    first_and_last_weight,
)
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.step import train_step
from tests.fork_server import ranks
from tests.pretraining.test_gradient_cache import build
from tests.pretraining.test_run import read_metrics


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True),
    "adamw_not_fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=False),
    "lars": lambda parameters: LARS(parameters, lr=0.1, weight_decay=0.1),
}


def steps(optimizer_name, planted, chunk_size=None):
    """Four steps, of which those in `planted` see a NaN on the last process; returns the state after each."""
    accelerator = Accelerator(cpu=True)
    model = build()
    optimizer = OPTIMIZERS[optimizer_name]([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    states, skipped = [], []
    for step in range(4):
        views = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        if step in planted and accelerator.process_index == accelerator.num_processes - 1:
            views[0, 0, 0, 0, 0] = float("nan")
        output = train_step(
            model,
            optimizer,
            (views[0], views[1]),
            learning_rate=0.01,
            ema_decay=1.0,
            max_grad_norm=1.0,
            accelerator=accelerator,
            gradient_cache_chunk_size=chunk_size,
        )
        skipped.append(bool(output.skipped))
        moments = [value for state in optimizer.optimizer.state.values() for value in state.values()]
        states.append(copy.deepcopy([accelerator.unwrap_model(model).state_dict(), moments]))
    return states, skipped, accelerator


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_planted_nan_changes_nothing(optimizer_name, chunk_size):
    states, skipped, _ = steps(optimizer_name, planted=[2], chunk_size=chunk_size)
    assert skipped == [False, False, True, False]
    before, after = states[1], states[2]
    for key, value in before[0].items():
        assert torch.equal(value, after[0][key]), key
    assert all(torch.equal(first, second) for first, second in zip(before[1], after[1], strict=True))
    changed = [key for key, value in states[3][0].items() if not torch.equal(value, after[0][key])]
    assert "predictor.layers.0.dense.weight" in changed, "the step after goes on"
    assert all(torch.isfinite(value).all() for value in states[3][0].values())


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_guard_changes_no_healthy_step(optimizer_name, monkeypatch):
    guarded, _, _ = steps(optimizer_name, planted=[])
    monkeypatch.setattr("mocov3_hf.pretraining.step.step_unless", lambda skipped, optimizer, _: optimizer.step())
    plain, _, _ = steps(optimizer_name, planted=[])
    torch.testing.assert_close(guarded[-1], plain[-1], rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_one_process_with_a_nan_makes_all_skip(tmp_path):
    ranks(2, Path(__file__), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["skipped"] == second["skipped"] == [False, True, False, False]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


def plant(monkeypatch, bad_steps):
    """NaN in the views of some steps of a run."""
    original, step = loop.Run.augment, iter(range(1000))

    def augment(self, batch):
        views = original(self, batch)
        return tuple(view * float("nan") for view in views) if next(step) in bad_steps else views

    monkeypatch.setattr(loop.Run, "augment", augment)


def test_a_run_goes_on_and_counts(tmp_path, tiny, monkeypatch):
    plant(monkeypatch, [1])
    main([*tiny, "--logging_steps", "2", "--output_dir", str(tmp_path)])
    metrics = read_metrics(tmp_path)
    assert [line["skipped_steps"] for line in metrics] == [1, 1]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.slow
def test_a_run_of_nothing_but_nan_ends(tmp_path, tiny, monkeypatch, capsys):
    plant(monkeypatch, range(2, 1000))
    length = ["--max_steps", "100", "--logging_steps", "4", "--save_steps", "100"]
    with pytest.raises(SystemExit) as stop:
        main([*tiny, *length, "--output_dir", str(tmp_path)])
    assert stop.value.code == 1
    error = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert "error: the gradients of all 50 steps up to step 52 were infinite or NaN: the run has diverged" in error


def test_a_line_of_skipped_steps_alone_ends_nothing(tmp_path, tiny, monkeypatch):
    plant(monkeypatch, [0, 2])
    main([*tiny, "--logging_steps", "1", "--report_to", "tensorboard", "--output_dir", str(tmp_path)])
    metrics = read_metrics(tmp_path)
    assert [line["skipped_steps"] for line in metrics] == [1, 1, 2, 2]
    assert [line["loss"] is None for line in metrics] == [True, False, True, False]
    assert metrics[0]["grad_norm"] is metrics[0]["loss_normalized"] is metrics[0]["first_layer_grad_max"] is None


class SlowDetector:
    """The definition: median and median absolute deviation of logarithms, in plain lists."""

    def __init__(self, factor, window, minimum):
        self.factor, self.window, self.minimum, self.seen = factor, window, minimum, []

    def add(self, value):
        if not (math.isfinite(value) and value > 0):
            return 0.0
        before, result = [math.log(seen) for seen in self.seen[-self.window :]], 0.0
        if len(self.seen) >= self.minimum:
            median = statistics.median_low(before)
            deviation = 1.4826 * statistics.median_low([abs(seen - median) for seen in before])
            if math.log(value) > median + max(8 * deviation, math.log(self.factor)):
                result = value / math.exp(median)
        self.seen.append(value)
        return result


def test_spikes_are_found_and_nothing_else():
    generator = random.Random(0)
    detector = SpikeDetector(window=100, minimum=20)
    add = lambda value: detector.add(torch.tensor(value)).item()  # noqa: E731
    usual = [2.0 * math.exp(0.2 * generator.gauss(0, 1)) for _ in range(400)]
    assert [add(value) for value in usual] == [0] * 400, "noise is no spike"
    assert add(60.0) == pytest.approx(30, rel=0.2)
    assert add(2.0) == 0
    for _ in range(10):  # a few spikes do not become the usual
        assert add(60.0) > 0
    assert add(float("nan")) == add(float("inf")) == add(0.0) == 0
    copied = SpikeDetector(window=100, minimum=20)
    copied.load_state(json.loads(json.dumps(detector.state())))
    assert copied.add(torch.tensor(500.0)) == detector.add(torch.tensor(500.0)) > 0

    detector = SpikeDetector(window=100, minimum=20)
    assert not any(add(2.0 * 1.01**step) for step in range(300)), "a drift is no spike"
    detector = SpikeDetector(minimum=20)
    assert add(1e9) == 0, "there is no usual value yet"


@pytest.mark.parametrize("factor", [1.5, 4.0])
def test_the_spike_detector_is_what_its_definition_says(factor):
    generator = random.Random(1)
    detector, slow = SpikeDetector(factor, window=30, minimum=10), SlowDetector(factor, window=30, minimum=10)
    values = [math.exp(generator.gauss(0, 0.3) + 3 * (generator.random() < 0.05)) for _ in range(300)]
    values[50] = values[120] = float("nan")
    found = [detector.add(torch.tensor(value, dtype=torch.float64)).item() for value in values]
    assert found == pytest.approx([slow.add(value) for value in values])
    assert 3 < sum(value > 0 for value in found) < 30


def test_divergence_is_a_loss_of_what_was_gained():
    detector = DivergenceDetector(window=5)
    assert not any(detector.add(gain) for gain in [0.0, 0.02, 0.01, 0.03, 0.0, 0.0, 0.0]), "nothing was gained yet"
    assert not any(detector.add(0.01 * step) for step in range(50))
    best = detector.best
    assert best == pytest.approx(0.47), "the mean of the last five"
    assert not any(detector.add(0.3) for _ in range(10)), "a part of it may be lost"
    detector = DivergenceDetector(**json.loads(json.dumps(detector.state())), window=5)
    assert [detector.add(0.1) for _ in range(20)] == [False, True, *[False] * 18], "reported once"


def test_blocks_are_named_after_layers():
    names = {
        "mocov3.backbone.encoder.layer.11.mlp.fc1.weight": "encoder.layer.11",
        "mocov3.backbone.embeddings.cls_token": "embeddings",
        "mocov3.backbone.encoder.stages.0.layers.1.layer.0.convolution.weight": "encoder.stages.0.layers.1",
        "mocov3.backbone.timm_model.blocks.3.mlp.fc1.weight": "timm_model.blocks.3",
        "projector.layers.0.dense.weight": "projector",
    }
    assert {name: block_of(name) for name in names} == names


@pytest.mark.parametrize(
    ("backbone", "first", "last"),
    [
        ({}, "encoder.layer.0.attention.q_proj.weight", "encoder.layer.1.mlp.fc2.weight"),
        (
            {"freeze_patch_projection": False},
            "embeddings.patch_embeddings.projection.weight",
            "encoder.layer.1.mlp.fc2.weight",
        ),
    ],
)
def test_first_and_last_layer(backbone, first, last):
    model = build(**backbone).mocov3.backbone
    with pytest.raises(ValueError, match="no weight of MoCoV3ViTModel has a gradient"):
        first_and_last_weight(model)
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).pooler_output.sum().backward()
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[weight] for weight in first_and_last_weight(model)] == [first, last]
    model.encoder.layer[1].mlp.fc2.weight.grad = None  # a layer that is not used is none of the two
    assert names[first_and_last_weight(model)[1]] == "encoder.layer.1.mlp.fc1.weight"


def plant_spikes(monkeypatch, bad_batches, factor=100.0):
    """
    Gradients that are many times too large, on some batches of a run whatever step they come to. Returns a list, to
    which the run adds the gradient norm of each step without them.
    """
    batches, look = loop.batches, GradientWatch.look
    current, norms = [], []

    def numbered(loader, plan, step, skipped_batches=0):
        for index, batch in enumerate(batches(loader, plan, step, skipped_batches), start=step + skipped_batches):
            current[:] = [index]
            yield batch

    def planted(self):
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        if current[0] in bad_batches:
            for gradient in gradients:
                gradient *= factor
        return look(self)

    monkeypatch.setattr(loop, "batches", numbered)
    monkeypatch.setattr(GradientWatch, "look", planted)
    return norms


def read_events(folder):
    file = folder / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


SPIKING = ["--max_steps", "30", "--logging_steps", "10", "--save_steps", "8", "--optimizer", "lars"]
SPIKING += ["--base_learning_rate", "0.01"]


@pytest.mark.slow
def test_a_planted_spike_is_reported_and_counted(tmp_path, tiny, monkeypatch, capsys):
    norms = plant_spikes(monkeypatch, [26])
    main([*tiny, *SPIKING, "--output_dir", str(tmp_path)])
    assert [line["gradient_spikes"] for line in read_metrics(tmp_path)] == [0, 0, 1]
    assert "warning: step 27: the gradient norm" in capsys.readouterr().err
    [event] = read_events(tmp_path)
    assert (event["step"], event["event"]) == (27, "spike")
    # Norms of such a small run vary several times from step to step, hence the ratio is more or less than 100.
    assert event["times_usual"] == pytest.approx(100 * norms[26] / statistics.median_low(norms[:26]), rel=1e-4)


@pytest.mark.slow
def test_skip_leaves_out_a_step_that_spikes(tmp_path, tiny, monkeypatch):
    plant_spikes(monkeypatch, [26])
    every_step = ["--save_steps", "1", "--save_total_limit", "5", "--on_instability", "skip"]
    main([*tiny, *SPIKING, *every_step, "--output_dir", str(tmp_path)])
    assert [(event["step"], event["event"]) for event in read_events(tmp_path)] == [(27, "skipped"), (27, "spike")]
    assert [line["skipped_steps"] for line in read_metrics(tmp_path)] == [0, 0, 1]
    before, after, later = (load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (26, 27, 28))
    trained = [key for key in before if key.startswith(("mocov3.", "projector.", "predictor."))]
    assert all(torch.equal(before[key], after[key]) for key in trained)
    assert not all(torch.equal(after[key], later[key]) for key in trained), "the step after goes on"


def test_skip_and_fp16_are_refused(tmp_path, tiny, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*tiny, "--on_instability", "skip", "--mixed_precision", "fp16", "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "--on_instability skip does not work with --mixed_precision fp16" in capsys.readouterr().err


def test_collapse_shows_in_the_metrics(tmp_path, tiny, monkeypatch):
    main([*tiny, "--output_dir", str(tmp_path / "healthy")])
    healthy = read_metrics(tmp_path / "healthy")[-1]
    assert healthy["projection_std_ratio"] > 0.3
    assert healthy["projection_effective_rank"] > 2
    original = loop.train_step

    def collapsed(*args, **options):
        output = original(*args, **options)
        output.projection = output.projection[:1].repeat(len(output.projection), 1)
        return output

    monkeypatch.setattr(loop, "train_step", collapsed)
    main([*tiny, "--output_dir", str(tmp_path / "collapsed")])
    assert read_metrics(tmp_path / "collapsed")[-1]["projection_std_ratio"] < 1e-5


if __name__ == "__main__":
    all_states, all_skipped, processes = steps("adamw", planted=[1])
    result = {"skipped": all_skipped, "weights": all_states[-1][0]}
    torch.save(result, Path(sys.argv[1]) / f"{processes.process_index}.pt")
    torch.distributed.destroy_process_group()
