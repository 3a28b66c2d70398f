"""The benchmark that damages runs: a few faults of each way to start, and that it notices what is lost."""

import random

import pytest

from benchmarks import chaos
from benchmarks.chaos_runs import KINDS, Reference, Trial, reference_run, summary, table, write_shards


STEPS = 8
KIND = next(iter(KINDS))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("chaos") / "data")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data):
    return reference_run(tmp_path_factory.mktemp("reference"), KIND, data, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        chaos.kill_all,
        chaos.kill_worker,
        chaos.start_twice,
        lambda trial, _draw: chaos.fail_operation(trial, place=20, choice="stop"),
        lambda trial, draw: chaos.flip_bit(trial, draw, in_checkpoint=True),
    ],
)
def test_faults_lose_nothing(tmp_path, data, reference, fault):
    trial = Trial(tmp_path, KIND, data, STEPS, reference)
    fault(trial, random.Random(0))
    assert trial.problems == []


@pytest.mark.slow
def test_what_is_lost_is_noticed(tmp_path, data, reference):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"other weights")
    trial = Trial(tmp_path, KIND, data, STEPS, Reference(other, 1.0))
    trial.expect_nothing_lost(3)
    trial.finish()
    assert trial.problems == ["the newest checkpoint has step 0, not 3"]
    trial.problems.clear()
    trial.finish()
    assert trial.problems[0] == "other weights"


def test_the_table():
    trials = [
        {"fault": "full disk", "outcome": "went on", "problems": []},
        {"fault": "full disk", "outcome": "ended", "problems": ["other weights"]},
        {"fault": "full disk", "outcome": "went on", "problems": []},
    ]
    rows = list(summary(trials))
    assert rows == [{"fault": "full disk", "times": 3, "what_happened": {"ended": 1, "went on": 2}, "kept": 2}]
    report = {
        "faults": 3,
        "lost": 1,
        "seconds": 60,
        "command": "chaos",
        "hardware": {"cpu": "a cpu", "cpu_count": 2},
        "table": rows,
    }
    assert "| full disk | 3 | ended (1); went on (2) | 2 |" in table(report)
