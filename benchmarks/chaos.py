"""Do bad things to pre-training runs, resume them, and compare the result with uninterrupted runs.

    python -m benchmarks.chaos --faults 200 --output benchmarks/results/chaos_cpu.json

Runs of five kinds (processes, data, precision, optimizer) are killed, signalled, deprived of a worker or a process,
refused file operations, given a full disk or flipped bits, or started twice in one folder, at random moments. Each run
is then resumed to its end. The final weights must be bit-identical to those of an uninterrupted run and nothing may be
lost. Prints one line per fault; writes a JSON report and a Markdown table beside it. Exits with 1 if a promise was
broken. A full disk needs the right to mount a file system; without it, that fault is left out and the report says so.
"""

import argparse
import contextlib
import errno
import functools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import transformers.modeling_utils

from mocov3_hf.pretraining import checkpoint, loop
from mocov3_hf.results import hardware, package_versions
from mocov3_hf.run_folder import list_checkpoints
from mocov3_hf.storage import read_lines, write_json, write_text

from .chaos_runs import KINDS, Launch, Trial, reference_run, summary, table, write_shards


# Weights of the faults. Besides them, 11 of 20 faults are failing file operations, up to each one of a save once.
WEIGHTS = {
    "SIGKILL to all processes": 24,
    "SIGTERM to the process group": 9,
    "SIGINT to the process group": 5,
    "SIGUSR1 to the process group": 5,
    "SIGKILL to a data-loading worker": 9,
    "SIGKILL to one of two processes": 9,
    "two launches in one folder": 9,
    "full disk": 10,
    "flipped bit in a checkpoint": 12,
    "flipped bit in another file": 5,
}
OPERATION = "failing file operation in a save"
# Audit events of file operations. rmtree raises its own before it ignores errors.
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir", "os.link")
BOOKKEEPING = ("metrics.jsonl", "knn.jsonl", "recipe.yaml", "model.safetensors", "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=200, help="total number, divided among the faults and kinds")
    parser.add_argument("--steps", type=int, default=30, help="steps of every run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments and places")
    parser.add_argument("--only", help="do only the faults whose name contains this")
    parser.add_argument("--output", type=Path, help="JSON file to write; the table is written beside it as .md")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos_") as folder:
        trials, left_out = do_all(options, Path(folder))
    broken = [trial for trial in trials if trial["problems"]]
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.chaos", *sys.argv[1:]]),
        "faults": len(trials),
        "lost": len(broken),
        "left_out": left_out,
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(sum(os.times()[:4])),
        "table": list(summary(trials)),
        "broken": broken,
        "versions": package_versions(),
        "hardware": hardware(),
    }
    print(table(report))
    if options.output is not None:
        write_json(options.output, report)
        write_text(options.output.with_suffix(".md"), table(report))
    sys.exit(1 if broken else 0)


def do_all(options: argparse.Namespace, folder: Path) -> tuple[list[dict], list[str]]:
    """All faults, one after the other, and the names of those that cannot be done on this machine."""
    draw, trials = random.Random(options.seed), []
    data = write_shards(folder / "data")
    references = {
        kind: reference_run(folder / f"reference {index}", kind, data, options.steps)
        for index, kind in enumerate(KINDS)
    }
    plan, left_out = make_plan(options.faults, folder, data, options.steps)
    for number, (fault, action) in enumerate(plan):
        if options.only and options.only not in fault:
            continue
        kinds = [kind for kind in KINDS if KINDS[kind][0] == 2 or fault != "SIGKILL to one of two processes"]
        kind = kinds[number % len(kinds)]
        trial = Trial(folder / "trial", kind, data, options.steps, references[kind])
        try:
            outcome = action(trial, draw)
        except TimeoutError as error:
            outcome = "hangs"
            trial.problems.append(str(error))
        trials.append({"fault": fault, "kind": kind, "outcome": outcome, "problems": trial.problems})
        words = "kept" if not trial.problems else f"BROKEN: {trial.problems}"
        print(f"{number + 1}/{len(plan)} {fault}; {kind}; {outcome}: {words}", flush=True)
        shutil.rmtree(folder / "trial")
    return trials, left_out


def make_plan(faults: int, folder: Path, data: Path, steps: int) -> tuple[list[tuple[str, Callable]], list[str]]:
    """The faults in order, and the names of those that cannot be done on this machine."""
    actions = {
        "SIGKILL to all processes": kill_all,
        "SIGTERM to the process group": lambda trial, draw: stop(trial, draw, signal.SIGTERM),
        "SIGINT to the process group": lambda trial, draw: stop(trial, draw, signal.SIGINT),
        "SIGUSR1 to the process group": lambda trial, draw: stop(trial, draw, signal.SIGUSR1),
        "SIGKILL to a data-loading worker": kill_worker,
        "SIGKILL to one of two processes": kill_rank,
        "two launches in one folder": start_twice,
        "full disk": fill_disk,
        "flipped bit in a checkpoint": lambda trial, draw: flip_bit(trial, draw, in_checkpoint=True),
        "flipped bit in another file": lambda trial, draw: flip_bit(trial, draw, in_checkpoint=False),
    }
    left_out = [] if can_mount(folder / "mounted") else ["full disk"]
    num_operations = count_operations(folder / "count", data, steps)
    num_failing = min(num_operations, max(1, 11 * faults // 20))
    weights = {fault: weight for fault, weight in WEIGHTS.items() if fault not in left_out}
    plan = []
    for fault, weight in weights.items():
        number = max(1, round(weight * (faults - num_failing) / sum(weights.values())))
        plan += [(fault, actions[fault])] * number
    for place in sorted({round(index * num_operations / num_failing) for index in range(num_failing)}):
        choice = "stop" if place % 2 else "continue"
        plan.append((OPERATION, functools.partial(fail_operation, place=place, choice=choice)))
    return plan, left_out


def kill_all(trial: Trial, draw: random.Random) -> str:
    launch = trial.start()
    before = trial.wait_for_moment(launch, draw)
    launch.kill()
    is_in_save = any(trial.folder.glob(".*.incomplete")) or any(trial.folder.glob(".*.deleted"))
    trial.expect_nothing_lost(before)
    trial.finish()
    return "killed in a save" if is_in_save else "killed"


def stop(trial: Trial, draw: random.Random, number: signal.Signals) -> str:
    launch = trial.start()
    while "settings for" not in launch.text() and launch.is_running():
        time.sleep(0.01)  # before it handles signals, it ends like any program
    before = trial.wait_for_moment(launch, draw)
    launch.signal(number)
    trial.expect_end(launch, {0}, errors=0)
    stopped = [line for line in launch.text().splitlines() if line.startswith(f"stopped by {number.name}")]
    is_late = len(read_lines(trial.folder / "metrics.jsonl")[0]) == len(read_lines_of_reference(trial))
    trial.expect(len(stopped) == 1 or is_late, f"no line about {number.name}")
    trial.expect_nothing_lost(int(stopped[0].split()[5].rstrip(";")) if "after step" in "".join(stopped) else before)
    trial.finish()
    return "saved and exited with 0"


def read_lines_of_reference(trial: Trial) -> list[dict]:
    return read_lines(trial.reference.folder / "metrics.jsonl")[0]


def kill_worker(trial: Trial, draw: random.Random) -> str:
    launch = trial.start()
    while not launch.members() and launch.is_running():
        time.sleep(0.05)
    before, workers = trial.wait_for_moment(launch, draw), launch.members()
    if workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            draw.choice(workers).kill()
    codes = trial.expect_end(launch, {0, 1})
    if 1 in codes:
        text = launch.text()
        trial.expect("a data-loading worker died (worker " in text, f"no line about the worker: {text[-1000:]}")
    trial.expect_nothing_lost(before)
    trial.finish()
    return "saved and ended in one line" if 1 in codes else "the worker was done"


def kill_rank(trial: Trial, draw: random.Random) -> str:
    launch = trial.start()
    before = trial.wait_for_moment(launch, draw)
    with contextlib.suppress(ProcessLookupError):
        os.kill(draw.choice(launch.ranks), signal.SIGKILL)
    codes = trial.expect_end(launch, {0, 1, -signal.SIGKILL, -signal.SIGALRM})
    trial.expect_nothing_lost(before)
    trial.finish()
    return "the other ended in one line" if 1 in codes else "the other was done"


def start_twice(trial: Trial, draw: random.Random) -> str:
    first = trial.start()
    trial.wait_for_moment(first, draw, at_start=0.5)
    second = trial.start()
    codes = [trial.expect_end(launch, {0, 2}) for launch in (first, second)]
    refused = [set(found) == {2} for found in codes]
    trial.expect(sum(refused) <= 1, f"both were refused: {codes}")
    if any(refused):
        trial.expect(first.text().count("is in use by a run on") == 1, "no line about the other run")
    trial.finish()
    return "the second was refused" if any(refused) else "the first had ended"


def can_mount(folder: Path) -> bool:
    folder.mkdir()
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount(folder, 1 << 20), capture_output=True, check=False).returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)
            return True
    return False


def mount(folder: Path, size: int) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]


def fill_disk(trial: Trial, draw: random.Random) -> str:
    """Full for a while or to the end, with `--on_save_error continue` or `stop`."""
    size = sum(path.stat().st_size for path in trial.reference.folder.rglob("*") if path.is_file())
    trial.folder = trial.folder.parent / "disk" / "run"
    disk = trial.folder.parent
    disk.mkdir()
    subprocess.run(mount(disk, 2 * size + (1 << 18)), check=True)
    choice, ends = draw.choice(["continue", "stop"]), draw.random() < 0.7
    try:
        launch = trial.start("--on_save_error", choice)
        before = trial.wait_for_moment(launch, draw, at_start=0)
        with open(disk / "ballast", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 64):
                pass
        if ends:
            time.sleep(draw.uniform(0, 0.3 * trial.reference.seconds))
            (disk / "ballast").unlink()
        codes = trial.expect_end(launch, {0, 1})
        (disk / "ballast").unlink(missing_ok=True)
        trial.expect_nothing_lost(before)
        trial.finish()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    return f"{choice}: {'ended in one line' if 1 in codes else 'went on to its end'}"


def flip_bit(trial: Trial, draw: random.Random, in_checkpoint: bool) -> str:
    launch = trial.start()
    while len(list_checkpoints(trial.folder)) < 2 and launch.is_running():
        time.sleep(0.005)
    trial.wait_for_moment(launch, draw, at_start=0)
    launch.kill()
    if not list_checkpoints(trial.folder):
        trial.problems.append(f"it ended before its first checkpoint: {launch.text()[-500:]}")
        return "no checkpoint"
    newest = list_checkpoints(trial.folder)[0]
    folder = newest if in_checkpoint else trial.folder
    names = [path.name for path in sorted(newest.iterdir())] if in_checkpoint else BOOKKEEPING
    file = draw.choice([folder / name for name in names if (folder / name).exists()])
    content = bytearray(file.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.unlink()
    file.write_bytes(content)
    # A flipped digit of a metric cannot be noticed.
    text = trial.finish(compare_lines=file.suffix != ".jsonl").text()
    if in_checkpoint:
        trial.expect(f"{newest} is " in text and "using an older one" in text, f"{file.name}: accepted in silence")
    return "an older checkpoint was used" if in_checkpoint else "went on"


def inject(place: int | None, folder: Path) -> Callable[[], None]:
    """
    To call in a new process: fails operation `place` of the third save, the first that deletes a checkpoint, or prints
    how many operations it has if `place` is None.
    """

    def before() -> None:
        state = {"saves": 0, "count": 0, "armed": False}

        def operation(what: str) -> None:
            if state["armed"]:
                state["count"] += 1
                if state["count"] - 1 == place:
                    print(f"OPERATION {place}: {what}")
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def watched(module, name: str) -> None:
            original = getattr(module, name)

            def function(*arguments, **keywords):
                operation(name)
                return original(*arguments, **keywords)

            setattr(module, name, function)

        def hook(event: str, arguments: tuple) -> None:
            if state["armed"] and event in EVENTS and str(arguments[0]).startswith(str(folder)):
                operation(f"{event} {arguments[0]}")

        write = loop.Run.write

        def save(run, run_state):
            state["saves"] += 1
            state["armed"] = state["saves"] == 3
            try:
                return write(run, run_state)
            finally:
                if state["armed"] and place is None:
                    print(f"OPERATIONS {state['count']}", flush=True)
                state["armed"] = False

        loop.Run.write = save
        watched(os, "fsync")
        watched(checkpoint, "save_file")
        watched(transformers.modeling_utils, "safe_save_file")
        sys.addaudithook(hook)

    return before


def count_operations(folder: Path, data: Path, steps: int) -> int:
    trial = Trial(folder, next(iter(KINDS)), data, steps)
    launch: Launch = trial.start(before=inject(None, trial.folder))
    trial.expect_end(launch, {0})
    return int(launch.text().split("OPERATIONS ")[1].split()[0])


def fail_operation(trial: Trial, _draw: random.Random | None = None, *, place: int, choice: str) -> str:
    launch = trial.start("--on_save_error", choice, before=inject(place, trial.folder))
    codes = trial.expect_end(launch, {0, 1})
    trial.expect("OPERATION " in launch.text(), "the operation did not take place")
    trial.expect(choice == "stop" or set(codes) == {0}, f"ended although --on_save_error is {choice}")
    trial.expect_nothing_lost(6)
    trial.finish()
    return f"{choice}: {'ended in one line' if 1 in codes else 'went on'}"


if __name__ == "__main__":
    print(json.dumps({"threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None}))
    main()
