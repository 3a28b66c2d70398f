"""Pre-training runs for chaos.py, forked from a process that has imported everything: a start costs no import."""

import contextlib
import multiprocessing.util
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture

from mocov3_hf.pretraining import pretrain
from mocov3_hf.run_folder import is_whole, list_checkpoints, step_of
from mocov3_hf.storage import read_lines, sha256_of


VIT = '{"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}'
RESNET = '{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}'
ADAMW = ("--optimizer", "adamw", "--backbone_config", VIT)
LARS = ("--optimizer", "lars", "--base_learning_rate", "0.3", "--backbone_config", RESNET)
# name: (processes, options). Together they cover every value of each dimension, in several combinations.
KINDS = {
    "1 process, files, fp32, AdamW": (1, ("--mixed_precision", "no", *ADAMW)),
    "1 process, stream, bf16, AdamW": (1, ("--mixed_precision", "bf16", "--streaming", *ADAMW)),
    "1 process, files, bf16, LARS": (1, ("--mixed_precision", "bf16", *LARS)),
    "2 processes, files, bf16, AdamW": (2, ("--mixed_precision", "bf16", *ADAMW)),
    "2 processes, stream, fp32, LARS": (2, ("--mixed_precision", "no", "--streaming", *LARS)),
}
SHARED = (
    *("--recipe", "quickstart", "--head_hidden_size", "64", "--projection_dim", "16", "--train_batch_size", "16"),
    *("--save_steps", "3", "--save_total_limit", "2", "--logging_steps", "4", "--knn_steps", "10", "--knn_k", "3"),
    *("--dataloader_num_workers", "1", "--communication_timeout", "30", "--resume_from_checkpoint", "auto"),
)
TIMES = ("images_per_second", "data_wait_fraction")
SECONDS_TO_END = 180
CRASHED = 70  # exit code of a process that ended with a traceback


class Launch:
    """
    The processes of one start of a run, in one process group.

    Args:
        arguments: Of `mocov3 pretrain`.
        num_processes: Ranks.
        log: Where all of them print to; appended.
        before: Called in each process before the run starts.
    """

    def __init__(self, arguments: list[str], num_processes: int, log: Path, before: Callable[[], None] | None = None):
        log.touch()
        self.log, self.start = log, log.stat().st_size
        self.codes: dict[int, int] = {}
        self.ranks: list[int] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(num_processes):
            environment = {"OMP_NUM_THREADS": "1"}
            if num_processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                environment |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
                environment |= {"MASTER_PORT": str(port)}
            sys.stdout.flush()
            sys.stderr.flush()
            group = self.ranks[0] if self.ranks else 0
            process_id = os.fork()
            if process_id == 0:
                self.run(arguments, environment, group, before)
            with contextlib.suppress(OSError):  # it has done so itself
                os.setpgid(process_id, group or process_id)
            self.ranks.append(process_id)

    def run(self, arguments: list[str], environment: dict[str, str], group: int, before) -> None:
        """In the new process; does not return."""
        code = CRASHED
        try:
            os.setpgid(0, group)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            os.environ.update(environment)
            sys.argv = ["mocov3", "pretrain", *arguments]
            if before is not None:
                before()
            pretrain.main(arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                multiprocessing.util._exit_function()  # the only exit function that is not of the parent
            os._exit(code)

    @property
    def group(self) -> int:
        return self.ranks[0]

    def is_running(self) -> bool:
        """Whether any rank runs; collects those that have ended."""
        for process_id in self.ranks:
            if process_id not in self.codes:
                ended, status = os.waitpid(process_id, os.WNOHANG)
                if ended:
                    self.codes[process_id] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.ranks)

    def wait(self) -> list[int]:
        """
        The exit codes by rank, when all processes of the group are gone.

        Raises:
            TimeoutError: some are not; they are killed.
        """
        deadline = time.monotonic() + SECONDS_TO_END
        while self.is_running() or self.members():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {SECONDS_TO_END} s: {self.text()[-1000:]}")
            time.sleep(0.01)
        return [self.codes[process_id] for process_id in self.ranks]

    def members(self) -> list[psutil.Process]:
        """Processes of the group but the ranks: data-loading workers."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                is_member = os.getpgid(process.pid) == self.group and process.pid not in self.ranks
                if is_member and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def signal(self, number: signal.Signals) -> None:
        """To the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        while self.is_running():
            time.sleep(0.01)

    def text(self) -> str:
        """What this start and those after it have printed."""
        with open(self.log, "rb") as file:
            file.seek(self.start)
            return file.read().decode(errors="replace").replace("\r", "\n")


@dataclass
class Reference:
    """An uninterrupted run."""

    folder: Path
    seconds: float

    @property
    def weights(self) -> str:
        return sha256_of(self.folder / "model.safetensors")


class Trial:
    """A run that something happens to. `problems` collects every promise that is not kept."""

    def __init__(self, folder: Path, kind: str, data: Path, steps: int, reference: Reference | None = None):
        self.folder, self.log, self.kind, self.reference = folder / "run", folder / "log", kind, reference
        self.num_processes, settings = KINDS[kind]
        self.steps = steps
        self.arguments = [*SHARED, *settings, "--dataset_name", str(data), "--max_steps", str(steps)]
        self.problems: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *options: str, before: Callable[[], None] | None = None) -> Launch:
        arguments = [*self.arguments, *options, "--output_dir", str(self.folder)]
        return Launch(arguments, self.num_processes, self.log, before)

    def wait_for_moment(self, launch: Launch, draw: random.Random, at_start: float = 0.2) -> int:
        """
        Wait for a random moment, with probability `at_start` during start-up and else after a random step, or for the
        end. Returns the step of the newest whole checkpoint.
        """
        if draw.random() < at_start:
            time.sleep(draw.uniform(0, 0.3 * self.reference.seconds))
        else:
            step = draw.randrange(1, self.steps - 2)
            while launch.is_running() and all(step_of(path) < step for path in list_checkpoints(self.folder)):
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 3 * self.reference.seconds / self.steps))
        return self.newest_step()

    def newest_step(self) -> int:
        """Of the newest whole checkpoint, 0 without one."""
        return next((step_of(path) for path in list_checkpoints(self.folder) if is_whole(path)), 0)

    def expect(self, kept: bool, what: str) -> None:
        if not kept:
            self.problems.append(what)

    def expect_end(self, launch: Launch, codes: set[int], errors: int | None = None) -> list[int]:
        """Wait for the end: only these exit codes, no traceback, and as many error lines as given."""
        found = launch.wait()
        text = launch.text()
        lines = re.findall(r"^error: .*", text, flags=re.MULTILINE)
        self.expect(set(found) <= codes, f"exit codes {found}, expected {sorted(codes)}: {lines or text[-500:]}")
        self.expect("Traceback" not in text, f"a traceback: {text[-1500:]}")
        self.expect(errors is None or len(lines) == errors, f"{len(lines)} error lines, expected {errors}: {lines}")
        return found

    def expect_nothing_lost(self, step: int) -> None:
        """All checkpoints are whole, and the newest is at least as new as one that was there."""
        damaged = [path.name for path in list_checkpoints(self.folder) if not is_whole(path)]
        self.expect(not damaged, f"damaged checkpoints: {damaged}")
        self.expect(self.newest_step() >= step, f"the newest checkpoint has step {self.newest_step()}, not {step}")

    def finish(self, compare_lines: bool = True) -> Launch:
        """Resume to the end, and compare with the uninterrupted run."""
        launch = self.start()
        self.expect_end(launch, {0}, errors=0)
        mine, its = self.folder, self.reference.folder
        self.expect((mine / "model.safetensors").exists(), "no weights")
        if not self.problems:
            self.expect(sha256_of(mine / "model.safetensors") == self.reference.weights, "other weights")
            if compare_lines:
                for name in ("metrics.jsonl", "knn.jsonl"):
                    self.expect(lines_of(mine / name) == lines_of(its / name), f"other lines in {name}")
            self.expect_nothing_lost(self.newest_step())
            left = [path.name for path in mine.glob(".*")]
            self.expect(not left, f"left behind: {left}")
        return launch


def lines_of(path: Path) -> list[dict]:
    """Without times."""
    lines, damaged = read_lines(path)
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines] + [{"damaged": damaged}]


def reference_run(folder: Path, kind: str, data: Path, steps: int) -> Reference:
    """An uninterrupted run, and how long it takes."""
    trial = Trial(folder, kind, data, steps)
    start = time.monotonic()
    trial.expect_end(trial.start(), {0}, errors=0)
    if trial.problems:
        raise RuntimeError(f"{kind}: the uninterrupted run failed: {trial.problems}")
    return Reference(trial.folder, time.monotonic() - start)


def write_shards(folder: Path) -> Path:
    """48 small images in three parquet files of unequal length, and 9 in a test split; three classes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    parts = {"train-00000-of-00003": 11, "train-00001-of-00003": 20, "train-00002-of-00003": 17}
    for name, number in (parts | {"test-00000-of-00001": 9}).items():
        images = [Picture.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)) for _ in range(number)]
        images = [image.resize((48, 40), Picture.Resampling.BICUBIC) for image in images]
        columns = {"image": images, "label": [index % 3 for index in range(number)]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


def summary(trials: list[dict]) -> Iterator[dict]:
    """The rows of the table: one per fault."""
    for fault in dict.fromkeys(trial["fault"] for trial in trials):
        rows = [trial for trial in trials if trial["fault"] == fault]
        yield {
            "fault": fault,
            "times": len(rows),
            "what_happened": dict(sorted(counted(row["outcome"] for row in rows).items())),
            "kept": sum(not row["problems"] for row in rows),
        }


def counted(values) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def table(report: dict) -> str:
    """The report as Markdown."""
    lines = [
        f"# {report['faults']} faults",
        "",
        f"Generated by `{report['command']}` in {report['seconds'] / 60:.0f} min on {report['hardware']['cpu']},"
        f" {report['hardware']['cpu_count']} cores.",
        "",
        "Every faulty run is resumed and compared with an uninterrupted one. *Kept*: weights bit-identical, lines of",
        "`metrics.jsonl` and `knn.jsonl` equal, all checkpoints whole, none lost, no traceback, nothing left behind.",
        "",
        "| fault | times | what happened | kept |",
        "|---|---|---|---|",
    ]
    for row in report["table"]:
        happened = "; ".join(f"{outcome} ({number})" for outcome, number in row["what_happened"].items())
        lines.append(f"| {row['fault']} | {row['times']} | {happened} | {row['kept']} |")
    lines += ["", f"Lost: {report['lost']}. Kinds of runs: {'; '.join(KINDS)}.", ""]
    return "\n".join(lines)
