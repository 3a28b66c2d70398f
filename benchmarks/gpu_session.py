"""What to measure when a GPU can be had for a quarter of an hour: tests, the step, real images, and learning.

    python -m benchmarks.gpu_session [A] [B] [--output_dir benchmarks/results/gpu]
    python -m benchmarks.gpu_session --rehearse          # the same code on a CPU, with tiny models

Call A takes at most 5 minutes, call B at most 7, and each is useful alone. Every part is a process with a time limit
of its own and writes OUTPUT_DIR/PART.json, so a session that was cut off goes on with the first part without a result.
A part that fails or runs out of time leaves PART.failed.json, and what it had measured until then; the others still
run. At the end, the goals are compared with what was measured (OUTPUT_DIR/goals.json). The exit code is 1 if a part
failed.
"""

import argparse
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


CALLS = {"A": 300, "B": 420}  # seconds
SLOW_REHEARSAL = 10  # times the limits, on busy CPUs
STEPS = "--variants plain ours compiled --rounds 3 --steps 10"
# (goal, part, where the value is, what it must reach, whether at least or at most)
GOALS: tuple[tuple[str, str, Callable[[Any], float], float, bool], ...] = (
    ("ViT-B, MFU", "step_vit_base", lambda found: best(found, "mfu"), 0.45, True),
    ("ViT-S, times the plain step", "step_vit_small", lambda found: best(found, "speedup"), 4.0, True),
    ("real images, slower than ready ones", "data", lambda found: stall(found), 0.05, False),
    ("CIFAR-10, linear accuracy", "learning", lambda found: found["linear_top1"], 0.9, True),
)


@dataclass(frozen=True)
class Limited:
    """A part of a call, and the seconds after which it is ended."""

    call: str
    part: Part
    limit: int


def plan(images: str, is_rehearsal: bool, data: str | None) -> list[Limited]:
    """The parts in order, with the limits of `CALLS` as their sum at most."""
    steps, decode = words(STEPS), words("--count 2000")
    if is_rehearsal:
        steps, decode = words("--try_on_cpu --variants plain ours --batch 4 --rounds 1 --steps 1"), words("--count 16")
    learning = ("--dataset_name", data) if data else ()
    return [
        Limited("A", Part("tests", "gpu_tests", (), 60, as_module=True), 75),
        Limited("A", Part("step_vit_small", "step_gpu", ("--backbones", "vit_small", *steps), 55), 65),
        Limited("A", Part("step_vit_base", "step_gpu", ("--backbones", "vit_base", *steps), 55), 65),
        Limited("A", Part("step_resnet50", "step_gpu", ("--backbones", "resnet50", *steps), 35), 45),
        Limited("A", Part("decode", "gpu_decode", ("--images", images, *decode), 20, as_module=True), 30),
        Limited("B", Part("learning", "gpu_learning", learning, 330, as_module=True), 345),
        Limited(
            "B", Part("data", "step_gpu", ("--backbones", "vit_small", "--data", images, *last_of(steps)), 60), 70
        ),
    ]


def last_of(steps: tuple[str, ...]) -> tuple[str, ...]:
    """The same steps, of one variant: that of a normal run."""
    start = steps.index("--variants")
    end = next(index for index in range(start + 1, len(steps)) if steps[index].startswith("--"))
    return (*steps[: start + 1], "ours", *steps[end:])


def best(found: Mapping[str, Any], name: str) -> float:
    """The largest value of a measure among our variants of the first backbone."""
    variants = found["points"][0]["variants"]
    values = [variant[name] for key, variant in variants.items() if key != "plain" and variant.get(name) is not None]
    return max(value["median"] if isinstance(value, Mapping) else value for value in values)


def stall(found: Mapping[str, Any]) -> float:
    """How much slower the step is on images from the disk than on views in memory."""
    return found["points"][0]["data"]["slower_than_ready"]


def compare(folder: Path) -> list[dict[str, Any]]:
    """Goals beside what was measured; None where a part has no result."""
    rows = []
    for goal, part, value_of, wanted, at_least in GOALS:
        path = folder / f"{part}.json"
        try:
            value = value_of(json.loads(path.read_text())["result"]) if path.exists() else None
        except (KeyError, ValueError, TypeError):  # a CPU has no MFU
            value = None
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
    parser.add_argument("calls", nargs="*", metavar="CALL", help="A, B; default: both")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to measure; default: all")
    parser.add_argument("--dataset_name", help="CIFAR-10 as a folder; default: uoft-cs/cifar10 of the Hub")
    parser.add_argument("--output_dir", type=Path, help="default: benchmarks/results/gpu; to rehearse a temporary one")
    options = parser.parse_args()
    if unknown := set(options.calls) - CALLS.keys():
        parser.error(f"calls are {' and '.join(CALLS)}, got {', '.join(sorted(unknown))}")
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
