"""Processes part in order: models are released before the process group, and every wait has an end."""

import sys
import threading
import time
import traceback
import weakref

import pytest
import torch.distributed as dist

from mocov3_hf import process_group
from tests.launch import ROOT, python


class Wrapped:
    """A reference cycle, as a model that DDP has wrapped."""

    def __init__(self):
        self.me = self


@pytest.fixture
def joined(monkeypatch):
    """As if this process had joined others; the calls are recorded."""
    calls = []
    monkeypatch.setattr(process_group, "is_joined", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    return calls


def test_models_are_released_before_the_group_is_destroyed(joined, monkeypatch):
    wrapped = Wrapped()
    weakref.finalize(wrapped, joined.append, "released")
    del wrapped
    process_group.leave()
    assert joined == ["released", "destroyed"]


def test_an_error_that_ends_the_process_keeps_no_model(joined, monkeypatch):
    def train():
        wrapped = Wrapped()
        weakref.finalize(wrapped, joined.append, "released")
        raise RuntimeError

    try:
        train()
    except RuntimeError as error:
        monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
        lines = traceback.format_tb(error.__traceback__)
    process_group.leave()
    assert joined == ["released", "destroyed"]
    assert lines


class Store:
    """Keeps messages, or is out of reach until it is freed."""

    def __init__(self):
        self.messages, self.reachable, self.written = {}, threading.Event(), threading.Event()

    def set(self, name, message):
        assert self.reachable.wait(60)
        self.messages[name] = message
        self.written.set()

    def check(self, names):
        assert self.reachable.wait(60)
        return all(name in self.messages for name in names)


def test_announcements_reach_others_but_a_network_that_is_down_is_not_waited_for(joined, monkeypatch):
    store = Store()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(process_group, "SECONDS_FOR_AN_ANSWER", 0.1)
    start = time.monotonic()
    process_group.announce_error()
    assert not process_group.has_announced_error()
    assert time.monotonic() - start < 30
    store.reachable.set()
    assert store.written.wait(60)  # by the request that was not waited for
    monkeypatch.setattr(process_group, "SECONDS_FOR_AN_ANSWER", 60)
    store.messages.clear()
    assert not process_group.has_announced_error()
    process_group.announce_error()
    assert process_group.has_announced_error()


def test_who_does_not_come_is_not_waited_for_long(joined, monkeypatch, capsys):
    def barrier(timeout):
        raise RuntimeError(f"rank 1 has not come within {timeout.total_seconds()} s\nand more")

    monkeypatch.setattr(dist, "monitored_barrier", barrier)
    process_group.wait_for_others()
    line = capsys.readouterr().err
    assert line == "warning: another process has not reached the end (rank 1 has not come within 600.0 s and more)\n"


def test_alone_there_is_nothing_to_wait_for():
    assert not process_group.is_joined()
    process_group.wait_for_others()
    process_group.leave()
    process_group.announce_error()
    assert not process_group.has_announced_error()


@pytest.mark.slow
def test_two_processes_end():
    """A short form of the benchmark: a run and another one in the same processes, and a run that fails."""
    arguments = ["--count", "1", "--kinds", "call", "failing", "finetune"]
    done = python(ROOT / "benchmarks" / "start_and_end.py", *arguments)
    assert done.stdout.count('"ended": 1,') == 3, done.stdout
