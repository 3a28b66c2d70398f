"""Trackers: one run before and after an interruption, each step once, and no reason for a run to end."""

import gc
import json
import threading
import weakref

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from mocov3_hf.pretraining import build, loop
from mocov3_hf.pretraining.pretrain import main
from mocov3_hf.pretraining.recipe import parse
from mocov3_hf.pretraining.trackers import Trackers
from tests.pretraining.test_resume import Killed, kill_at
from tests.pretraining.test_run import read_metrics


LENGTH = ["--max_steps", "8", "--save_steps", "3", "--logging_steps", "1", "--knn_steps", "2", "--knn_k", "3"]


class Server:
    """Where the stand-ins of wandb and trackio log to: entries by run."""

    def __init__(self):
        self.runs, self.starts, self.ends, self.refuses = {}, [], [], False


def stand_in(tracker_name, server):
    """A class with accelerate's interface, which identifies runs as the tracker does."""

    class StandIn(GeneralTracker):
        name, requires_logging_directory, main_process_only = tracker_name, False, True

        def __init__(self, run_name, **options):
            super().__init__()
            self.project, self.options = run_name, options

        def start(self):
            server.starts.append((self.project, self.options))
            self.key = self.options.get("id", self.options["name"])
            if self.options["resume"] == "never":
                assert self.key not in server.runs
            entries = server.runs.setdefault(self.key, [])
            self.run = self
            self.starting_step = max((step for step, _ in entries), default=-1) + 1

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            assert values["train_batch_size"] == 8

        def log(self, values, step=None):
            if server.refuses:
                raise ConnectionError("no network")
            server.runs[self.key] += [(step, name) for name in values]

        def finish(self, exit_code=0):
            server.ends.append(exit_code)

    return StandIn


@pytest.fixture(params=["wandb", "trackio"])
def server(request, monkeypatch):
    server = Server()
    monkeypatch.setattr(build, "check_trackers", lambda names: names)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, request.param, stand_in(request.param, server))
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda log_with, _: log_with or [])
    server.name = request.param
    return server


@pytest.fixture
def arguments(tiny, labeled, server, tmp_path):
    images = ["--dataset_name", str(labeled)]
    return [*tiny, *images, *LENGTH, "--report_to", server.name, "--output_dir", str(tmp_path / "first")]


def entries(server, name):
    (run,) = server.runs.values()
    return [step for step, value in run if value == name]


@pytest.mark.slow
def test_a_resumed_run_continues_in_the_same_run(arguments, server, monkeypatch, fresh, tmp_path):
    with monkeypatch.context() as patch:
        kill_at(patch, loop, "train_step", 6)  # after the checkpoint of step 3, step 5 is logged
        with pytest.raises(Killed):
            main(arguments)
    assert server.ends == [1 if server.name == "wandb" else 0]
    fresh()
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert server.ends[1:] == [0]
    assert entries(server, "loss") == list(range(1, 9))
    assert entries(server, "knn_top1") == [2, 4, 6, 8]
    (first, options), (second, again) = server.starts
    assert first == second == "mocov3"
    assert options["name"] == "first" if server.name == "wandb" else options["name"].startswith("first-")
    known = json.loads((tmp_path / "first" / "trackers.json").read_text())
    assert known == {server.name: again["id" if server.name == "wandb" else "name"]}


@pytest.mark.slow
def test_another_run_in_the_folder_is_another_run(arguments, server, fresh):
    main([*arguments, "--run_name", "a"])
    fresh()
    main([*arguments, "--run_name", "b", "--overwrite_output_dir"])
    assert [options["name"] for _, options in server.starts] == ["a", "b"]
    assert len(server.runs) == 2


@pytest.mark.slow
def test_steps_after_a_rollback_are_not_sent_twice(arguments, server, monkeypatch, tmp_path):
    original, steps = loop.train_step, []

    def unstable(*args, **kwargs):
        steps.append(1)
        output = original(*args, **kwargs)
        if len(steps) == 5:
            output.grad_norm.fill_(float("inf"))
        return output

    monkeypatch.setattr(loop, "train_step", unstable)
    main([*arguments, "--on_instability", "rollback"])
    assert "rollback" in (tmp_path / "first" / "events.jsonl").read_text()
    assert entries(server, "loss") == list(range(1, 9))


@pytest.mark.slow
def test_a_tracker_that_fails_does_not_end_the_run(arguments, server, monkeypatch, capsys, tmp_path):
    original, steps = loop.train_step, []

    def cut_off(*args, **kwargs):
        steps.append(1)
        server.refuses = len(steps) in (3, 4, 5)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", cut_off)
    main(arguments)
    assert entries(server, "loss") == list(range(1, 9))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: --report_to")]
    assert warnings == [
        f"warning: --report_to {server.name} failed (no network): its entries are kept in memory",
        f"warning: --report_to {server.name} works again: 5 entries kept in memory were sent",
    ]


def test_a_tracker_that_stays_away(arguments, server, capsys, tmp_path):
    server.refuses = True
    main(arguments)
    assert len(read_metrics(tmp_path / "first")) == 8
    line = f"warning: 12 entries for --report_to {server.name} are lost (no network): see metrics.jsonl"
    assert line in capsys.readouterr().err


def test_a_tracker_that_does_not_start(arguments, server, monkeypatch, capsys):
    def start(_self):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS[server.name], "start", start)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    line = f"error: --report_to {server.name} does not start: api_key not configured"
    assert capsys.readouterr().err.splitlines()[-1] == line


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(tmp_path, tiny, monkeypatch, fresh):
    # Files are read in the order of their names: second, host, process and a counter without leading zeros. Of runs in
    # one process and second, the tenth file would come before the ninth.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
    arguments = [*tiny, "--max_steps", "6", "--save_steps", "2", "--report_to", "tensorboard"]
    with monkeypatch.context() as patch:
        kill_at(patch, loop, "train_step", 6)
        with pytest.raises(Killed):
            main([*arguments, "--output_dir", str(tmp_path)])
    fresh()
    main([*arguments, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"])
    accumulator = EventAccumulator(str(tmp_path / "mocov3")).Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    fresh()
    main([*arguments, "--output_dir", str(tmp_path), "--overwrite_output_dir", "--max_steps", "3"])
    accumulator = EventAccumulator(str(tmp_path / "mocov3")).Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3]


def test_threads_started_meanwhile_do_not_keep_the_run(tmp_path, tiny):
    """They would release its tensors while the interpreter exits, which aborts."""
    recipe = parse([*tiny, "--output_dir", str(tmp_path)])
    done, hook = threading.Event(), threading.excepthook
    with Trackers(Accelerator(cpu=True), recipe, tmp_path) as trackers:
        assert threading.excepthook is not hook
        thread = threading.Thread(target=done.wait)
        thread.start()
    kept = weakref.ref(trackers)
    del trackers
    gc.collect()
    try:
        assert kept() is None
    finally:
        done.set()
        thread.join()
    assert threading.excepthook is hook
