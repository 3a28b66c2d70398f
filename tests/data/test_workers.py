"""Workers outlive signals that are not meant for them, and never their parent."""

import contextlib
import errno
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mocov3_hf.data import workers as workers_module
from mocov3_hf.data.workers import STOP_SIGNALS, LostWorkerError, end_workers, ignore_stop_signals, iterate
from tests.data.test_loader import load, map_source, same
from tests.launch import search_path


class Numbers(Dataset):
    """Their squares; slow ones never come."""

    def __init__(self, length, slow=()):
        self.length, self.slow = length, slow

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.slow:
            time.sleep(1000)
        return index * index


def workers():
    found = []
    for child in multiprocessing.active_children():
        with contextlib.suppress(psutil.NoSuchProcess):  # that of an earlier test, which is just ending
            found.append(psutil.Process(child.pid))
    return found


@pytest.mark.parametrize("context", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_signals_to_workers_are_ignored(context):
    batches = iterate(DataLoader(Numbers(40), batch_size=None, num_workers=2, multiprocessing_context=context))
    found = [int(next(batches))]
    for number in STOP_SIGNALS * 2:
        for worker in workers():
            worker.send_signal(number)
        found.append(int(next(batches)))
    assert found + [int(value) for value in batches] == [number * number for number in range(40)]


@pytest.fixture
def stuck(monkeypatch, tmp_path):
    """Let the given number of workers hang before their first call, in a process that has not started any before."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    start_worker = workers_module.start_worker

    def hang(number):
        def start_or_hang(index):
            for attempt in range(number):
                with contextlib.suppress(FileExistsError):
                    (tmp_path / str(attempt)).mkdir()
                    time.sleep(1000)
            start_worker(index)

        monkeypatch.setattr(workers_module, "start_worker", start_or_hang)
        monkeypatch.setattr(workers_module, "SECONDS_TO_START", (0.2, 0.2, 60))

    return hang


@pytest.mark.slow
@pytest.mark.parametrize("is_of_another_library", [False, True])
def test_workers_that_never_start_are_started_again(stuck, capsys, is_of_another_library):
    stuck(2)
    loader = DataLoader(Numbers(4), batch_size=None, num_workers=1, persistent_workers=True)
    if is_of_another_library:
        ignore_stop_signals(loader)
    torch.manual_seed(0)
    found = [int(value) for value in (loader if is_of_another_library else iterate(loader))]
    assert found == [0, 1, 4, 9]
    drawn = torch.rand(1)
    torch.manual_seed(0)
    list(DataLoader(Numbers(1), batch_size=None))
    assert torch.equal(drawn, torch.rand(1))  # one attempt or three: the same random numbers follow
    assert capsys.readouterr().err.count("has not started within 0.2 s: all are started again") == 2
    (worker,) = workers()  # no others
    assert [int(value) for value in iterate(loader)] == [0, 1, 4, 9]
    assert workers() == [worker]
    end_workers([loader._iterator])


def test_no_batch_is_lost_when_workers_are_started_again(stuck):
    """The first workers have been given requests that they never answer."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    source = map_source([buffer.getvalue()] * 60)
    stuck(1)
    assert same(load(source, num_workers=1), load(source))


def test_workers_that_never_start_end_the_run_in_one_line(stuck, monkeypatch):
    stuck(1)
    monkeypatch.setattr(workers_module, "SECONDS_TO_START", (0.2,))
    before = workers()  # of loaders that are not collected yet
    # An error as that of a lost worker: finished steps are saved, and other processes learn of it.
    with pytest.raises(LostWorkerError, match="the data-loading workers do not start: use --") as error:
        list(iterate(DataLoader(Numbers(4), batch_size=None, num_workers=1)))
    assert error.value.from_any_process
    assert not error.value.is_contagious
    assert set(workers()) <= set(before)


@pytest.mark.slow
def test_a_worker_killed_while_it_starts_is_a_lost_worker(stuck, monkeypatch):
    """Not an error of torch's own handler, wherever its parent is."""
    stuck(0)
    have_started, handlers = workers_module.have_started, []

    def note_handler(*arguments):
        handlers.append(signal.getsignal(signal.SIGCHLD))
        return have_started(*arguments)

    monkeypatch.setattr(workers_module, "SECONDS_TO_START", (60,))
    monkeypatch.setattr(workers_module, "have_started", note_handler)

    def die(_index):
        time.sleep(0.5)  # until the parent waits for this worker
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers_module, "start_worker", die)
    with pytest.raises(LostWorkerError, match=r"a data-loading worker died \(worker \d+: killed \(signal 9\)"):
        list(iterate(DataLoader(Numbers(4), batch_size=None, num_workers=1)))
    assert handlers == [signal.SIG_DFL]


def test_signals_while_workers_start_are_ignored_too():
    """A worker that has not yet run any code of its own holds them."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    others = [str(child.pid) for child in psutil.Process().children()]  # such as the process of fork_server.py
    killer = subprocess.Popen([sys.executable, "-S", "-c", KILLER, str(os.getpid()), *others])
    try:
        for _ in range(5):
            loader = DataLoader(Numbers(4), batch_size=None, num_workers=2)
            assert [int(value) for value in iterate(loader)] == [0, 1, 4, 9]
    finally:
        killer.kill()
        killer.wait()
        signal.signal(signal.SIGTERM, before)
    assert received or not os.path.exists("/proc/self/task")


KILLER = """
import glob, os, signal, sys, time
while True:
    for file in glob.glob(f"/proc/{sys.argv[1]}/task/*/children"):
        for child in open(file).read().split():
            if int(child) != os.getpid() and child not in sys.argv[2:]:
                os.kill(int(child), signal.SIGTERM)
                os.kill(int(sys.argv[1]), signal.SIGTERM)
    time.sleep(0.002)
"""


@pytest.mark.slow
def test_stuck_workers_end_with_their_loader():
    batches = iterate(DataLoader(Numbers(8, slow=(5, 6)), batch_size=None, num_workers=2, prefetch_factor=4))
    assert int(next(batches)) == 0
    stuck = multiprocessing.active_children()  # psutil would take the end of a child from multiprocessing
    assert len(stuck) == 2
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 30
    for worker in stuck:
        worker.join(timeout=10)
    assert not any(worker.is_alive() for worker in stuck)


PARENT = """
import sys
from torch.utils.data import DataLoader
from mocov3_hf.data.workers import iterate
from tests.data.test_workers import Numbers
import psutil
options = {"num_workers": 2, "prefetch_factor": 4, "persistent_workers": True}
loader = DataLoader(Numbers(8, slow=(5, 6)), batch_size=None, **options)
batches = iterate(loader)
next(batches)
print(*[child.pid for child in psutil.Process().children()], flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_worker_survives_its_parent(end):
    """Workers that are stuck in an image: multiprocessing waits for them at exit, and a killed parent cannot."""
    environment = {**os.environ, "PYTHONPATH": search_path()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, text=True, **pipes)
    stuck = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
    assert len(stuck) == 2
    if end == "kill":
        parent.kill()
    parent.communicate("\n", timeout=60)
    assert parent.returncode == (-9 if end == "kill" else 0)
    assert psutil.wait_procs(stuck, timeout=10)[1] == []


@pytest.mark.slow
def test_a_lost_worker_is_an_error_of_the_next_batch_only():
    """torch's own handler raises wherever the program is, for example between the updates of two parameters."""
    batches = iterate(DataLoader(Numbers(1000), batch_size=None, num_workers=1, prefetch_factor=2))
    next(batches)
    (worker,) = workers()
    worker.kill()
    for _ in range(20):
        time.sleep(0.05)
    with pytest.raises(LostWorkerError, match=rf"worker {worker.pid}: killed \(signal 9\)"):
        for _ in batches:
            pass


class Leaving(Dataset):
    """A worker that is killed, and whose end takes a while after its files are closed, as on a busy machine."""

    def __getitem__(self, index):
        os.closerange(3, 1000)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    def __len__(self):
        return 4


def test_the_end_of_the_connection_to_a_killed_worker_names_the_worker(monkeypatch):
    def wait_for_end(batches):
        multiprocessing.connection.wait([worker.sentinel for worker in batches._workers])
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", wait_for_end)
    with pytest.raises(LostWorkerError, match=r"worker died \(worker \d+: killed \(signal 9\)"):
        list(iterate(DataLoader(Leaving(), batch_size=None, num_workers=1)))
