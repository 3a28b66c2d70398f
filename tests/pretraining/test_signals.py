"""Signals to the whole process group, as launchers, schedulers and terminals send them: no finished step is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mocov3_hf import run_folder
from mocov3_hf.process_group import SECONDS_OF_ONE_REQUEST, StopRequest
from tests.fork_server import Forked, ranks
from tests.launch import search_path
from tests.pretraining.test_resume import assert_same_run


PRETRAIN = ["-m", "mocov3_hf", "pretrain"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Steps slow enough to hit; what is slowed down is named in the environment.
SLOW = """
import os, runpy, sys, time
from mocov3_hf.pretraining import checkpoint, loop, online_knn, pretrain
def slow(target, name, seconds, mark):
    original = getattr(target, name)
    def wrapper(*args, **kwargs):
        os.write(1, f"\\nMARK {mark}\\n".encode())  # one write: two processes share the pipe
        time.sleep(seconds)
        return original(*args, **kwargs)
    setattr(target, name, wrapper)
place = os.environ.get("SLOW_PLACE")
if place: slow(loop, "train_step", 0.2, "step")
if place == "start": slow(loop, "build_model", 1, place)
if place == "save": slow(checkpoint, "write_manifest", 1, place)
if place == "knn": slow(online_knn.OnlineKNN, "features", 1, place)
sys.argv[0] = "mocov3"
pretrain.main(sys.argv[1:])
"""


def launch(command, place):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), "SLOW_PLACE": place}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_to(process, mark, times=1):
    """The output up to a mark."""
    lines = []
    while times:
        line = process.stdout.readline()
        assert line, f"it ended before {mark}: {''.join(lines)}"
        lines.append(line)
        times -= line.strip().endswith(f"MARK {mark}")
    return "".join(lines)


def read_rest(process):
    """The output from there to the end. `communicate` would lose what `readline` has read ahead."""
    with process.stdout as stream:
        text = stream.read()
    process.wait(timeout=120)
    return text


def members(process_group):
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == process_group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    script = tmp_path_factory.mktemp("slow") / "slow.py"
    script.write_text(SLOW)
    return str(script)


@pytest.fixture(scope="module")
def options(tiny, labeled):
    length = ["--max_steps", "8", "--save_steps", "3", "--logging_steps", "1"]
    return [*tiny, "--dataset_name", str(labeled), *length, "--knn_steps", "4", "--knn_k", "3"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, slow, options):
    """Uninterrupted runs by number of processes."""
    runs = {}

    def run(num_processes):
        if num_processes not in runs:
            runs[num_processes] = folder = tmp_path_factory.mktemp("straight")
            ranks(num_processes, slow, *options, "--output_dir", str(folder))
        return runs[num_processes]

    return run


def newest_step(folder):
    checkpoints = run_folder.list_checkpoints(folder)
    if not checkpoints:
        return 0
    run_folder.check_manifest(checkpoints[0])
    return run_folder.step_of(checkpoints[0])


CASES = [
    # number, workers, place, times the place is reached, how often it is sent
    (signal.SIGTERM, 0, "step", 5, 1),
    (signal.SIGTERM, 1, "step", 5, 2),
    (signal.SIGTERM, 2, "step", 5, 2),
    (signal.SIGINT, 2, "step", 2, 1),
    (signal.SIGUSR1, 2, "step", 2, 2),
    (signal.SIGTERM, 2, "start", 1, 2),
    (signal.SIGTERM, 2, "save", 1, 2),
    (signal.SIGTERM, 2, "knn", 1, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers", "place", "times", "sent"), CASES)
def test_a_signal_to_the_group(tmp_path, slow, options, expected, number, workers, place, times, sent):
    arguments = [*options, "--dataloader_num_workers", str(workers), "--output_dir", str(tmp_path)]
    process = Forked([slow, *arguments], SLOW_PLACE=place)
    text = read_to(process, place, times)
    for _ in range(sent):
        time.sleep(0.1)
        os.killpg(process.pid, number)
    text += process.communicate()[0]
    assert process.returncode == 0, text
    assert members(process.pid) == []
    finished = text.count("MARK step")
    assert newest_step(tmp_path) == finished, text
    assert f"stopped by {number.name} {'before training' if finished == 0 else f'after step {finished}'}" in text
    assert "Traceback" not in text
    resumed = Forked([slow, *arguments, "--resume_from_checkpoint", "auto"])
    text = resumed.communicate()[0]
    assert resumed.returncode == 0, text
    assert_same_run(tmp_path, expected(1))
    assert (tmp_path / "knn.jsonl").read_text() == (expected(1) / "knn.jsonl").read_text()


def test_a_second_ctrl_c_stops_at_once(fresh):
    with StopRequest() as stop:
        stop.start_training()
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # a launcher and a terminal deliver the first
            os.kill(os.getpid(), number)
        assert stop.received == signal.SIGINT
        stop.received_at -= SECONDS_OF_ONE_REQUEST
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "times"), [("step", 9), ("start", 2), ("save", 1)])
def test_a_signal_to_torchrun(tmp_path, slow, options, expected, place, times):
    """torchrun forwards it to the process groups of its children. What it prints itself is its own business."""
    arguments = [*options, "--dataloader_num_workers", "1", "--output_dir", str(tmp_path)]
    process = launch([*TORCHRUN, slow, *arguments], place)
    text = read_to(process, place, times)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    text += read_rest(process)
    assert psutil.wait_procs(children, timeout=20)[1] == []
    finished = text.count("MARK step") // 2
    assert newest_step(tmp_path) == finished, text
    (step,) = re.findall(r"stopped by SIGTERM after step (\d+)", text)
    assert int(step) == finished
    assert "DataLoader worker" not in text
    ranks(2, slow, *arguments, "--resume_from_checkpoint", "auto")
    assert_same_run(tmp_path, expected(2))


def workers_of(process_id):
    """Only data-loading workers: children with the command line of their parent."""
    parent = psutil.Process(process_id)
    return [child for child in parent.children() if child.cmdline() == parent.cmdline()]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "times"), [("step", 1), ("knn", 2)])
def test_a_killed_worker_ends_the_run_in_one_line(tmp_path, slow, options, expected, place, times):
    arguments = [*options, "--dataloader_num_workers", "2", "--output_dir", str(tmp_path)]
    process = Forked([slow, *arguments], SLOW_PLACE=place)
    text = read_to(process, place, times)
    before = workers_of(process.pid)
    if place == "knn":  # the newest are those that kNN starts now
        while len(new := [worker for worker in workers_of(process.pid) if worker not in before]) < 1:
            time.sleep(0.002)
        victim = new[0]
    else:
        victim = before[0]
    victim.kill()
    text += process.communicate()[0]
    if place == "knn" and process.returncode == 0:
        pytest.skip("the worker had done its work")
    assert process.returncode == 1, text
    (line,) = [line for line in text.splitlines() if "error: " in line] or [text]
    finished = text.count("MARK step")
    assert f"a data-loading worker died (worker {victim.pid}: killed (signal 9), probably out of memory" in line
    assert f"checkpoint-{finished} is complete; to resume: " in line
    assert "Traceback" not in text
    assert newest_step(tmp_path) == finished
    resumed = Forked([slow, *arguments, "--resume_from_checkpoint", "auto"])
    text = resumed.communicate()[0]
    assert resumed.returncode == 0, text
    assert_same_run(tmp_path, expected(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number", "cause"),
    [
        (0, signal.SIGKILL, "killed (signal 9)"),
        (1, signal.SIGSEGV, "segmentation fault (signal 11)"),
    ],
)
def test_a_killed_worker_of_one_of_two_processes(tmp_path, slow, options, expected, rank, number, cause):
    """
    The others are in a step that it must finish; or, if the images themselves may have killed the worker, it saves and
    ends all.
    """
    arguments = [*options, "--dataloader_num_workers", "1", "--output_dir", str(tmp_path)]
    process = launch([*TORCHRUN, slow, *arguments], "step")
    text = read_to(process, "step", 4)
    (rank_process,) = [
        child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(rank)
    ]
    (worker,) = workers_of(rank_process.pid)
    worker.send_signal(number)
    text += read_rest(process)
    assert process.returncode == 1, text
    (line,) = [line for line in text.splitlines() if "error: a" in line] or [text]
    assert f"a data-loading worker died (worker {worker.pid}: {cause}" in line
    assert "another process is gone" not in text
    finished = text.count("MARK step") // 2
    assert newest_step(tmp_path) == finished, text
    ranks(2, slow, *arguments, "--resume_from_checkpoint", "auto")
    assert_same_run(tmp_path, expected(2))
    shutil.rmtree(tmp_path)
