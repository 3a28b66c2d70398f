"""
Convert mutated checkpoint files, one process each, and count what happens.

    python benchmarks/fuzz_convert.py --files 2000 --output benchmarks/results/fuzz_convert.json

Every file must either convert or be refused in one line. A crash, a traceback, more than 10 CPU seconds, executed
code, more memory than three times the file (plus 32 MB for Python's objects), or other weights from a damaged file
with checksums is a failure, and the exit code is 1. Results are kept in `--work_dir`: an interrupted run continues.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.mutated_checkpoints import BYTES, mutated, write_seeds  # noqa: E402
from mocov3_hf.interop.convert import main as convert  # noqa: E402


SECONDS = 10
ALLOWANCE = 32 << 20  # bytes of Python objects, beyond three times the file
MARKS = ("os.", "subprocess.", "socket.", "pickle.", "shutil.", "ctypes.dlopen")  # audit events that no file may cause
ALLOWED = ("os.scandir", "os.listdir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link",
           "os.walk", "os.truncate", "os.utime", "shutil.rmtree", "shutil.copyfile", "os.putenv")  # fmt: skip


# One conversion


def attempt(path: Path, output_dir: Path) -> tuple[str, str]:
    """Outcome and last line of one conversion in this process: converted, refused, or what must not be."""
    printed, errors = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            convert([str(path), "--output_dir", str(output_dir), "--num_attention_heads", "2"])
        except SystemExit as end:
            code = end.code
        except BaseException:
            return "traceback", traceback.format_exc()[-2000:]
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith("warning: ")]
    if code == 0:
        return "converted", ""
    if code not in (1, 2) or len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 2500:
        return "unclear", "\n".join(lines)[:2000]
    return ("refused" if not output_dir.exists() else "left a folder"), lines[0]


def outcome_of(path: Path, output_dir: Path, expected: dict[str, torch.Tensor]) -> tuple[str, str]:
    """As `attempt`; weights other than those of the whole file are `"other weights"`."""
    outcome, line = attempt(path, output_dir)
    if outcome == "converted":
        found = load_file(output_dir / "model.safetensors")
        same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        outcome = "converted" if same else "other weights"
    return outcome, line


def expected_weights(seeds: dict[str, Path], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of every whole file, which must convert."""
    expected = {}
    shutil.rmtree(folder, ignore_errors=True)
    for name, path in seeds.items():
        outcome, line = attempt(path, folder / name)
        if outcome != "converted":
            raise SystemExit(f"the whole file {path} does not convert: {line}")
        expected[name] = load_file(folder / name / "model.safetensors")
    return expected


def in_child(path: Path, whole: Path, folder: Path, expected: dict[str, torch.Tensor]) -> dict:
    """Convert in a child process with limits, and measure it. `whole` is a file of the same form that converts."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        events: list[str] = []
        sys.addaudithook(lambda event, _: events.append(event) if event.startswith(MARKS) else None)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 2))
        attempt(whole, folder / "whole")  # a fork maps the pages of libraries at their first use
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        base = memory("VmRSS")
        begin = time.process_time()
        outcome, line = outcome_of(path, folder / "out", expected)
        measured = {
            "outcome": outcome,
            "line": line,
            "seconds": round(time.process_time() - begin, 2),
            "memory": memory("VmHWM") - base,
            "events": sorted(set(events) - set(ALLOWED)),
        }
        report.write_text(json.dumps(measured))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not report.exists():
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        name = signal.Signals(number).name if number else f"exit {os.WEXITSTATUS(status)}"
        return {"outcome": "hang" if number == signal.SIGXCPU else "crash", "line": name, "memory": 0, "seconds": 0}
    return json.loads(report.read_text())


def memory(name: str) -> int:
    """A number of `/proc/self/status`, in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) << 10


def judge(form: str, mutation: str, size: int, row: dict) -> str | None:
    """What is wrong with a result; None if nothing is."""
    if row["outcome"] not in ("converted", "refused", "other weights"):
        return row["outcome"]
    # Files without checksums, and values that the mutation itself changed, may differ.
    is_protected = form not in ("legacy", "safetensors") and mutation in (f.__name__ for f in BYTES)
    if row["outcome"] == "other weights" and is_protected:
        return "other weights"
    if row["seconds"] > SECONDS:
        return "hang"
    if row["memory"] > 3 * size + ALLOWANCE:
        return f"memory: {row['memory']:,} bytes for a file of {size:,}"
    if row["events"] or row.get("hacked"):
        return f"executed: {row['events']}"
    return None


def run(seeds: dict[str, Path], work_dir: Path, files: int, seed: int) -> Iterator[dict]:
    """One row per file; rows of an earlier run are read, not repeated."""
    log = work_dir / f"rows-{seed}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    yield from rows[:files]
    expected = expected_weights(seeds, work_dir / "whole")
    with log.open("a") as lines:
        for index in range(len(rows), files):
            form, mutation, content = mutated(seeds, seed, index)
            path = work_dir / f"mutated{seeds[form].suffix}"
            path.write_bytes(content)
            folder = work_dir / "child"
            row = in_child(path, seeds[form], folder, expected[form])
            row |= {"hacked": any(path.name == "hacked" for path in folder.rglob("*"))}
            row |= {"index": index, "form": form, "mutation": mutation, "bytes": len(content)}
            row["wrong"] = judge(form, mutation, len(content), row)
            if row["wrong"]:
                path.rename(work_dir / f"wrong-{index}{path.suffix}")

            for name in ("out", "whole"):
                shutil.rmtree(folder / name, ignore_errors=True)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="number of mutated files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/fuzz_convert"), help="working folder")
    parser.add_argument("--output", type=Path, help="JSON file for the summary")
    args = parser.parse_args()
    args.work_dir = args.work_dir.resolve()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch, about sparse and quantized tensors
    seeds = write_seeds(args.work_dir / "seeds")
    rows = []
    for row in run(seeds, args.work_dir, args.files, args.seed):
        rows.append(row)
        if row["wrong"]:
            print(f"{row['index']} {row['form']} {row['mutation']}: {row['wrong']} {row['line'][-600:]}", flush=True)
    table = Counter((row["form"], row["mutation"], row["outcome"]) for row in rows)
    summary = {
        "files": len(rows),
        "seed": args.seed,
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "wrong": dict(Counter(row["wrong"].partition(":")[0] for row in rows if row["wrong"])),
        "largest_seconds": max(row["seconds"] for row in rows),
        "largest_memory_beyond_start": max(row["memory"] for row in rows),
        "table": [
            {"form": form, "mutation": mutation, "outcome": outcome, "files": count}
            for (form, mutation, outcome), count in sorted(table.items())
        ],
    }
    print(json.dumps({key: value for key, value in summary.items() if key != "table"}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(1 if summary["wrong"] else 0)


if __name__ == "__main__":
    main()
