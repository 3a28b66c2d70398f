"""Data-loading workers that a signal to the whole process group does not end, and that end with their parent."""

import contextlib
import gc
import multiprocessing.connection
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from typing import BinaryIO

import torch
from torch.utils.data import DataLoader

from ..precision import this_device
from ..process_group import STOP_SIGNALS
from ..reporting import RunError, warn


SECONDS_BETWEEN_CHECKS = 0.5
SECONDS_TO_START = (10, 20, 40, 80)  # of the first and of further attempts: a machine can be busy
CAUSES = {
    -9: "killed (signal 9), probably out of memory: use fewer workers or a smaller batch",
    -7: "bus error (signal 7), probably a full /dev/shm: give the container more shared memory",
    -11: "segmentation fault (signal 11) in a decoder: find the image with --dataloader_num_workers 0",
}
# Where forked workers report their start.
started_pipe: int | None = None
# Exit codes after which the process itself must not decode the same images.
CONTAGIOUS = (-7, -11)


class LostWorkerError(RunError):
    """
    A data-loading worker died, or the workers never start.

    Args:
        exit_codes: By process id; empty if the workers never start.
    """

    def __init__(self, exit_codes: dict[int, int]):
        causes = "; ".join(
            f"worker {process_id}: {CAUSES.get(code, f'exit code {code}')}" for process_id, code in exit_codes.items()
        )
        never_started = "the data-loading workers do not start: use --dataloader_num_workers 0"
        what = f"a data-loading worker died ({causes})" if exit_codes else never_started
        super().__init__(what, from_any_process=True)
        self.is_contagious = any(code in CONTAGIOUS for code in exit_codes.values())


def cores_of_process(num_processes: int = 1) -> int:
    """
    The CPU cores that this process may use: its share, at least 1.

    Args:
        num_processes: On this machine, if the launcher does not say (`LOCAL_WORLD_SIZE`).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)))


def default_workers(num_processes: int = 1) -> int:
    """
    Data-loading workers of a process if `--dataloader_num_workers` is not given, in every command: a quarter of its
    cores, on which the model computes as well; beside an accelerator all but one.
    """
    cores = cores_of_process(num_processes)
    return cores // 4 if this_device().type == "cpu" else cores - 1


@contextlib.contextmanager
def cores_shared_with(num_workers: int, num_processes: int = 1) -> Iterator[None]:
    """
    Limit torch's threads to the cores of this process that its data-loading workers leave, at least 1.

    `OMP_NUM_THREADS` decides instead, unless `accelerate launch` has set it, which it always does.
    """
    before, launched = torch.get_num_threads(), "ACCELERATE_MIXED_PRECISION" in os.environ
    if "OMP_NUM_THREADS" in os.environ and not launched:
        yield
        return
    threads = max(1, cores_of_process(num_processes) - num_workers)
    torch.set_num_threads(min(threads, before) if launched else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def iterate(loader: DataLoader) -> Iterator:
    """
    The batches of a data loader. Its workers ignore `STOP_SIGNALS`: the parent alone decides when they end.

    Raises:
        LostWorkerError: a worker died, or they never start. Raised here, never in the middle of something else.
    """
    if loader.num_workers == 0:
        yield from loader
        return
    loader.worker_init_fn = start_worker
    workers = []
    try:
        batches = iter(loader) if loader._iterator is not None else start_workers(loader)
        workers = batches._workers
        yield from batches
    except Exception as error:
        if loader._iterator is not None:  # that of an earlier epoch, whose workers are used again
            workers = loader._iterator._workers
        if isinstance(error, OSError | EOFError):  # it died while it sent a batch, perhaps a moment ago
            ending = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
            for worker in workers:
                if worker.sentinel in ending:
                    worker.join(timeout=5)  # it has closed its files, but may not have an exit code yet
        dead = {worker.pid: worker.exitcode for worker in workers if not worker.is_alive() and worker.exitcode != 0}
        if not dead:
            raise
        loader._iterator = None
        raise LostWorkerError(dead) from error


def start_workers(loader: DataLoader) -> Iterator:
    with stop_signals_held():
        if not are_forked(loader):
            resource_tracker.ensure_running()
            hold_stop_signals()  # which it has released
        return until_started(loader, lambda: iter(loader))


def are_forked(loader: DataLoader) -> bool:
    context = loader.multiprocessing_context or multiprocessing.get_context()
    return context.get_start_method() == "fork"


def until_started(loader: DataLoader, start: Callable[[], Iterator]) -> Iterator:
    """
    Start workers, and start them again if one of them never comes to `start_worker`. Before Python 3.12, a process can
    be forked at the moment in which a thread of a library (that of gloo after a collective) enters the interpreter;
    it then waits for a lock that nobody holds.

    Raises:
        LostWorkerError: they never start.
    """
    global started_pipe
    if loader.num_workers == 0 or not are_forked(loader):
        return take_over(start())
    generator = loader.generator or torch.default_generator
    state = generator.get_state()
    for seconds in SECONDS_TO_START:
        reader, started_pipe = os.pipe()
        with open(reader, "rb", buffering=0) as pipe:
            try:
                batches = take_over(start())
            finally:
                os.close(started_pipe)
                started_pipe = None
            if have_started(pipe, batches._workers, seconds):
                return batches
            warn(f"a data-loading worker has not started within {seconds} s: all are started again")
            for worker in batches._workers:
                worker.kill()
            batches._shutdown_workers()
        loader._iterator = None
        generator.set_state(state)
    raise LostWorkerError({})


def have_started(pipe: BinaryIO, workers: Sequence[BaseProcess], seconds: float) -> bool:
    """Whether each of the workers writes a byte in this time. True as well if one dies: `iterate` says why."""
    number, end = 0, time.monotonic() + seconds
    while number < len(workers) and all(worker.is_alive() for worker in workers):
        if time.monotonic() > end:
            return False
        if multiprocessing.connection.wait([pipe], timeout=min(1, seconds)):
            started = pipe.read(len(workers))
            if not started:  # all have closed it
                return True
            number += len(started)
    return True


def take_over(batches: Iterator) -> Iterator:
    """
    End workers, and learn of their ends, in our way. torch and multiprocessing end a worker that does not respond with
    SIGTERM, which workers ignore. And torch installs a handler of SIGCHLD with the first workers, which raises an
    error wherever the program is when a worker dies, for example between the updates of two parameters. Without it,
    the error comes when the next batch is asked for.
    """
    for worker in getattr(batches, "_workers", ()):
        worker._popen.terminate = worker._popen.kill
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGCHLD)
        if (getattr(handler, "__module__", None) or "").startswith("torch.utils.data"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def hold_stop_signals() -> set[signal.Signals]:
    """Block them in this thread and in what it starts. Returns what was blocked before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if hasattr(signal, "pthread_sigmask") else set()


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Deliver signals only after the block. Processes that start in it hold them until `start_worker`."""
    held = hold_stop_signals()
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def start_worker(_index: int) -> None:
    """First call in a worker."""
    if started_pipe is not None:
        os.write(started_pipe, b".")
        os.close(started_pipe)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=end_with_parent, daemon=True).start()
    # A forked worker holds copies of its parent's objects. Collecting them, for example another loader, would affect
    # processes of the parent.
    gc.freeze()
    torch.set_num_threads(1)


def ignore_stop_signals(loader: DataLoader) -> weakref.WeakSet:
    """
    The same for the workers of a loader that another library iterates over; they also end with their parent.

    Returns:
        The iterators that will be started and still exist, for `end_workers`.
    """
    loader.worker_init_fn = partial(_start_worker_after, loader.worker_init_fn)
    start, started = loader._get_iterator, weakref.WeakSet()

    def start_and_remember() -> Iterator:
        batches = until_started(loader, start)
        started.add(batches)
        return batches

    loader._get_iterator = start_and_remember
    return started


def end_workers(started: Iterable[Iterator]) -> None:
    """
    End the workers of iterators now. After an error, an iterator is part of a reference cycle with the traceback; when
    that is collected, torch can no longer ask its workers to end, and waits for each of them.
    """
    for batches in list(started):
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def _start_worker_after(given: Callable[[int], None] | None, index: int) -> None:
    if given is not None:
        given(index)
    start_worker(index)


def end_with_parent() -> None:
    """Wait until the parent is gone, even if it was killed, and end this process."""
    parent = parent_process()
    is_child = os.getppid() == parent.pid  # not with the start method forkserver
    while os.getppid() == parent.pid if is_child else parent.is_alive():
        time.sleep(SECONDS_BETWEEN_CHECKS)
    os._exit(1)
