"""Decode damaged images of every format: no crash, no hang, bounded memory, and the pixels of PIL.

    python benchmarks/fuzz_decode.py --files 20000 [--seed 0] [--processes 2] [--output FILE.json]

File number i of a seed is always the same, see `damaged_images.py`. Each is decoded in a child process, which the
parent replaces if it dies or takes longer than 10 seconds; that file is counted and kept in --keep. What `decode_rgb`
returns is compared with `ImageOps.exif_transpose(image).convert("RGB")`: both must accept the same files, except for
those that a limit of `data/decode_limits.py` refuses, and the pixels must be equal. An image whose metadata PIL cannot
write after turning it is accepted: `decode_rgb` does not write metadata.

--state FILE makes the run resumable: finished files are not decoded again. `--show I` writes file I to --keep.
"""

import argparse
import io
import json
import os
import re
import select
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from damaged_images import damaged, originals
from PIL import Image, ImageOps, features


MAX_PIXELS = 4_000_000
SECONDS = 10
STARTING = 600  # seconds until the first file of a child, on a busy machine
# Resident memory that decoding may add: 12 bytes per allowed pixel (see `decode_limits.py`), and 32 MiB for libraries.
MAX_MEMORY = 12 * MAX_PIXELS + (32 << 20)


def by_pil(data: bytes, formats) -> tuple[np.ndarray | str, bool]:
    """
    The pixels, or why PIL refuses the file; and whether all was well except for the metadata, which PIL writes itself
    when it turns an image.
    """
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # to PIL's transpositions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    return "too large", False
                image.load()  # once: after an error, PIL returns what it has decoded
                try:
                    return np.asarray(ImageOps.exif_transpose(image).convert("RGB")), False
                except Exception:
                    turned = image.transpose(turns[image.getexif()[0x0112]])
                    return np.asarray(turned.convert("RGB")), True
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:80]}", False


def check(data: bytes, shrink: bool) -> tuple[str, str, int, float]:
    """(outcome, reason, bytes of memory, seconds) of one file."""
    from mocov3_hf.data import decode
    from mocov3_hf.data.decode_limits import LimitError

    reset_peak()
    before, start, limited = resident("VmRSS"), time.perf_counter(), False
    try:
        ours = decode.decode_rgb(data, MAX_PIXELS).permute(1, 2, 0).numpy()
    except decode.BadImageError as error:
        ours, limited = str(error), isinstance(error.__cause__, (LimitError, Image.DecompressionBombError))
    seconds, memory = time.perf_counter() - start, resident("VmHWM") - before
    if isinstance(ours, str) and (not ours.isprintable() or "BytesIO" in ours or len(ours) > 400):
        return "bad message", ours, memory, seconds
    if shrink and data[:3] == b"\xff\xd8\xff":  # only for what it must not do: crash
        large, decode._LARGE = decode._LARGE, 0
        try:
            decode.decode_shrunk(data, lambda height, width: 2, MAX_PIXELS)
        except decode.BadImageError:
            pass
        finally:
            decode._LARGE = large
    theirs, is_only_metadata = by_pil(
        data, [name for name in decode.FORMATS if name in Image.OPEN or not Image.init()]
    )
    if isinstance(ours, str) and isinstance(theirs, str):
        return "both refuse", "", memory, seconds
    if isinstance(ours, str):
        return ("limit" if limited else "only PIL accepts"), ours, memory, seconds
    if isinstance(theirs, str):
        return "only ours accepts", theirs, memory, seconds
    if not np.array_equal(ours, theirs):
        return "different", "", memory, seconds
    return ("equal, but PIL fails to write the metadata" if is_only_metadata else "equal"), "", memory, seconds


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def child(indices: list[int], seed: int) -> None:
    """Report `+ INDEX` before and a JSON line after each file, on the standard output."""
    import torch

    torch.set_num_threads(1)
    found = originals()
    check(found["jpeg"], True)
    for index in indices:
        name, damage, data = damaged(index, seed, found)
        print(f"+ {index}", flush=True)
        outcome, reason, memory, seconds = check(data, index % 3 == 0)
        line = {"file": index, "name": name, "damage": damage, "outcome": outcome, "reason": reason}
        print(json.dumps({**line, "bytes": len(data), "memory": memory, "seconds": round(seconds, 4)}), flush=True)


class Children:
    """Runs files in a child process and starts another one if it dies or hangs."""

    def __init__(self, indices: list[int], seed: int):
        self.left, self.seed, self.results = list(indices), seed, []
        self.process, self.current, self.deadline = None, None, 0.0
        self._start()

    def _start(self) -> None:
        command = [sys.executable, __file__, "--child", "--seed", str(self.seed)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.process.stdin.write(json.dumps(self.left) + "\n")
        self.process.stdin.close()
        self.current, self.deadline = None, time.monotonic() + STARTING

    def take(self) -> bool:
        """Handle one line; False at the end."""
        line = self.process.stdout.readline()
        if line.startswith("+"):
            self.current, self.deadline = int(line[2:]), time.monotonic() + SECONDS
        elif line:
            self.results.append(json.loads(line))
            self.left.remove(self.current)
            self.current, self.deadline = None, time.monotonic() + STARTING
        else:
            code = self.process.wait()
            if code == 0 and not self.left:
                return False
            self._lost(f"the process ended with {code}")
        return True

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            self.process.kill()
            self.process.wait()
            self._lost("hang")

    def _lost(self, why: str) -> None:
        if self.current is None:
            raise RuntimeError(f"the child process failed outside of a file: {why}")
        outcome = "hang" if why == "hang" else "crash"
        self.results.append({"file": self.current, "outcome": outcome, "reason": why, "memory": 0, "seconds": 0.0})
        self.left.remove(self.current)
        self._start()


def run(indices: list[int], seed: int, processes: int, state: Path | None) -> list[dict]:
    children = [Children(part, seed) for part in (indices[start::processes] for start in range(processes)) if part]
    active, results, written = list(children), [], time.monotonic()
    while active:
        ready, _, _ = select.select([one.process.stdout for one in active], [], [], 1)
        for one in list(active):
            if one.process.stdout in ready and not one.take():
                active.remove(one)
            else:
                one.check_time()
            results += one.results
            if state is not None and one.results:
                with open(state, "a") as file:
                    file.writelines(json.dumps(result) + "\n" for result in one.results)
            one.results = []
        if time.monotonic() - written > 30:
            written = time.monotonic()
            print(f"{len(results)} files: {dict(Counter(result['outcome'] for result in results))}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--state", type=Path, help="file of finished results, to continue an interrupted run")
    parser.add_argument("--output", type=Path, help="JSON file of the summary")
    parser.add_argument("--keep", type=Path, default=Path("fuzz"), help="folder for files that failed")
    parser.add_argument("--show", type=int, nargs="*", help="write these files to --keep, and stop")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(sys.stdin.readline()), options.seed)
        return
    found = originals()
    if options.show is not None:
        keep(options.show, options, found)
        return
    done = {}
    if options.state is not None and options.state.exists():
        done = {result["file"]: result for result in map(json.loads, options.state.read_text().splitlines())}
    start = time.time()
    left = [index for index in range(options.files) if index not in done]
    for result in run(left, options.seed, options.processes, options.state):
        done[result["file"]] = result
    results = [done[index] for index in range(options.files)]
    summary = summarize(results, len(found))
    summary = {
        "files": options.files,
        "seed": options.seed,
        "minutes": round((time.time() - start) / 60, 1),
        **summary,
    }
    keep([result["file"] for result in results if failed(result)], options, found)
    if options.output is not None:
        options.output.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    sys.exit(any(failed(result) for result in results))


def failed(result: dict) -> bool:
    if result["memory"] > MAX_MEMORY or result["seconds"] > SECONDS:
        return True
    return not result["outcome"].startswith(("equal", "both refuse", "limit"))


def summarize(results: list[dict], num_originals: int) -> dict:
    from mocov3_hf import __version__

    versions = {"mocov3_hf": __version__, "pillow": Image.__version__}
    versions |= {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "zlib", "libtiff", "webp", "avif")}
    reasons = Counter(re.sub(r"\d+", "N", result["reason"])[:80] for result in results if result["outcome"] == "limit")
    return {
        "versions": versions,
        "originals": num_originals,
        "outcomes": dict(Counter(result["outcome"] for result in results)),
        "crashes": sum(result["outcome"] == "crash" for result in results),
        "hangs": sum(result["outcome"] == "hang" for result in results),
        "most_memory_bytes": max(result["memory"] for result in results),
        "allowed_memory_bytes": MAX_MEMORY,
        "most_seconds": max(result["seconds"] for result in results),
        "by_damage": dict(Counter(result.get("damage", "lost") for result in results)),
        "limits": dict(reasons.most_common(20)),
        "failures": [result for result in results if failed(result)][:50],
    }


def keep(indices: list[int], options, found: dict[str, bytes]) -> None:
    for index in indices[:200]:
        options.keep.mkdir(parents=True, exist_ok=True)
        name, damage, data = damaged(index, options.seed, found)
        (options.keep / f"{index}_{name.replace(' ', '_').replace(';', '')}_{damage}").write_bytes(data)


if __name__ == "__main__":
    main()
