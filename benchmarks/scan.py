"""How long does it take to find 1.28 million images in 1000 folders?

Builds a folder of hard links to a few small files on tmpfs or a disk, reads it, and deletes it. Measured are: the scan
itself, the scan from its index, opening it as a data set with labels, a plain walk for comparison, and `datasets` on a
part of it (its time grows in proportion).

    python benchmarks/scan.py --work_dir /dev/shm --output benchmarks/results/scan_cpu.json
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets

from mocov3_hf.data import scan_index
from mocov3_hf.data.fingerprint import fingerprint
from mocov3_hf.data.scan import scan_folder
from mocov3_hf.data.sources import open_source


LINKS_PER_FILE = 50_000  # ext4 allows 65,000


def build(root: Path, num_folders: int, images_per_folder: int) -> None:
    """Folders `n00000000` ... of `n00000000_0.JPEG` ..., all hard links to small files beside them."""
    made = 0
    for folder in range(num_folders):
        path = root / "set" / f"n{folder:08d}"
        path.mkdir(parents=True)
        for image in range(images_per_folder):
            if made % LINKS_PER_FILE == 0:
                original = root / f"file{made}.jpg"
                original.write_bytes(b"\xff\xd8\xff" + bytes(100))
            os.link(original, path / f"{path.name}_{image}.JPEG")
            made += 1


def seconds(function: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median, smallest and largest wall-clock time, and the median of the CPU time."""
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    rounded = {"median": statistics.median(walls), "min": min(walls), "max": max(walls)}
    rounded["cpu"] = statistics.median(cpus)
    return {name: round(value, 3) for name, value in rounded.items()}


def walk(folder: Path) -> list[str]:
    """The names and nothing else: the least that any scan has to do in Python."""
    return sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", default=None, help="where to build the folder; defaults to the temporary folder")
    parser.add_argument("--num_folders", type=int, default=1000)
    parser.add_argument("--images_per_folder", type=int, default=1281)
    parser.add_argument("--datasets_folders", type=int, default=10, help="folders that `datasets` opens; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=None, help="JSON file")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="scan-", dir=options.work_dir))
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    datasets.disable_progress_bars()
    try:
        build(root, options.num_folders, options.images_per_folder)
        result = measure(root / "set", options)
    finally:
        shutil.rmtree(root)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output is not None:
        Path(options.output).write_text(text + "\n", encoding="utf-8")


def measure(folder: Path, options: argparse.Namespace) -> dict:
    number = options.num_folders * options.images_per_folder
    rounds, load = options.rounds, os.getloadavg()[0]
    times = {
        "os.walk": seconds(lambda: walk(folder), rounds),
        "scan": seconds(lambda: scan_folder(folder, progress=False), rounds),
    }
    time.sleep(3)  # a folder that has just changed is not indexed
    scan_index.scan(folder, progress=False)
    times["scan from the index"] = seconds(lambda: scan_index.scan(folder, progress=False), rounds)
    times["open_source, from the index"] = seconds(lambda: open_source(str(folder)), rounds)
    source = open_source(str(folder))
    assert source.num_samples == number
    times["fingerprint"] = seconds(lambda: fingerprint(source), rounds)
    result = {
        "images": number,
        "folders": options.num_folders,
        "seconds": times,
        "images_per_second": round(number / times["scan"]["median"]),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "file_system": "tmpfs" if str(folder).startswith("/dev/shm") else "disk",
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "python": platform.python_version(),
        "datasets": datasets.__version__,
    }
    if options.datasets_folders:
        part = folder.parent / "part"
        part.mkdir()
        for path in sorted(folder.iterdir())[: options.datasets_folders]:
            os.rename(path, part / path.name)
        once = seconds(lambda: datasets.load_dataset("imagefolder", data_dir=str(part)), 1)
        images = options.datasets_folders * options.images_per_folder
        times["load_dataset('imagefolder') of a part"] = once
        result["part_images"] = images
        result["datasets_images_per_second"] = round(images / once["median"])
    return result


if __name__ == "__main__":
    main()
