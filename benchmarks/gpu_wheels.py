"""Wheels for a GPU machine without internet, which has PyTorch and the usual packages but not all that we need.

    python -m benchmarks.gpu_wheels DIR [--python_version 3.12] [--limit_mib 64]

Downloads the versions that are installed here, without their dependencies, and prints the command that installs them
there. Fails if they are larger than the limit.
"""

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path


PACKAGES = ("datasets", "dill", "evaluate", "multiprocess")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES))
    parser.add_argument("--python_version", default="3.12", help="of the other machine")
    parser.add_argument("--limit_mib", type=float, default=64.0)
    options = parser.parse_args()
    wanted = [f"{name}=={metadata.version(name)}" for name in options.packages]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", options.python_version, "--implementation", "cp", "--dest", str(options.folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *wanted], check=True)
    mib = sum(path.stat().st_size for path in options.folder.glob("*.whl")) / 2**20
    print(f"{mib:.1f} MiB in {options.folder}: {', '.join(wanted)}")
    if mib > options.limit_mib:
        sys.exit(f"error: more than {options.limit_mib:.0f} MiB: name fewer --packages")
    print(f"there: pip install --no-index --no-deps --target site {options.folder}/*.whl")


if __name__ == "__main__":
    main()
