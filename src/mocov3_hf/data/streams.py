"""Read a streamed data set in its order (see `order.py`).

A process, and each of its workers, loads only the shards of the lanes of its rows. It prefetches the next window of
these lanes.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..reporting import RunError
from .bad_images import ImageReader
from .draws import STREAM_SHARD_ROWS, permutation
from .order import StreamOrder, Window


_LOADING_THREADS = 4


class DamagedShardError(RunError):
    """A part of a streamed data set could not be loaded. Only the process that needs it knows."""

    def __init__(self, message: str):
        super().__init__(message, from_any_process=True)


class StreamReader:
    """Reads rows of global batches: a pure function of (epoch, step, rows), with a cache of loaded shards.

    If the sizes of shards are unknown, every shard contributes the same number of rows to an epoch. A longer shard
    skips some rows, different ones in each epoch; a shorter shard repeats some.

    Args:
        source: A `StreamSource`.
        shard_sizes: Returned by `StreamSource.shard_sizes`.
        seed, global_batch_size, window, lanes: Of the order, see `StreamOrder`.
    """

    def __init__(self, source, shard_sizes, seed: int, global_batch_size: int, window: int, lanes: int):
        self.source, self.shard_sizes, self.seed = source, tuple(shard_sizes), seed
        self.global_batch_size, self.window, self.lanes = global_batch_size, window, lanes
        self._sizes_known = source.num_samples is not None
        # Sample ids: the position in the data set if sizes are known, or else shard and row in one number.
        starts = torch.cumsum(torch.tensor((0, *self.shard_sizes)), dim=0).tolist()
        self._first_ids = starts if self._sizes_known else [shard << 32 for shard in range(len(self.shard_sizes))]
        self._reset()

    def _reset(self) -> None:
        self._order: StreamOrder | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._loading: dict[int, Future] = {}
        # Order of rows in shards of unknown size, by (epoch, shard).
        self._row_orders: dict[tuple[int, int], torch.Tensor] = {}
        # Windows whose shards are in memory, by (lane, index).
        self._held: dict[tuple[int, int], Window] = {}

    def __getstate__(self) -> dict:
        # Loaded shards and threads are not sent to a worker.
        state = dict(self.__dict__)
        for name in ("_order", "_pool", "_loading", "_held", "_row_orders"):
            del state[name]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def open_batch(self, epoch: int, step: int, rows: range) -> "StreamBatch":
        """Some rows of the global batch of a step. Loads the required shards and drops the others."""
        if self._order is None or self._order.epoch != epoch:
            self._order = StreamOrder(
                self.shard_sizes, self.seed, epoch, self.global_batch_size, self.window, self.lanes
            )
            self._held.clear()
        places = []
        for lane, slot in self._order.slots(step, rows):
            window = self._order.window_at(lane, slot)
            places.append((window, slot - window.start))
        self._load_windows(places)
        return StreamBatch(self, epoch, places)

    def _load_windows(self, places: list[tuple[Window, int]]) -> None:
        held = {(window.lane, window.index): window for window, _ in places}
        for window, place in places:
            # After the middle of a window, prefetch the next one.
            if 2 * place >= len(window):
                following = self._order.window_after(window)
                if following is not None:
                    held[following.lane, following.index] = following
        if held.keys() == self._held.keys():
            return
        self._held = held
        needed = {shard for window in held.values() for shard in set(window.shards.tolist())}
        self._loading = {shard: future for shard, future in self._loading.items() if shard in needed}
        self._row_orders = {key: order for key, order in self._row_orders.items() if key[1] in needed}
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_LOADING_THREADS, thread_name_prefix="shards")
        for shard in sorted(needed - self._loading.keys()):
            self._loading[shard] = self._pool.submit(self._load, shard)

    def _load(self, shard: int):
        try:
            return self.source.shards[shard].load()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DamagedShardError(
                f"shard {shard} of the stream, {self.source.shards[shard]}, could not be loaded: {reason}"
            ) from error

    def place(self, epoch: int, window: Window, slot: int) -> tuple[int, int]:
        """(shard, row in the shard) of a slot of a loaded window. Waits for the shard only if its size is unknown."""
        shard, row = window.place(slot)
        if self._sizes_known:
            return shard, row
        size = len(self._loading[shard].result())
        if size == 0:
            raise ValueError(f"shard {shard} of the stream holds no images: remove its file from the data set")
        order = self._row_orders.get((epoch, shard))
        if order is None:
            order = permutation(self.seed, epoch, size, STREAM_SHARD_ROWS, start=shard << 32)
            self._row_orders[epoch, shard] = order
        return shard, int(order[row % size])

    def rows_of(self, shard: int) -> Iterator[tuple[int, ImageReader]]:
        """(sample id, what reads it) of the rows of a shard, which is loaded if it is not held."""
        if shard not in self._loading:
            rows = self._load(shard)
            self._loading[shard] = Future()
            self._loading[shard].set_result(rows)
        for row in range(len(self._loading[shard].result())):
            yield self.sample_id(shard, row), ImageReader(self.read, shard, row)

    def sample_id(self, shard: int, row: int) -> int:
        """The sample id of a row."""
        return self._first_ids[shard] + row

    def describe(self, shard: int, row: int) -> str | None:
        """Where a row is, for messages, or None."""
        return self.source.shards[shard].describe(row)

    def read(self, shard: int, row: int) -> bytes | str | None:
        """The encoded image of a row of a loaded shard."""
        return self._loading[shard].result().read(row)


class StreamBatch:
    """Some rows of one global batch, opened by `StreamReader.open_batch`. Valid until the next batch is opened.

    Attributes:
        sample_ids: int64 (B,).
    """

    def __init__(self, reader: StreamReader, epoch: int, slots: list[tuple[Window, int]]):
        self._reader, self._epoch, self._slots = reader, epoch, slots
        ids = [reader.sample_id(*reader.place(epoch, window, slot)) for window, slot in slots]
        self.sample_ids = torch.tensor(ids, dtype=torch.int64)

    def candidates(self, row: int) -> Iterator[tuple[int, ImageReader]]:
        """
        (sample id, what reads it) of a row, then of its replacements: the next rows of its window, and after these, as
        in a lane of few rows, those of the shards that follow.
        """
        window, slot = self._slots[row]
        tried = set()
        for distance in range(len(window)):
            shard, row_in_shard = self._reader.place(self._epoch, window, (slot + distance) % len(window))
            sample_id = self._reader.sample_id(shard, row_in_shard)
            tried.add(sample_id)
            yield sample_id, ImageReader(self._reader.read, shard, row_in_shard)
        number = len(self._reader.shard_sizes)
        for following in range(shard, shard + number):
            for sample_id, reader in self._reader.rows_of(following % number):
                if sample_id not in tried:
                    yield sample_id, reader
