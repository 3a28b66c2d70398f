"""The order of samples: pure functions of (seed, epoch), identical in every run, worker and process.

Map-style: each epoch is one permutation of the data set, split into global batches.

Streamed: the shards are permuted and concatenated, and the sequence is split into `lanes` of equal length. Within a
lane, the rows of each window of consecutive shards are permuted. A global batch takes the same number of rows from
every lane, next to each other. Therefore a process needs only the lanes of its rows, all lanes have the same length
even if shards do not, and a position is computed: there is no shuffle buffer whose state a resumed run would need.

Permutations are evaluated per position (`draws.Permutation`): the order of a whole epoch is never in memory, and any
step of it is reached at once.

In both cases an epoch has num_samples // global_batch_size steps. The remaining samples are dropped; they differ from
epoch to epoch because the permutation does.
"""

import itertools
from functools import lru_cache

import torch

from .draws import STREAM_SAMPLE_ORDER, STREAM_SHARD_ORDER, STREAM_WINDOW_ORDER, Permutation, permutation


# Changes with the order of any (seed, epoch). Checkpoints hold it, so that no run changes its order unnoticed.
# 1: random numbers were sorted (0.1). 2: a Feistel network.
ORDER_VERSION = 2
_CHUNK = 1024


def sample_order(seed: int, epoch: int, num_samples: int) -> Permutation:
    """Map-style order of an epoch."""
    return Permutation(seed, epoch, num_samples, STREAM_SAMPLE_ORDER)


def samples_of_step(order: Permutation, step: int, rows: range, global_batch_size: int) -> torch.Tensor:
    """Samples of some rows of the global batch of a step, map-style: int64 (len(rows),)."""
    start = step * global_batch_size
    return order.at(torch.arange(start + rows.start, start + rows.stop, dtype=torch.int64))


def steps_in_epoch(num_samples: int, global_batch_size: int) -> int:
    """Number of full global batches in an epoch.

    Raises:
        ValueError: There is no full batch.
    """
    if num_samples < global_batch_size:
        raise ValueError(
            f"the global batch size {global_batch_size} is larger than the data set of {num_samples} images: "
            f"lower it to at most {num_samples} (batch size per device times number of processes)"
        )
    return num_samples // global_batch_size


def rows_of_process(global_batch_size: int, process_index: int = 0, num_processes: int = 1) -> range:
    """Rows of each global batch that belong to a process.

    They are contiguous: concatenated in rank order, the rows of all processes are the global batch.

    Raises:
        ValueError: The batch does not divide evenly, or the process does not exist.
    """
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process_index must be in [0, {num_processes}), got {process_index}")
    if global_batch_size < 1 or global_batch_size % num_processes:
        nearest = max(1, round(global_batch_size / num_processes)) * num_processes
        raise ValueError(
            f"the global batch size {global_batch_size} is not divisible by {num_processes} processes: choose a "
            f"multiple of {num_processes}, for example {nearest}"
        )
    size = global_batch_size // num_processes
    return range(process_index * size, (process_index + 1) * size)


def split_rows(rows: range, num_parts: int) -> list[range]:
    """Split rows into contiguous, nearly equal, non-empty parts, one for each worker."""
    num_parts = max(1, min(num_parts, len(rows)))
    bounds = [rows.start + len(rows) * part // num_parts for part in range(num_parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def default_lanes(global_batch_size: int, at_most: int = 16) -> int:
    """The largest divisor of the global batch size up to `at_most`.

    It must not depend on the number of processes, because the order depends on it.
    """
    return max(lanes for lanes in range(1, at_most + 1) if global_batch_size % lanes == 0)


class Window:
    """A part of a lane whose rows are permuted together.

    Args:
        lane, index: The lane, and the position of the window in it.
        start: First slot of the window in the lane.
        order: Of the rows of the window.
        shards: int64 (M,), shards with rows in the window, in the order of the sequence.
        begins: int64 (M,), positions of the first rows of these shards relative to the window, the first <= 0.
    """

    def __init__(
        self, lane: int, index: int, start: int, order: Permutation, shards: torch.Tensor, begins: torch.Tensor
    ):
        self.lane, self.index, self.start, self.shards = lane, index, start, shards
        self._order, self._begins = order, begins
        # Slots are read one after another, and evaluated many at once.
        self._chunk = lru_cache(maxsize=2)(self._chunk_uncached)

    def __len__(self) -> int:
        return len(self._order)

    def place(self, slot: int) -> tuple[int, int]:
        """(shard, row in the shard) of a slot (0 .. len - 1) of the window."""
        shards, rows = self._chunk(slot // _CHUNK)
        return shards[slot % _CHUNK], rows[slot % _CHUNK]

    def _chunk_uncached(self, chunk: int) -> tuple[list[int], list[int]]:
        positions = self._order.at(torch.arange(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self))))
        place = torch.searchsorted(self._begins, positions, right=True) - 1
        return self.shards[place].tolist(), (positions - self._begins[place]).tolist()


class StreamOrder:
    """The streamed order of one epoch.

    Args:
        shard_sizes: Rows of each shard, possibly 0.
        seed, epoch: Of the order.
        global_batch_size: Samples per step over all processes.
        window: Number of shards whose rows are mixed.
        lanes: Number of lanes. Must divide `global_batch_size`.

    Raises:
        ValueError: `window` or `lanes` is not valid.
    """

    def __init__(
        self, shard_sizes: tuple[int, ...], seed: int, epoch: int, global_batch_size: int, window: int, lanes: int
    ):
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, got {window}")
        if lanes < 1 or global_batch_size % lanes:
            raise ValueError(f"lanes must divide the global batch size {global_batch_size}, got {lanes}")
        self.seed, self.epoch, self.window = seed, epoch, window
        self.rows_per_lane = global_batch_size // lanes
        sizes = torch.tensor(shard_sizes, dtype=torch.int64)
        self._shards = permutation(seed, epoch, len(sizes), STREAM_SHARD_ORDER)
        self._shards = self._shards[sizes[self._shards] > 0]
        self._ends = torch.cumsum(sizes[self._shards], dim=0)
        self._begins = self._ends - sizes[self._shards]
        self.lane_length = int(sizes.sum()) // lanes
        self.steps = self.lane_length // self.rows_per_lane
        # Bounds of the windows of each lane, as positions in the sequence of permuted shards.
        self._bounds = [self._window_bounds(lane) for lane in range(lanes)]
        self._make_window = lru_cache(maxsize=2 * lanes)(self._make_window_uncached)

    def _window_bounds(self, lane: int) -> torch.Tensor:
        start, stop = lane * self.lane_length, (lane + 1) * self.lane_length
        # Ends of shards inside the lane. Every `window`-th of them ends a window.
        inside = self._ends[(self._ends > start) & (self._ends < stop)]
        closing = inside[self.window - 1 :: self.window]
        return torch.cat([torch.tensor([start]), closing, torch.tensor([stop])])

    def _make_window_uncached(self, lane: int, index: int) -> Window:
        start, stop = self._bounds[lane][index : index + 2].tolist()
        order = Permutation(self.seed, self.epoch, stop - start, STREAM_WINDOW_ORDER, start=start)
        first, last = torch.searchsorted(self._ends, torch.tensor([start, stop - 1]), right=True).tolist()
        shards, begins = self._shards[first : last + 1], self._begins[first : last + 1] - start
        return Window(lane, index, start - lane * self.lane_length, order, shards, begins)

    def window_at(self, lane: int, slot: int) -> Window:
        """The window with a slot (0 .. lane_length - 1) of a lane."""
        position = torch.tensor(lane * self.lane_length + slot)
        index = int(torch.searchsorted(self._bounds[lane], position, right=True)) - 1
        return self._make_window(lane, index)

    def window_after(self, window: Window) -> Window | None:
        """The next window of the same lane, or None after the last."""
        if window.index + 2 >= len(self._bounds[window.lane]):
            return None
        return self._make_window(window.lane, window.index + 1)

    def slots(self, step: int, rows: range) -> list[tuple[int, int]]:
        """(lane, slot in the lane) of some rows of the global batch of a step."""
        return [(row // self.rows_per_lane, step * self.rows_per_lane + row % self.rows_per_lane) for row in rows]

    def places(self, step: int, rows: range) -> list[tuple[int, int]]:
        """(shard, row in the shard) of some rows of the global batch of a step."""
        found = []
        for lane, slot in self.slots(step, rows):
            window = self.window_at(lane, slot)
            found.append(window.place(slot - window.start))
        return found
