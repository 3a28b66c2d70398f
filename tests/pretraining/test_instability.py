"""Gradients that are no numbers: the step is skipped on all processes, counted, and a run of nothing else ends."""

import copy
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from mocov3_hf.optim import LARS
from mocov3_hf.pretraining import loop
from mocov3_hf.pretraining.instability import SpikeDetector, first_and_last_weight
from mocov3_hf.pretraining.loop import main
from mocov3_hf.pretraining.step import train_step
from tests.launch import torchrun
from tests.pretraining.test_gradient_cache import build
from tests.pretraining.test_run import read_metrics


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True),
    "adamw_not_fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=False),
    "lars": lambda parameters: LARS(parameters, lr=0.1, weight_decay=0.1),
}


def steps(optimizer_name, planted, chunk_size=None):
    """Four steps, of which those in `planted` see a NaN on the last process; gives all state after each."""
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
            momentum=1.0,
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
    monkeypatch.setattr("mocov3_hf.pretraining.step.update_unless", lambda skipped, optimizer, _: optimizer.step())
    plain, _, _ = steps(optimizer_name, planted=[])
    torch.testing.assert_close(guarded[-1], plain[-1], rtol=1e-12, atol=1e-14)


def test_one_process_with_a_nan_makes_all_skip(tmp_path):
    torchrun(2, Path(__file__), str(tmp_path))
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


def test_spikes_are_found_and_nothing_else():
    generator = random.Random(0)
    detector = SpikeDetector(window=100, minimum=20)
    usual = [2.0 * math.exp(0.2 * generator.gauss(0, 1)) for _ in range(400)]
    assert [detector.add(value) for value in usual] == [None] * 400, "noise is no spike"
    assert detector.add(60.0) == pytest.approx(30, rel=0.2)
    assert detector.add(2.0) is None
    for _ in range(10):  # a few spikes do not become the usual
        assert detector.add(60.0) is not None
    drifting = [2.0 * 1.01**step for step in range(300)]
    detector = SpikeDetector(window=100, minimum=20)
    assert not any(detector.add(value) for value in drifting), "a drift is no spike"
    assert SpikeDetector(minimum=20).add(1e9) is None, "there is no usual value yet"
    assert detector.add(float("nan")) is None
    copied = SpikeDetector(window=100, history=detector.history)
    assert copied.add(500.0) == detector.add(500.0)


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


def test_a_planted_spike_is_told_and_counted(tmp_path, tiny, monkeypatch, capsys):
    original, step = loop.train_step, iter(range(1000))

    def planted(model, optimizer, views, **options):
        output = original(model, optimizer, views, **options)
        if next(step) == 26:
            output.grad_norm = output.grad_norm * 100
        return output

    monkeypatch.setattr(loop, "train_step", planted)
    main([*tiny, "--max_steps", "30", "--logging_steps", "10", "--output_dir", str(tmp_path)])
    assert [line["gradient_spikes"] for line in read_metrics(tmp_path)] == [0, 0, 1]
    assert "warning: step 27: the gradient norm" in capsys.readouterr().err


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
