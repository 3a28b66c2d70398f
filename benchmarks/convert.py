"""
Time and peak memory of converting full-size checkpoints, one separate process per layout.

    python benchmarks/convert.py --output benchmarks/results/convert_cpu.json

The weights come from `tests/fixtures/fill.py`: the files have the sizes and parameter names of the published ones.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.fixtures.fill import filled_state_dict  # noqa: E402


def write_source(layout: Path, file: Path) -> None:
    """Save the layout as its codebase does."""
    state_dict = filled_state_dict(layout)
    if layout.stem.startswith("mmpretrain"):
        torch.save({"meta": {"epoch": 300}, "state_dict": state_dict}, file)
    else:
        wrapped = {f"module.{name}": value for name, value in state_dict.items()}
        torch.save({"epoch": 300, "arch": layout.stem, "state_dict": wrapped}, file)


def convert(file: Path, folder: Path) -> dict:
    """Run one conversion, in the child process."""
    from mocov3_hf.interop import convert_checkpoint

    start = time.perf_counter()
    report = convert_checkpoint(file, folder)
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": peak_memory_mb(),
        "parameters": sum(part["parameters"] for part in report["parts"]),
        "bytes": sum(part["bytes"] for part in report["parts"]),
    }


def peak_memory_mb() -> float:
    """Peak resident memory of this process, including mapped files; `ru_maxrss` would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work_dir", type=Path, default=Path("/tmp/conversions"), help="working folder, for files of several GB"
    )
    parser.add_argument("--only", default="", help="run only layouts whose name contains this")
    parser.add_argument("--output", type=Path, help="write the results to this file")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(convert(*args.child)))
        return
    from mocov3_hf.results import hardware, package_versions

    args.work_dir.mkdir(parents=True, exist_ok=True)
    layouts = {}
    print(f"{'layout':58} {'parameters':>12} {'file MB':>8} {'seconds':>8} {'peak MB':>8}")
    for layout in sorted((ROOT / "tests" / "fixtures" / "layouts").glob("*.json")):
        if args.only not in layout.stem:
            continue
        file, folder = args.work_dir / "source.pth", args.work_dir / "out"
        write_source(layout, file)
        command = [sys.executable, __file__, "--child", file, folder]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = file.stat().st_size / 1e6
        layouts[layout.stem] = {"file_mb": size, **row}
        print(
            f"{layout.stem:58} {row['parameters']:>12,} {size:>8.0f} {row['seconds']:>8.1f} {row['peak_mb']:>8.0f}",
            flush=True,
        )
        file.unlink()
        shutil.rmtree(folder)
    if args.output is not None:
        results = {"hardware": hardware(), "versions": package_versions(), "layouts": layouts}
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
