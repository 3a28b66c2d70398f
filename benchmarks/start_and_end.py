"""
Start runs of two processes again and again, and check that every process ends: exit code 0, soon after the last save.

    python benchmarks/start_and_end.py --count 200 --output benchmarks/results/start_and_end_cpu.json

The packages are imported once. Every process is then forked from there, joins the other over gloo, does its work, and
ends as any Python program does, at the end of the main module and with the destructors of all objects. (Those of
`notebook_launcher` are ended by multiprocessing.) A kind whose processes must report an error has exit code 1.
"""

import argparse
import contextlib
import faulthandler
import gc
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image


# A process hangs if it takes next to no CPU time for so long: on a busy machine it can be slow. Its stack is printed.
SECONDS_WITHOUT_WORK = 60
CPU_SECONDS_OF_WORK = 0.05
SECONDS_AFTER_SAVE = 10
MODULES = (
    "mocov3_hf.pretraining.pretrain",
    "mocov3_hf.evaluation.knn",
    "mocov3_hf.evaluation.finetune",
    "accelerate.launchers",
    "torch.distributed.launcher.api",
)
BACKBONE = {
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SIZES = {"backbone_config": BACKBONE, "head_hidden_size": 16, "projection_dim": 8, "train_batch_size": 8}
LENGTH = {"max_steps": 2, "logging_steps": 1, "dataloader_num_workers": 1}


def pretrain(model: Path, data: Path, output_dir: Path, **options) -> None:
    import mocov3_hf

    images = data / "train"
    mocov3_hf.pretrain(images, recipe="quickstart", output_dir=output_dir, **{**SIZES, **LENGTH, **options})


def command(model: Path, data: Path, output_dir: Path) -> None:
    """mocov3 pretrain"""
    import mocov3_cli

    arguments = ["pretrain", "--recipe", "quickstart", "--dataset_name", str(data / "train")]
    for name, value in {**SIZES, **LENGTH, "output_dir": output_dir}.items():
        arguments += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    mocov3_cli.main(arguments)


def call(model: Path, data: Path, output_dir: Path) -> None:
    """mocov3_hf.pretrain() twice in one script"""
    pretrain(model, data, output_dir)
    pretrain(model, data, output_dir / "again")


def knn(model: Path, data: Path, output_dir: Path) -> None:
    """mocov3 knn"""
    import mocov3_cli

    where = ["--model", str(model), "--dataset_name", str(data), "--output_dir", str(output_dir)]
    mocov3_cli.main(["knn", *where, "--k", "3", "--dataloader_num_workers", "1"])


def finetune(model: Path, data: Path, output_dir: Path) -> None:
    """mocov3 finetune"""
    import mocov3_cli

    where = ["--model", str(model), "--dataset_name", str(data), "--output_dir", str(output_dir)]
    length = ["--num_train_epochs", "1", "--warmup_epochs", "0", "--min_learning_rate", "0", "--train_batch_size", "8"]
    mocov3_cli.main(["finetune", *where, *length, "--dataloader_num_workers", "1"])


def failing(model: Path, data: Path, output_dir: Path) -> None:
    """mocov3 pretrain that cannot write its last checkpoint"""
    from mocov3_hf.pretraining import loop

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    loop.save_checkpoint = full
    command(model, data, output_dir)


def notebook_launcher(model: Path, data: Path, output_dir: Path) -> None:
    """mocov3_hf.pretrain() in accelerate.notebook_launcher"""
    from accelerate import notebook_launcher

    notebook_launcher(pretrain, (model, data, output_dir), num_processes=2, use_port=str(free_port()))


KINDS = {function.__name__: function for function in (command, call, knn, finetune, failing, notebook_launcher)}


def main() -> int:
    """The exit code: in the parent 1 if a process did not end well; in a forked process that of its work."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to start")
    parser.add_argument("--count", type=int, default=200, help="starts of every kind")
    parser.add_argument("--output", type=Path, help="add the results to this file")
    options = parser.parse_args()
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # what is imported stays shared with the forked processes
    folder = Path(tempfile.mkdtemp(prefix="start_and_end_"))
    data = write_images(folder / "data")
    process_ids = fork([{}], folder / "model.log")
    if process_ids is None:
        command(None, data, folder / "model")
        return 0
    if not wait(process_ids, folder / "model")["ended"]:
        print((folder / "model.log").read_text())
        return 1
    ends, results = {kind: [] for kind in options.kinds}, {}
    for index, kind in itertools.product(range(options.count), options.kinds):
        output_dir, log = folder / f"{kind}{index}", folder / f"{kind}{index}.log"
        process_ids = fork(launched(kind), log)
        if process_ids is None:
            KINDS[kind](folder / "model", data, output_dir)
            return 0
        end = wait(process_ids, output_dir, code=int(kind == "failing"))
        print(f"{kind} {index}: {end}", flush=True)
        if not end["ended"]:
            print(log.read_text()[-6000:], flush=True)
        shutil.rmtree(output_dir, ignore_errors=True)
        ends[kind].append(end)
        results[kind] = summarize(kind, ends[kind])
        if options.output is not None:  # after each, so that it can be stopped at any time
            record(results, options.output)
    shutil.rmtree(folder)
    print(json.dumps(results, indent=1))
    return int(any(result["ended"] < result["starts"] for result in results.values()))


def launched(kind: str) -> list[dict[str, str]]:
    """The environment of every process to start, as torchrun sets it; a notebook is one process."""
    if kind == "notebook_launcher":
        return [{}]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def fork(environments: list[dict[str, str]], log: Path) -> list[int] | None:
    """Start a process for each environment and return their ids; None in the new process."""
    process_ids = []
    sys.stdout.flush()
    for environment in environments:
        process_id = os.fork()
        if process_id == 0:
            os.environ.update(environment)
            file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.setpgid(0, 0)
            faulthandler.register(signal.SIGUSR2)
            return None
        process_ids.append(process_id)
    return process_ids


def wait(process_ids: list[int], output_dir: Path, code: int = 0) -> dict:
    """Wait until some processes have ended or hang. They ended well if all have this exit code."""
    codes, running = [], list(process_ids)
    worked, worked_at = 0.0, time.time()
    while running and time.time() - worked_at < SECONDS_WITHOUT_WORK:
        for process_id in list(running):
            done, status = os.waitpid(process_id, os.WNOHANG)
            if done:
                running.remove(process_id)
                codes.append(os.waitstatus_to_exitcode(status))
        if (seconds := cpu_seconds(running)) > worked + CPU_SECONDS_OF_WORK:
            worked, worked_at = seconds, time.time()
        elif len(codes) and seconds < worked:  # of one that has ended
            worked = seconds
        time.sleep(0.02)
    end = time.time()
    for process_id in running:
        os.kill(process_id, signal.SIGUSR2)
        time.sleep(1)
        os.killpg(process_id, signal.SIGKILL)
        os.waitpid(process_id, 0)
        codes.append("hung")
    saved = [file.stat().st_mtime for file in output_dir.rglob("*") if file.is_file()]
    seconds = end - max(saved, default=end)
    return {
        "ended": codes == [code] * len(process_ids) and bool(saved),
        "codes": codes,
        "seconds_after_save": round(seconds, 2),
    }


def cpu_seconds(process_ids: list[int]) -> float:
    """CPU time of some processes and all their descendants."""
    total = 0.0
    for process_id in process_ids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(process_id)
            for member in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += sum(member.cpu_times()[:2])
    return total


def summarize(kind: str, ends: list[dict]) -> dict:
    seconds = [end["seconds_after_save"] for end in ends]
    return {
        "what": KINDS[kind].__doc__,
        "starts": len(ends),
        "ended": sum(end["ended"] for end in ends),
        f"ended_within_{SECONDS_AFTER_SAVE}_s": sum(
            end["ended"] and end["seconds_after_save"] < SECONDS_AFTER_SAVE for end in ends
        ),
        "hung": sum("hung" in end["codes"] for end in ends),
        "other_exit_code": sum(not end["ended"] and "hung" not in end["codes"] for end in ends),
        "median_seconds_after_save": round(statistics.median(seconds), 2),
        "max_seconds_after_save": max(seconds),
    }


def record(results: dict, path: Path) -> None:
    import accelerate
    import torch

    versions = f"torch {torch.__version__}, accelerate {accelerate.__version__}, Python {sys.version.split()[0]}"
    found = json.loads(path.read_text()) if path.exists() else {}
    found.setdefault(versions, {}).update(results)
    path.write_text(json.dumps(found, indent=1) + "\n")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_images(folder: Path) -> Path:
    """Two classes of small images, in two splits."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, level in {"bright": 180, "dark": 0}.items():
            (folder / split / label).mkdir(parents=True)
            for index in range(8):
                pixels = rng.integers(0, 60, (40, 40, 3)) + level
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{index}.png")
    return folder


if __name__ == "__main__":
    sys.exit(main())
