"""Isolation of the tests: from the user's caches, and from each other where they run side by side."""

import os
import signal
import tempfile

import pytest


# Before any library is imported: they read these once.
CACHE = tempfile.TemporaryDirectory(prefix="mocov3_hf_tests_")
os.environ["HF_HOME"] = CACHE.name
# Test processes share the cores; more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that runs the tests in the background lets them and their processes ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
SIGNALS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}


@pytest.fixture(autouse=True)
def signals_as_at_the_start():
    """
    A command ignores some signals from its end on, and processes that a test starts would inherit that. Fixtures of a
    module or session run commands before this one.
    """
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)
    yield
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def first_backward():
    """
    Before any fake tensor, with which torch counts a device that is not there: a first backward pass after one starts
    a thread for it, and then no copy of this process can run backward (chaos_runs.py makes some).
    """
    import torch

    torch.zeros(1, requires_grad=True).sum().backward()


def pytest_collection_modifyitems(items):
    """Files with slow tests first, the last file of all before the others: the processes then end with short tests."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    places = {item.path: place for place, item in enumerate(items)}
    items.sort(key=lambda item: -places[item.path] if item.path in slow else 1)
