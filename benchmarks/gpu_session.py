"""What to measure when a GPU can be had for a quarter of an hour: tests, the step, real images, and learning.

    python -m benchmarks.gpu_session [A] [B] [C] [D] [--output_dir benchmarks/results/gpu]
    python -m benchmarks.gpu_session --rehearse          # the same code on a CPU, with tiny models

Call A takes at most 5 minutes, calls B and C at most 7 each, D 3, and each is useful alone. A has the tests, the step
of every backbone, and the candidates for a faster ViT-S (candidates.py), except those that compile for long; B has
learning and real images; C has the other candidates, the largest batch and JPEG decoding; D has learning by a second
recipe. Every part is a process with a time limit of its own and writes OUTPUT_DIR/PART.json, so a session that was cut
off goes on with the first part without a result. A part that fails or runs out of time leaves PART.failed.json, and
what it had measured until then; the others still run, and so do the other variants of a step of which one fails. At
the end, the goals are compared with what was measured (OUTPUT_DIR/goals.json). The exit code is 1 if a part failed.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bench import RESULTS, Part, make_photos, run_part, words


CALLS = {"A": 300, "B": 420, "C": 420, "D": 180}  # seconds
CLIPPED = Path(__file__).parent / "recipes" / "cifar10_resnet14_clipped.yaml"
SLOW_REHEARSAL = 10  # times the limits, on busy CPUs
STEPS = ("plain", "ours", "compiled")
# Candidates (candidates.py). Deterministic algorithms exclude kernels chosen by timing, and cuDNN's attention.
FREE = "compiled,deterministic=false"
CUDNN, TUNED = "attn_implementation=sdpa_cudnn", "max_autotune=true"
SINGLE = (
    "cuda_graphs=true",
    "momentum_low_precision=true",
    "momentum_inference_mode=true",
    "compile_regions=true",
)
TOGETHER = ",".join((FREE, *SINGLE[:3]))  # regions only make the start faster
WITH_CUDNN = f"{TOGETHER},{CUDNN}"
CANDIDATES = ("compiled", *(f"compiled,{candidate}" for candidate in SINGLE), FREE)
# (goal, parts, where the value is, what it must reach, whether at least or at most)
GOALS: tuple[tuple[str, tuple[str, ...], Callable[[Any], float], float, bool], ...] = (
    (
        "ViT-B, MFU",
        ("step_vit_base", "candidates_vit_base", "tuned_vit_base", "largest"),
        lambda found: best(found, "mfu"),
        0.45,
        True,
    ),
    (
        "ViT-S, times the plain step",
        ("step_vit_small", "candidates_vit_small", "tuned_vit_small"),
        lambda found: best(found, "speedup"),
        4.0,
        True,
    ),
    ("real images, prefetched, slower than ready ones", ("data",), lambda found: stall(found), 0.05, False),
    ("CIFAR-10, linear accuracy", ("learning",), lambda found: found["linear_top1"], 0.9, True),
)


@dataclass(frozen=True)
class Limited:
    """A part of a call, and the seconds after which it is ended."""

    call: str
    part: Part
    limit: int


def plan(images: str, is_rehearsal: bool, data: str | None) -> list[Limited]:
    """The parts in order, with the limits of `CALLS` as their sum at most."""
    size = "--rounds 1 --steps 1 --try_on_cpu" if is_rehearsal else "--rounds 2 --steps 10"

    def learn(name: str, *arguments: str, seconds: int) -> Part:
        named = ("--dataset_name", data) if data else ()
        return Part(name, "gpu_learning", (*named, *arguments), seconds, as_module=True)

    def step(call: str, name: str, backbones: str, variants: tuple[str, ...], limit: int, more: str = "") -> Limited:
        if is_rehearsal and "--batch" not in more:
            more += " --batch 4"
        # What is left is for the last one, and for the other rounds.
        seconds = limit * (SLOW_REHEARSAL if is_rehearsal else 1) - 25
        arguments = (
            "--backbones",
            *words(backbones),
            "--variants",
            *variants,
            *words(f"{size} --seconds {seconds} {more}"),
        )
        return Limited(call, Part(name, "step_gpu", arguments, limit - 10), limit)

    return [
        Limited("A", Part("tests", "gpu_tests", (), 60, as_module=True), 70),
        step("A", "step_vit_small", "vit_small", STEPS, 55),
        step("A", "step_vit_base", "vit_base", STEPS, 55),
        step("A", "step_resnet50", "resnet50", STEPS, 45),
        step("A", "candidates_vit_small", "vit_small", ("plain", *CANDIDATES, f"{FREE},{CUDNN}", WITH_CUDNN), 75),
        Limited("B", learn("learning", seconds=330), 345),
        step("B", "data", "vit_small", ("ours,prefetch_views=true",), 75, f"--data {images}"),
        step("C", "candidates_vit_base", "vit_base", (*CANDIDATES, f"{FREE},{CUDNN}"), 70),
        step("C", "candidates_resnet50", "resnet50", (*CANDIDATES, TOGETHER), 55),
        step("C", "tuned_vit_small", "vit_small", ("plain", FREE, f"{FREE},{TUNED}", f"{WITH_CUDNN},{TUNED}"), 55),
        step("C", "tuned_vit_base", "vit_base", (FREE, WITH_CUDNN, f"{FREE},{TUNED}", f"{WITH_CUDNN},{TUNED}"), 60),
        step("C", "tuned_resnet50", "resnet50", (FREE, f"{FREE},{TUNED}", f"{TOGETHER},{TUNED}"), 50),
        step("C", "largest", "vit_base vit_small resnet50", STEPS[1:], 80, "--batch largest"),
        Limited("C", Part("tests_slow", "gpu_tests", ("--slow",), 25, as_module=True), 30),
        Limited(
            "C",
            Part("decode", "gpu_decode", ("--images", images, "--count", "16" if is_rehearsal else "2000"), 15, True),
            20,
        ),
        Limited("D", learn("learning_clipped", "--recipe", str(CLIPPED), "--time_budget", "2m", seconds=160), 180),
    ]


def best(found: Mapping[str, Any], name: str) -> float:
    """The largest value of a measure among our variants of the first backbone."""
    variants = found["points"][0]["variants"]
    values = [variant[name] for key, variant in variants.items() if key != "plain" and variant.get(name) is not None]
    return max(value["median"] if isinstance(value, Mapping) else value for value in values)


def stall(found: Mapping[str, Any]) -> float:
    """How much slower the step is on images from the disk than on views in memory."""
    return found["points"][0]["data"]["slower_than_ready"]


def compare(folder: Path) -> list[dict[str, Any]]:
    """Goals beside the best that was measured; None where no part has a result."""
    rows = []
    for goal, parts, value_of, wanted, at_least in GOALS:
        values = []
        for path in (folder / f"{part}{failed}.json" for part in parts for failed in ("", ".failed")):
            # A part has not run; or nothing of it could be measured, as a CPU has no MFU.
            with contextlib.suppress(FileNotFoundError, KeyError, ValueError, TypeError):
                values.append(value_of(json.loads(path.read_text())["result"]))
        value = (max if at_least else min)(values, default=None)
        reached = None if value is None else value >= wanted if at_least else value <= wanted
        rows.append({"goal": goal, "wanted": wanted, "measured": value, "reached": reached})
    return rows


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(values, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def run(folder: Path, options: argparse.Namespace) -> bool:
    """Run the parts without a result; whether none has failed."""
    whole, start = True, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu_session_") as work:
        images = make_photos(Path(work), 16 if options.rehearse else 1000)
        for item in plan(images, options.rehearse, options.dataset_name):
            part, path = item.part, folder / f"{item.part.name}.json"
            is_asked = item.call in (options.calls or CALLS) and part.name in (options.only or (part.name,))
            if not is_asked or path.exists():
                continue
            limit = item.limit * (SLOW_REHEARSAL if options.rehearse else 1)
            label = f"[{item.call} {part.name}, at most {limit} s; {time.perf_counter() - start:.0f} s so far]"
            result, record = run_part(part, Path(work), label, limit=limit)
            record["command"] = record["command"].replace(images, "PHOTOS")
            failed = path.with_suffix(".failed.json")
            if result is None:
                whole = False
                begun = Path(work) / f"{part.name}.json"
                write(failed, {"run": record, "result": json.loads(begun.read_text()) if begun.exists() else None})
                print(f"{part.name} failed: {record['last_lines'][-1:]}", file=sys.stderr, flush=True)
            else:
                failed.unlink(missing_ok=True)
                write(path, {"run": record, "result": result})
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="*", metavar="CALL", help="A, B, C, D; default: all")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to measure; default: all")
    parser.add_argument("--dataset_name", help="CIFAR-10 as a folder; default: uoft-cs/cifar10 of the Hub")
    parser.add_argument("--output_dir", type=Path, help="default: benchmarks/results/gpu; to rehearse a temporary one")
    options = parser.parse_args()
    if unknown := set(options.calls) - CALLS.keys():
        parser.error(f"calls are {', '.join(CALLS)}, got {', '.join(sorted(unknown))}")
    folder = options.output_dir or RESULTS / "gpu"
    if options.rehearse:
        os.environ |= {"MOCOV3_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": ""}
        folder = options.output_dir or Path(tempfile.mkdtemp(prefix="rehearsal_"))
    names = [item.part.name for item in plan("", options.rehearse, None)]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"parts are {', '.join(names)}, got {', '.join(sorted(unknown))}")
    whole = run(folder, options)
    rows = compare(folder)
    write(folder / "goals.json", rows)
    for row in rows:
        shown = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        print(f"{row['goal']}: {shown}, goal {row['wanted']}{'' if row['reached'] in (None, True) else ' (missed)'}")
    print(folder)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
