"""Compare the step times that scaling.py estimates with measured ones. Needs root, to create two hosts.

    python -m benchmarks.scaling_check --output benchmarks/results/scaling_cpu.json

A small model trains in one process, and on two hosts (network namespaces) whose link is unlimited or limited by `tc`.
The computation is the step time of one process with the images of one of two. The latency is measured by summing one
number over the unlimited link. The estimate therefore tests the transfer time of the bytes. As the two hosts may have
less than one core each, `estimated_from_unlimited_ms` uses the step time over the unlimited link as the computation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mocov3_hf.pretraining.estimate import Exchange

from .hosts import Hosts, wait, why_not
from .scaling import step_seconds


WORKER = Path(__file__).parent / "scaling_worker.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabits", type=int, nargs="+", default=[100], help="bandwidths of the link in Mbit/s")
    parser.add_argument("--output", type=Path, default=None, help="file for the results")
    parser.add_argument(
        "--or_why_not", action="store_true", help="if hosts cannot be created, write the reason and exit with 0"
    )
    options = parser.parse_args()
    reason = why_not()
    if reason is not None and options.or_why_not and options.output is not None:
        options.output.write_text(f"{json.dumps({'impossible': reason})}\n", encoding="utf-8")
        print(f"skipped: {reason}")
        return
    if reason is not None:
        sys.exit(f"error: {reason}")
    with tempfile.TemporaryDirectory(prefix="scaling_check_") as folder:
        report = check(Path(folder), options.megabits)
    print(json.dumps(report, indent=2))
    if options.output is not None:
        options.output.write_text(f"{json.dumps(report, indent=2)}\n", encoding="utf-8")


def check(folder: Path, megabits: list[int]) -> dict:
    """Estimated and measured step times in ms, for every bandwidth of the link."""
    load = os.getloadavg()[0]
    alone = measure_alone(folder / "alone")
    unlimited = measure_on_two_hosts(folder / "unlimited", None)
    exchanged = [Exchange(**values) for values in unlimited["exchanged"]]
    rows = []
    for rate in megabits:
        measured = measure_on_two_hosts(folder / f"{rate}", f"{rate}mbit")["step_seconds"]
        link = (exchanged, 2, rate * 1e6 / 8)
        latency = unlimited["latency_seconds"]
        rows.append(
            {
                "megabits_per_second": rate,
                "measured_ms": measured * 1e3,
                "estimated_without_overlap_ms": step_seconds(alone["step_seconds"], *link, latency, False) * 1e3,
                "estimated_with_overlap_ms": step_seconds(alone["step_seconds"], *link, latency, True) * 1e3,
                # That step already includes the latencies.
                "estimated_from_unlimited_ms": step_seconds(unlimited["step_seconds"], *link, 0.0, False) * 1e3,
            }
        )
    return {
        "cores": os.cpu_count(),
        "load_before": load,
        "sent_mb": sum(exchange.sent_bytes(2) for exchange in exchanged) / 1e6,
        "latency_us": unlimited["latency_seconds"] * 1e6,
        "one_process_ms": alone["step_seconds"] * 1e3,
        "two_hosts_without_limit_ms": unlimited["step_seconds"] * 1e3,
        "rates": rows,
    }


def measure_alone(output: Path) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(WORKER), str(output)], env=environment, check=True)
    return json.loads(output.read_text(encoding="utf-8"))


def measure_on_two_hosts(output: Path, rate: str | None) -> dict:
    """
    Raises:
        RuntimeError: if a host exits with another code than 0; the message holds its output.
    """
    logs = output.with_suffix(".logs")
    with Hosts(rate) as hosts:
        launches = hosts.start([str(output)], logs, WORKER)
        wait(launches, timeout=300)
    for rank, launch in enumerate(launches):
        if launch.returncode != 0:
            raise RuntimeError(
                f"host {rank} exited with {launch.returncode}:\n{(logs / f'host{rank}.log').read_text()}"
            )
    return json.loads(output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
