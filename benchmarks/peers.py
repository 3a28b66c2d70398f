"""Speed of other libraries of self-supervised learning and augmentation, measured next to ours. One core, CPU time.

    python -m benchmarks.peers [--images DIR] [--python PATH ...] [--output benchmarks/results/peers_cpu.json]

JPEG files to both views of MoCo v3, each library in its own idiom (peer_libraries.py): the complete views, both crops
only, and the library's data loader with one worker; then a ViT-S pre-training step (peer_steps.py), in float32, and in
bf16 if the processor has instructions for it. Every library runs in a process of its own (peer_process.py) with one
thread. They take turns on the same files or views, in alternating order, after a warm-up in which the outputs are
checked. Workers count. Everything is measured with all instructions of the processor, and again limited to AVX2.

Libraries are looked for in this interpreter and in those of --python, because some cannot be installed together. One
that is not found is reported and skipped. To install them:

    python -m venv --system-site-packages ENV
    ENV/bin/pip install lightly lightly-train stable-pretraining albumentations timm nvidia-dali-cuda130
    python -m venv --system-site-packages ENV2
    ENV2/bin/pip install albumentationsx[headless]     # excludes albumentations; AGPL, only measured here

Without --images the photographs are made by photos.py. --quick tests in a minute that everything runs. The last line
is JSON with every round.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from .bench import revision
from .data_path import finish
from .limits import cpu_name
from .performance_peers import DATA, STEPS, TASKS
from .photos import make_photos


FOLDER = Path(__file__).parent
SUFFIXES = {".jpeg", ".jpg"}
PACKAGES = {
    "ours": "mocov3_hf",
    "plain": "torchvision",
    "lightly": "lightly",
    "lightly-train": "lightly-train",
    "stable-pretraining": "stable-pretraining",
    "timm": "timm",
    "albumentations": "albumentations",
    "albumentationsx": "albumentationsx",
    "dali": "nvidia-dali-cuda130",
}
WITH_STEP = ("ours", "plain", "lightly", "stable-pretraining")
IMPOSSIBLE = {"solo-learn": "its release on the package index, 1.0.2, requires torch 1.9.1 and has no MoCo v3"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# Of torch, oneDNN, MKL, OpenCV and numpy.
LIMITED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENCV_CPU_DISABLE": "AVX512-SKX",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
INSTRUCTIONS = {"all": {}, "avx2": LIMITED}
ISA = {"all": "all instructions of the processor", "avx2": "avx2 (limited by variables)"}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
FIND = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        continue
print(json.dumps(found))
"""


class Peer:
    """A library in its own process; `ask` sends a task and returns the answer, which may be an error."""

    def __init__(self, name: str, python: str, arguments: list[str], variables: dict[str, str]):
        self.name = name
        environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent / "src"), **ONE_THREAD, **variables}
        self.process = subprocess.Popen(
            [python, str(FOLDER / "peer_process.py"), name, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        self.close()
        self.process.wait()
        self.process.stdout.close()

    def close(self) -> None:
        """Let the process end. What was written to one that has ended cannot be flushed."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def ask(self, task: str) -> dict:
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": f"the process ended with exit code {self.process.wait()}"}


def find(pythons: list[str]) -> dict[str, str]:
    """The interpreter of each library that is installed."""
    found: dict[str, str] = {}
    for python in pythons:
        command = [python, "-c", FIND, *PACKAGES.values()]
        versions = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for name, package in PACKAGES.items():
            if package in versions or name in ("ours", "plain"):
                found.setdefault(name, python)
    return {name: found[name] for name in PACKAGES if name in found}


def cpu_flags() -> dict[str, bool]:
    """Which of the instructions that matter here the processor has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return {flag: flag in flags for flag in FLAGS}


def alternate(peers: list[Peer], task: str, rounds: int, failed: list[dict]) -> dict[str, dict[str, list[float]]]:
    """
    Rounds of one task by library, in seconds per image, in alternating order; the first round is a warm-up. A library
    that fails is left out from then on, and its error is added to `failed`.
    """
    seconds: dict = {peer.name: {"cpu": [], "wall": []} for peer in peers}
    for index in range(rounds + 1):
        for peer in peers if index % 2 else peers[::-1]:
            if peer.name not in seconds:
                continue
            answer = peer.ask(task)
            if "error" in answer:
                del seconds[peer.name]
                failed.append({"library": peer.name, "task": task, "error": answer["error"]})
                print(f"{task}: {peer.name} failed: {answer['error']}", file=sys.stderr, flush=True)
            elif index:
                for kind, taken in seconds[peer.name].items():
                    taken.append(answer[f"{kind}_seconds"] / answer["images"])
        print(f"{task}: round {index}/{rounds}", file=sys.stderr, flush=True)
    for peer in peers:
        peer.ask("forget")
    for name, taken in seconds.items():
        if taken["cpu"]:
            print(f"  {name:20s} {1 / statistics.median(taken['cpu']):7.2f} images/s", file=sys.stderr, flush=True)
    return seconds


def measure(found: dict[str, str], isa: str, bf16: bool, folder: str, options: argparse.Namespace) -> dict:
    """All tasks with the instructions of `isa`, on the images in `folder`."""
    arguments = [folder, str(options.batch), str(options.step_batch)]
    variables = INSTRUCTIONS[isa] | ({"MOCOV3_REHEARSAL": "1"} if options.quick else {})  # tiny models: limits.py
    seconds, when, failed = {}, {}, []
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(name, python, arguments, variables)) for name, python in found.items()]
        about = {peer.name: peer.ask("describe") for peer in peers}
        for task in options.tasks:
            if task == "step_bf16" and not bf16:
                continue
            start = {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC", "load": os.getloadavg()[0]}
            some = [peer for peer in peers if task in DATA or peer.name in WITH_STEP]
            rounds = options.rounds if task in DATA else options.step_rounds
            seconds[task] = alternate(some, task, rounds, failed)
            when[task] = {**start, "revision": revision()}
        for peer in peers:
            peer.close()  # all end at the same time
    run = {"isa": ISA[isa], "variables": INSTRUCTIONS[isa], "when": when, "peers": about}
    return {**run, "failed": failed, "seconds_per_image": seconds}


def merged(earlier: dict | None, result: dict, tasks: list[str]) -> dict:
    """`result` with the tasks of an earlier one that were not measured again."""
    if earlier is None or len(tasks) == len(TASKS):
        return result
    if not set(tasks) & set(DATA):
        result |= {name: earlier[name] for name in ("images", "mean_file_bytes", "photographs", "batch")}
    if not set(tasks) & set(STEPS):
        result |= {"step_batch": earlier["step_batch"]}
    runs = {run["isa"]: run for run in earlier["runs"]}
    for run in result["runs"]:
        before = runs.get(run["isa"], {"when": {}, "peers": {}, "failed": [], "seconds_per_image": {}})
        run["failed"] = [each for each in before["failed"] if each["task"] not in tasks] + run["failed"]
        for part in ("when", "peers", "seconds_per_image"):
            run[part] = {**before[part], **run[part]}
        runs[run["isa"]] = run
    return {**result, "runs": list(runs.values())}


def collect(images: str | None, count: int, folder: Path) -> int:
    """
    Put the JPEG files to measure into `folder`, as one class; returns the mean size in bytes.

    Raises:
        ValueError: There are none in `images`.
    """
    folder.mkdir()
    if images is None:
        paths = make_photos(folder, count)
    else:
        paths = [path for path in sorted(Path(images).rglob("*")) if path.suffix.lower() in SUFFIXES][:count]
        if not paths:
            raise ValueError(f"no JPEG files in {images!r}: pass a folder that contains some as --images")
        for index, path in enumerate(paths):
            shutil.copyfile(path, folder / f"{index:05d}.jpg")
    return round(statistics.mean(path.stat().st_size for path in paths))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of JPEG files, searched recursively")
    parser.add_argument("--count", type=int, default=300, help="number of images")
    parser.add_argument("--python", nargs="+", default=[], help="other interpreters with libraries to compare")
    parser.add_argument(
        "--libraries", nargs="+", choices=list(PACKAGES), default=list(PACKAGES), help="which to measure"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="those of OUTPUT that are left out stay"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of the data tasks")
    parser.add_argument("--step_rounds", type=int, default=3, help="measured rounds of the step")
    parser.add_argument("--batch", type=int, default=50, help="batch size of the loaders")
    parser.add_argument("--step_batch", type=int, default=8, help="batch size of the step")
    parser.add_argument("--instructions", nargs="+", choices=list(INSTRUCTIONS), default=list(INSTRUCTIONS))
    parser.add_argument("--quick", action="store_true", help="few images, one round, tiny models")
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args(arguments)
    if options.quick:
        options.count, options.rounds, options.step_rounds, options.batch, options.step_batch = 8, 1, 1, 4, 4
        options.instructions = options.instructions[:1]
    found = find([sys.executable, *options.python])
    skipped = {name: "not installed" for name in PACKAGES if name not in found} | IMPOSSIBLE
    found = {name: python for name, python in found.items() if name in options.libraries}
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    flags = cpu_flags()
    result = {
        "quick": options.quick,
        "device": cpu_name(),
        "instructions": flags,
        "python": platform.python_version(),
        "threads": 1,
        "batch": options.batch,
        "step_batch": options.step_batch,
        "skipped": skipped,
        "runs": [],
    }
    output = Path(options.output) if options.output else None
    earlier = json.loads(output.read_text(encoding="utf-8")) if output and output.exists() else None
    with tempfile.TemporaryDirectory() as folder:
        try:
            result["mean_file_bytes"] = collect(options.images, options.count, Path(folder) / "photographs")
        except ValueError as error:
            parser.error(str(error))
        result["images"] = len(list(Path(folder).glob("*/*.jpg")))
        result["photographs"] = "made by photos.py" if options.images is None else "photographs"
        options.batch = min(options.batch, result["images"])
        for isa in options.instructions:
            bf16 = isa == "all" and (flags["avx512_bf16"] or flags["amx_bf16"])
            result["runs"].append(measure(found, isa, bf16, folder, options))
    finish(merged(earlier, result, options.tasks), options.output)
    if any(each["library"] in ("ours", "plain") for run in result["runs"] for each in run["failed"]):
        sys.exit("error: ours or the plain implementation failed, see above")


if __name__ == "__main__":
    main()
