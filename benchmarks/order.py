"""
Time, memory and shuffling quality of the order of samples, next to the sorted random numbers of version 0.1.

    python benchmarks/order.py --output benchmarks/results/order_cpu.json

Entering: from (seed, epoch) to the samples of the first, a middle and the last step of an epoch, map-style and
streamed. Memory is the peak, in addition to what the process had.

Quality: statistics of many permutations, by the Feistel network and by sorting, with different seeds and epochs. `p`
is that of a Kolmogorov-Smirnov test between both. Of 100 of them, one below 0.01 is expected by chance.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from scipy import stats

from mocov3_hf.data.draws import STREAM_SAMPLE_ORDER, permutation, random_words
from mocov3_hf.data.order import StreamOrder, sample_order, samples_of_step, steps_in_epoch


BATCH = 4096
BINS = 16


def sorted_permutation(seed: int, epoch: int, length: int, stream: int = STREAM_SAMPLE_ORDER) -> torch.Tensor:
    """The order of version 0.1: positions sorted by 63-bit random numbers."""
    words = random_words(seed, epoch, torch.arange(length), stream, 2)
    return torch.sort((words[:, 0] << 31) ^ words[:, 1], stable=True).indices


def feistel_permutation(seed: int, epoch: int, length: int) -> torch.Tensor:
    return permutation(seed, epoch, length, STREAM_SAMPLE_ORDER)


def same(first: torch.Tensor, second: torch.Tensor, distance: int) -> float:
    """How often the second is `distance` from the first, in either direction."""
    return float(((second - first).abs() == distance).sum())


def chi_square(first: torch.Tensor, second: torch.Tensor, num_first: int, num_second: int) -> float:
    """Of independence, for a table of counts with up to BINS bins of each; both range over 0 .. num - 1."""
    bins = min(BINS, num_first, num_second)
    cells = first * bins // num_first * bins + second * bins // num_second
    observed = torch.bincount(cells, minlength=bins * bins).reshape(bins, bins).double()
    expected = observed.sum(1, keepdim=True) * observed.sum(0) / observed.sum()
    return float(((observed - expected) ** 2 / expected).sum())


def cycles(order: torch.Tensor) -> int:
    following, found = order.tolist(), 0
    seen = bytearray(len(following))
    for start in range(len(following)):
        found += not seen[start]
        while not seen[start]:
            seen[start] = 1
            start = following[start]
    return found


def statistics(order: torch.Tensor, following: torch.Tensor) -> dict[str, float]:
    """
    What a permutation shuffles, in numbers.

    Args:
        order: int64 (N,), N at least 100.
        following: int64 (N,), the one of the next epoch.

    Returns:
        Mean displacement over N; descents; fixed points; cycles; chi-square of elements against positions, in blocks
        and by row and column of the Feistel table, and of the places of an element in both epochs; how many
        neighbors, also those one row of the table apart, are neighbors again or share a batch of N/16.
    """
    length, positions, width = len(order), torch.arange(len(order)), math.isqrt(len(order) - 1) + 1
    where, batch = order.argsort(), max(2, len(order) // 16)
    found = {
        "displacement": float((order - positions).abs().double().mean()) / length,
        "descents": float((order[1:] < order[:-1]).sum()),
        "fixed points": float((order == positions).sum()),
        "cycles": float(cycles(order)),
        "chi-square, blocks": chi_square(positions, order, length, length),
        "chi-square, columns": chi_square(positions % width, order % width, width, width),
        "chi-square, column to row": chi_square(positions % width, order // width, width, width),
        "chi-square, two epochs": chi_square(where, following.argsort(), length, length),
    }
    for name, step in {"next": 1, "one row apart": width}.items():
        found[f"neighbors, {name}"] = same(order[:-step], order[step:], 1)
        found[f"rows apart, {name}"] = same(order[:-step], order[step:], width)
        found[f"same batch, {name}"] = float((where[:-step] // batch == where[step:] // batch).sum())
    return found


def collect(shuffle, length: int, repetitions: int) -> dict[str, list[float]]:
    """`statistics` for two epochs of many seeds, and of many epochs of two seeds."""
    rows = []
    for index in range(repetitions):
        seed, epoch = (index, 0) if index % 2 else (index // 2 % 2, index)
        rows.append(statistics(shuffle(seed, epoch, length), shuffle(seed, epoch + 1, length)))
    return {name: [row[name] for row in rows] for name in rows[0]}


def expected(length: int) -> dict[str, float]:
    """Means of a uniformly random permutation, where they are simple."""
    return {
        "displacement": (length**2 - 1) / (3 * length) / length,
        "descents": (length - 1) / 2,
        "fixed points": 1.0,
        "cycles": sum(1 / k for k in range(1, length + 1)),
        "neighbors, next": 2 * (length - 1) / length,
    }


def compare(length: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Every statistic of both forms: mean, standard error of the mean, and p that they have one distribution."""
    ours, theirs = (collect(shuffle, length, repetitions) for shuffle in (feistel_permutation, sorted_permutation))
    table = {}
    for name in ours:
        pair = [torch.tensor(values, dtype=torch.float64) for values in (ours[name], theirs[name])]
        table[name] = {
            "feistel": round(float(pair[0].mean()), 5),
            "sorted": round(float(pair[1].mean()), 5),
            "standard_error": round(float(pair[0].std() / math.sqrt(repetitions)), 5),
            "p": round(float(stats.ks_2samp(ours[name], theirs[name]).pvalue), 4),
        }
        if name in expected(length):
            table[name]["expected"] = round(expected(length)[name], 5)
    return table


def position_chi_square(shuffle, length: int, sample: int, repetitions: int) -> float:
    """p that the place of one sample is uniform: in BINS blocks, over epochs."""
    element = torch.tensor([sample])
    counts = torch.zeros(BINS)
    for epoch in range(repetitions):
        counts[int(shuffle(0, epoch, length, element)) * BINS // length] += 1
    edges = [-(-block * length // BINS) for block in range(BINS + 1)]
    chances = [(stop - start) / length for start, stop in itertools.pairwise(edges)]
    return float(stats.chisquare(counts.numpy(), [chance * repetitions for chance in chances]).pvalue)


def feistel_at(seed: int, epoch: int, length: int, positions: torch.Tensor) -> torch.Tensor:
    return sample_order(seed, epoch, length).at(positions)


def all_orders_chi_square(shuffle, length: int, repetitions: int) -> float:
    """p that all orders of a few elements are equally frequent."""
    counts = dict.fromkeys(itertools.permutations(range(length)), 0)
    for seed in range(repetitions):
        counts[tuple(shuffle(seed, 0, length).tolist())] += 1
    return float(stats.chisquare(list(counts.values())).pvalue)


def measured(function) -> tuple[float, int]:
    """CPU seconds of the second call, and memory of the first at its peak, in bytes more than before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    function()
    memory, start = status("VmHWM") - before, time.process_time()
    function()
    return time.process_time() - start, memory


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def enter(length: int) -> dict:
    """Enter an epoch at the first, a middle and the last step."""
    steps, rows = steps_in_epoch(length, BATCH), range(BATCH)
    found = {}
    for name, step in {"first": 0, "middle": steps // 2, "last": steps - 1}.items():
        seconds, memory = measured(lambda s=step: samples_of_step(sample_order(0, 1, length), s, rows, BATCH))
        found[name] = {"seconds": round(seconds, 4), "MB": round(memory / 1e6, 1)}
    order = sample_order(0, 1, length)
    found["per_step_of_256"] = round(measured(lambda: samples_of_step(order, steps // 3, range(256), BATCH))[0], 6)
    return found


def enter_stream(num_shards: int, rows_per_shard: int) -> dict:
    """The same for a stream. The places are those of the rows of one process of 16."""
    sizes = (rows_per_shard,) * num_shards

    def last_step():
        order = StreamOrder(sizes, 0, 1, BATCH, window=8, lanes=16)
        order.places(order.steps - 1, range(BATCH // 16))

    seconds, memory = measured(last_step)
    return {
        "shards": num_shards,
        "rows_per_shard": rows_per_shard,
        "seconds": round(seconds, 4),
        "MB": round(memory / 1e6, 1),
    }


def enter_sorted(length: int) -> dict:
    seconds, memory = measured(lambda: sorted_permutation(0, 1, length))
    return {"seconds": round(seconds, 3), "MB": round(memory / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    parser.add_argument("--output", type=Path, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    share = 10 if options.quick else 1
    results: dict = {
        "repetitions": "a tenth" if options.quick else "all",
        "entering": {f"{length:.0e}": enter(length) for length in (10**6, 10**9)},
        "entering_a_stream_of_1e9": [enter_stream(100_000, 10_000), enter_stream(1000, 1_000_000)],
        "entering_before": {f"{length:.0e}": enter_sorted(length) for length in (10**6, 10**7)},
        "quality": {
            str(length): compare(length, repetitions // share)
            for length, repetitions in {100: 4000, 1000: 2000, 10_007: 1000, 65_536: 200}.items()
        },
        "place_of_a_sample_p": {
            f"{sample} of {length}": round(position_chi_square(feistel_at, length, sample, 20_000 // share), 4)
            for length, samples in {1000: (0, 1, 500, 999), 1_281_167: (0, 1132, 640_000)}.items()
            for sample in samples
        },
        "all_orders_p": {
            length: round(all_orders_chi_square(feistel_permutation, length, 20_000 // share), 4)
            for length in (2, 3, 4, 5)
        },
    }
    text = json.dumps(results, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
