"""Unstable runs roll back, skip the offending batches, and end as if those had never existed."""

import pytest
import torch
from safetensors.torch import load_file

from mocov3_hf.model.loss_mocov3 import chance_loss, floor_loss
from mocov3_hf.optim import warmup_cosine
from mocov3_hf.pretraining import loop
from mocov3_hf.pretraining.checkpoint import read_state
from mocov3_hf.pretraining.plan import make_plan
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import load_recipe
from tests.pretraining.test_instability import plant_spikes, read_events
from tests.pretraining.test_resume import Killed, assert_same_run, kill_at
from tests.pretraining.test_run import read_metrics


LENGTH = ["--max_steps", "32", "--logging_steps", "10", "--save_steps", "8", "--save_total_limit", "9"]
SMOOTH = ["--optimizer", "lars", "--base_learning_rate", "0.01"]
ROLLBACK = ["--on_instability", "rollback"]


@pytest.fixture
def run(tiny, tmp_path, fresh):
    """Runs `pretrain.py` into a folder of the given name."""

    def run(name, *options):
        fresh()
        main([*tiny, *LENGTH, *SMOOTH, *options, "--output_dir", str(tmp_path / name)])
        return tmp_path / name

    return run


def leave_out(monkeypatch, first, last):
    """A run whose data never had the batches from `first` up to `last`, by the obvious means."""
    batches = loop.batches

    def without(loader, plan, step, skipped_batches=0):
        for index, batch in enumerate(batches(loader, plan, 0, 0)):
            if index < first:
                yield batch
        yield from batches(loader, plan, first, last - first)

    monkeypatch.setattr(loop, "batches", without)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e3, float("nan")], ids=["spike", "nan"])
def test_a_rollback_ends_as_if_the_images_had_never_been(run, monkeypatch, factor, capsys):
    with monkeypatch.context() as patch:
        plant_spikes(patch, [20], factor)
        rolled_back = run("rolled_back", *ROLLBACK)
    kinds = [(event["step"], event["event"]) for event in read_events(rolled_back)]
    # Step 21 goes wrong and is looked at when step 24 is to be saved; batches 16 to 23 are skipped.
    assert kinds == [(21, "spike" if factor == 1e3 else "skipped"), (24, "rollback")]
    event = read_events(rolled_back)[-1]
    assert (event["to_step"], event["skipped_batches"], event["learning_rate_scale"]) == (16, 8, 1.0)
    assert "step 21" in event["reason"]
    assert "step 21" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(rolled_back)] == [10, 20, 30, 32]
    assert [line["rollbacks"] for line in read_metrics(rolled_back)] == [0, 1, 1, 1]
    state = read_state(rolled_back / "checkpoint-32")
    assert (state.skipped_batches, state.num_rollbacks) == (8, 1)

    with monkeypatch.context() as patch:
        leave_out(patch, 16, 24)
        expected = run("expected")
    first, second = load_file(rolled_back / "model.safetensors"), load_file(expected / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("call", [19, 24, 26, 30])
def test_a_kill_before_during_and_after_a_rollback_changes_nothing(run, monkeypatch, call):
    with monkeypatch.context() as patch:
        plant_spikes(patch, [20], 1e3)
        undisturbed = run("undisturbed", *ROLLBACK)
    with monkeypatch.context() as patch:
        plant_spikes(patch, [20], 1e3)
        with patch.context() as killing:
            kill_at(killing, loop, "train_step", call)
            with pytest.raises(Killed):
                run("killed", *ROLLBACK)
        run("killed", *ROLLBACK, "--resume_from_checkpoint", "auto")
    assert_same_run(undisturbed.parent / "killed", undisturbed)
    assert read_events(undisturbed.parent / "killed") == read_events(undisturbed)


@pytest.mark.slow
def test_a_rollback_in_the_first_steps_returns_to_the_start_with_a_lower_rate(run, monkeypatch):
    plant_spikes(monkeypatch, [4], float("nan"))
    folder = run("run", *ROLLBACK, "--rollback_learning_rate_factor", "0.5", "--learning_rate", "0.1")
    [_, event] = read_events(folder)
    assert (event["to_step"], event["learning_rate_scale"]) == (0, 0.5)
    plan = make_plan(load_recipe(str(folder / "recipe.yaml")), 24, 1)
    for line in read_metrics(folder):
        expected = 0.5 * warmup_cosine(line["step"] - 1, 32, plan.warmup_steps, 0.1)
        assert line["learning_rate"] == pytest.approx(expected)


@pytest.mark.slow
def test_rollbacks_that_do_not_help_go_farther_back_and_then_end(run, monkeypatch, capsys, tmp_path):
    plant_spikes(monkeypatch, range(20, 1000), float("nan"))
    with pytest.raises(SystemExit) as stop:
        run("run", *ROLLBACK, "--max_rollbacks", "3")
    assert stop.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step ")
    assert "after 3 rollbacks: they do not help" in error
    targets = [event["to_step"] for event in read_events(tmp_path / "run") if event["event"] == "rollback"]
    assert targets == [16, 8, 0]


@pytest.mark.slow
def test_a_planted_divergence_is_rolled_back(run, monkeypatch, tmp_path):
    """The loss learns well, then falls back towards chance with smooth gradients while certain batches are seen."""
    batches, train_step, current = loop.batches, loop.train_step, []

    def numbered(loader, plan, step, skipped_batches=0):
        for index, batch in enumerate(batches(loader, plan, step, skipped_batches), start=step + skipped_batches):
            current[:] = [index]
            yield batch

    def planted(*args, **options):
        output = train_step(*args, **options)
        gain = 0.1 if 40 <= current[0] < 60 else 0.5
        chance, floor = chance_loss(0.2, 8), floor_loss(0.2, 8)
        output.loss = torch.full_like(output.loss, chance - gain * (chance - floor))
        return output

    monkeypatch.setattr(loop, "batches", numbered)
    monkeypatch.setattr(loop, "train_step", planted)
    length = ["--max_steps", "64", "--temperature", "0.2"]
    warned = run("warned", *length)
    # With thirteen of the twenty at 0.1 the mean gain falls below 0.25, half of what it was.
    [event] = read_events(warned)
    assert (event["step"], event["event"]) == (53, "divergence")
    rolled_back = run("rolled_back", *length, *ROLLBACK)
    events = [(event["event"], event.get("to_step")) for event in read_events(rolled_back)]
    assert events == [("divergence", None), ("rollback", 48)]
    assert read_state(rolled_back / "checkpoint-64").num_rollbacks == 1


@pytest.mark.slow
def test_resuming_knows_what_was_skipped(run, monkeypatch, tmp_path):
    seen = []
    batches = loop.batches

    def recorded(loader, plan, step, skipped_batches=0):
        seen.append((step, skipped_batches))
        return batches(loader, plan, step, skipped_batches)

    plant_spikes(monkeypatch, [20], float("nan"))
    planted = loop.batches
    monkeypatch.setattr(loop, "batches", lambda *args: recorded(*args) and planted(*args))
    run("run", *ROLLBACK)
    run("run", *ROLLBACK, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-24"))
    assert seen == [(0, 0), (16, 8), (24, 8)]
