"""Run all benchmarks of speed and memory on this machine, next to plain reference implementations.

    python benchmarks/bench.py [--quick] [--images DIR] [--only step ...] [--machine NAME] [--output_dir DIR]
    make bench                       # also updates the tables and plots of docs/performance.md

Parts run one after another, each in a separate process, and never in parallel, because busy cores share caches, memory
bandwidth and clock. On a CPU every part uses one core and counts CPU time. The hardware limits are measured before and
after all parts, and again inside the parts. Without --images the photographs are made by photos.py.

The results go to OUTPUT_DIR/MACHINE.json. --only measures the named parts again and keeps the other results in that
file; each part records its date and revision. If a part fails, the others still run and the exit code is 1. --quick
tests in a few minutes that everything runs; its numbers are meaningless and go to MACHINE-quick.json.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PACKAGES = ("mocov3_hf", "torch", "torchvision", "transformers", "accelerate", "pillow", "numpy")
LINES_OF_A_FAILURE = 20


@dataclass(frozen=True)
class Part:
    """
    One benchmark.

    Args:
        name: Name in the results and for --only.
        script: Name of the script in this folder.
        arguments: Arguments of the script; `--output` is added.
        seconds: Approximate duration on a quiet core of an AMD EPYC, for the progress line.
        as_module: Whether it runs as `python -m benchmarks.NAME`.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    seconds: int
    as_module: bool = False

    def command(self) -> list[str]:
        target = ["-m", f"benchmarks.{self.script}"] if self.as_module else [str(FOLDER / f"{self.script}.py")]
        return [sys.executable, *target, *self.arguments]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def plan_parts(device: str, quick: bool, images: str, rounds: int, step_json: str) -> list[Part]:
    """The parts in order; scaling reads the measured step times from `step_json`."""
    on = ("--device", device) if device == "cuda" else ()
    limits = (*on, "--rounds", "2" if quick else "5")
    data = ("--images", images, "--reference", "--rounds", "1" if quick else "5")
    parts = [Part("limits_before", "limits", limits, 8 if quick else 15)]
    if quick:
        parts.append(Part("data_path", "data_path", (*data, "--workers", "1"), 10))
    else:
        stage = ("--device_stage",) if device == "cuda" else ()
        parts.append(Part("data_path", "data_path", (*data, *stage), 75))
    if device == "cuda":
        step = (
            "--data",
            images,
            *words("--backbones vit_small --batch 32 --rounds 1 --steps 5" if quick else "--profile"),
        )
        parts.append(Part("step", "step_gpu", step, 60 if quick else 400))
    else:
        step = words("--batch 4 --rounds 1") if quick else ("--rounds", str(rounds))
        parts.append(Part("step", "step", step, 60 if quick else 100 * (rounds + 2)))
    parts.append(Part("updates", "updates", (*on, "--rounds", "1" if quick else "7"), 15 if quick else 35))
    if device == "cpu":
        sizes = "--batches 4 8 --chunk_size 2 --cost_batch 4" if quick else "--batches 32 128 --cost_batch 32"
        parts.append(Part("memory", "memory", words(f"{sizes} --rounds 1"), 40 if quick else 190))
    inference = ("--images", images, "--rounds", "1" if quick else "3", "--num_images", "4" if quick else "8")
    inference += ("--tasks", "classification", "features")
    parts.append(Part("inference", "inference", inference, 20 if quick else 90))
    scaling = ("--step_json", step_json)
    if device == "cpu":  # cores of one host; hosts on 1 and 10 Gbit/s Ethernet
        scaling += words("--ethernet 0.125 --infiniband 1.25 --nvlink 10")
    parts.append(Part("scaling", "scaling", scaling, 20, as_module=True))
    if device == "cpu" and not quick:
        parts.append(Part("scaling_check", "scaling_check", ("--or_why_not",), 95, as_module=True))
    parts.append(Part("limits_after", "limits", limits, 8 if quick else 15))
    return parts


def machine_name(device: str, cores: int | None) -> str:
    """`AMD EPYC` with 2 cores becomes `amd-epyc-2-cores`; for a GPU (`cores` is None) the name alone."""
    name = re.sub(r"\((r|tm|c)\)|@.*|\b\d+-core\b|\b(cpu|processor)\b", " ", device.lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name if cores is None else f"{name}-{cores}-cores"


def revision() -> str:
    """Git revision of the working tree, with `-dirty` if it has uncommitted changes; `unknown` outside of git."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def run_part(part: Part, folder: Path, label: str, limit: float | None = None) -> tuple[dict | None, dict]:
    """
    Run a part and forward its output. Returns its JSON result (None if it failed) and the record of the run: command,
    seconds, date, load. After `limit` seconds, the part and its processes are killed.
    """
    output = folder / f"{part.name}.json"
    command = [*part.command(), "--output", str(output)]
    shown = shlex.join(["python", *part.command()[1:]]).replace(f"{ROOT}{os.sep}", "")
    print(f"{label}: {shown}", flush=True)
    record = {
        "command": shown,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": os.getloadavg()[0],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    start, last = time.perf_counter(), deque(maxlen=LINES_OF_A_FAILURE)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        watch = threading.Timer(limit or threading.TIMEOUT_MAX, kill_group, [process.pid])
        watch.daemon = True
        watch.start()
        try:
            for line in process.stdout:
                if not line.startswith("{"):  # the JSON is in the file
                    last.append(line.rstrip())
                    print(f"    {line}", end="", flush=True)
            process.wait()
        except BaseException:
            kill_group(process.pid)
            raise
        finally:
            watch.cancel()
    record["seconds"] = time.perf_counter() - start
    if process.returncode != 0:
        return None, {**record, "exit_code": process.returncode, "last_lines": list(last)}
    if not output.exists():
        return None, {**record, "exit_code": 0, "last_lines": ["exited without writing its --output"]}
    return json.loads(output.read_text(encoding="utf-8")), record


def kill_group(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(process_id, signal.SIGKILL)


def merge(before: dict, header: dict, finished: dict[str, dict], failed: dict[str, dict]) -> dict:
    """
    Merge the results of a run into those of the machine.

    Args:
        before: Earlier results, or `{}`. Parts that did not run now are kept.
        header: Description of the machine and of the settings.
        finished: Maps part to `{"run": record, "result": JSON result}`.
        failed: Maps part to the record of its run. An earlier result of it is dropped.
    """
    parts = {name: part for name, part in before.get("parts", {}).items() if name not in failed}
    return {**header, "parts": parts | finished, "failed": failed}


def drift(parts: dict[str, dict]) -> dict[str, float]:
    """Rate of every limit after the run, relative to that before it; empty if one is missing."""
    if not {"limits_before", "limits_after"} <= parts.keys():
        return {}
    rates = [parts[name]["result"]["limits"] for name in ("limits_before", "limits_after")]
    return {name: middle(rates[1][name]["rates"]) / middle(rates[0][name]["rates"]) for name in rates[0]}


def middle(values: list[float]) -> float:
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def has_gpu() -> bool:
    import torch  # imported here: --help and tests do not need torch

    return torch.cuda.is_available()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test that everything runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="device; default: the GPU, if there is one")
    parser.add_argument("--images", help="folder of photographs; default: 300 made by photos.py")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of the training steps on a CPU")
    names = [part.name for part in plan_parts("cpu", False, "", 1, "")]
    parser.add_argument("--only", nargs="+", choices=[name for name in names if "limits" not in name], metavar="PART")
    parser.add_argument("--machine", help="name of the result file; default: from the CPU or GPU name")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    device = options.device or ("cuda" if has_gpu() else "cpu")
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        output, results = run(options, device, Path(folder))
    print(f"{output} after {results['seconds']:.0f} s")
    if results["failed"]:
        sys.exit(f"error: {', '.join(results['failed'])} failed; exit codes and last lines are in {output}")


def run(options: argparse.Namespace, device: str, folder: Path) -> tuple[Path, dict]:
    """Run all parts; the result file is written after each. Returns its path and its content."""
    start = time.perf_counter()
    images = options.images or make_photos(folder, 16 if options.quick else 300)
    step_json = folder / "step.json"
    parts = plan_parts(device, options.quick, images, options.rounds, str(step_json))
    if options.only:
        parts = [part for part in parts if part.name in options.only or part.name.startswith("limits")]
    output, before, header, finished, failed = None, {}, {}, {}, {}
    measured = revision()  # before any result file changes the working tree
    for index, part in enumerate(parts):
        left = sum(later.seconds for later in parts[index:])
        so_far = time.perf_counter() - start
        result, record = run_part(
            part, folder, f"[{index + 1}/{len(parts)} {part.name}; {so_far:.0f} s so far, about {left} s to go]"
        )
        record["revision"] = measured
        if output is None:
            if result is None:
                sys.exit("error: measuring the hardware limits failed; see the lines above")
            header = describe(result, options, device)
            output = options.output_dir / f"{header['machine']}{'-quick' if options.quick else ''}.json"
            before = json.loads(output.read_text(encoding="utf-8")) if options.only and output.exists() else {}
            if "step" in before.get("parts", {}):  # for scaling, when the step is not measured in this run
                step_json.write_text(json.dumps(before["parts"]["step"]["result"]), encoding="utf-8")
        if result is None:
            failed[part.name] = record
            print(f"{part.name} failed with exit code {record['exit_code']}", file=sys.stderr, flush=True)
        else:
            record["command"] = record["command"].replace(images, "PHOTOS").replace(f"{folder}{os.sep}", "")
            finished[part.name] = {"run": record, "result": result}
        results = merge(before, header, finished, failed)
        results |= {"drift": drift(results["parts"]), "seconds": time.perf_counter() - start}
        write(results, output)
    return output, results


def make_photos(folder: Path, count: int) -> str:
    """Make photographs with photos.py; returns their folder."""
    target = folder / "photos"
    command = [sys.executable, str(FOLDER / "photos.py"), str(target), "--count", str(count)]
    subprocess.run(command, check=True)
    return str(target)


def describe(limits: dict, options: argparse.Namespace, device: str) -> dict:
    """Description of the machine and of the settings."""
    return {
        "machine": options.machine or machine_name(limits["device"], limits["cores"] if device == "cpu" else None),
        "device": limits["device"],
        "device_type": device,
        "cpu": limits["cpu"],
        "cores": limits["cores"],
        "quick": options.quick,
        "images": "made by photos.py" if options.images is None else "a folder passed as --images",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {package: metadata.version(package) for package in PACKAGES},
    }


def write(results: dict, path: Path) -> None:
    """Write atomically: a run may be interrupted, and the file may hold results of earlier parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(f"{json.dumps(results, indent=1)}\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
