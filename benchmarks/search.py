"""CPU time of the libraries that search for neighbors, and memory for a million features.

    python benchmarks/search.py [--rows 10000] [--output FILE.json]

Random features of width 384 on one core. Time: the 10 neighbors of all rows among each other, in alternation. Memory:
`--queries` rows against a million rows in float16, each library in a process of its own; reported is the highest
resident set above that with the features alone. The last line is the result as JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from step import cpu_name

from mocov3_hf.metrics.search import nearest_others, search


LIBRARIES = ("torch", "sklearn", "faiss")
WIDTH = 384


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(library: str, rows: int, queries: int) -> dict[str, float]:
    """In this process: MB of the features, and the highest resident set above what was there with them."""
    search(torch.randn(8, WIDTH), torch.randn(64, WIDTH), 5, backend=library)  # imports
    bank = torch.empty(rows, WIDTH, dtype=torch.float16)
    for part in bank.split(10_000):
        part.copy_(torch.randn(len(part), WIDTH))
    before = megabytes()
    start = time.process_time()
    search(bank[:queries], bank, 11, backend=library)
    seconds = time.process_time() - start
    return {"features_mb": bank.nbytes / 2**20, "more_mb": megabytes() - before, "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large_rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--memory_of", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--output", help="file to which the JSON is written as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(memory(options.memory_of, options.large_rows, options.queries)))
        return
    features = torch.randn(options.rows, WIDTH, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    for index in range(options.rounds + 1):
        for name in LIBRARIES[:: 1 if index % 2 else -1]:
            start = time.process_time()
            nearest_others(features, 10, backend=name)
            if index:
                seconds[name].append(time.process_time() - start)
    result = {
        "device": f"one core of {cpu_name()}",
        "versions": {name: version(name) for name in ("torch", "scikit-learn", "faiss-cpu")},
        "rows": options.rows,
        "width": WIDTH,
        "cpu_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "large": {"rows": options.large_rows, "queries": options.queries, "libraries": {}},
    }
    sizes = ["--large_rows", str(options.large_rows), "--queries", str(options.queries)]
    for name in LIBRARIES:
        command = [sys.executable, __file__, "--memory_of", name, *sizes]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result["large"]["libraries"][name] = json.loads(answer.stdout)
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
