"""The data loader of pre-training: pairs of views and their parameters, for one process of possibly many.

Every batch is a pure function of (seed, epoch, step). It does not depend on prefetching, pinned memory, the number of
workers or the number of processes. Do not `prepare` the loader with accelerate: it is already split by process.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset

from ..processing import PixelFormat
from .bad_images import BadImageLog
from .device_cache import DeviceCache
from .draws import Permutation
from .order import default_lanes, rows_of_process, sample_order, samples_of_step, split_rows, steps_in_epoch
from .pixels import RGB8
from .sources import MapSource, StreamSource
from .streams import StreamReader
from .views import ViewSettings, make_views
from .workers import LostWorkerError, iterate


class TwoViewLoader:
    """Batches of two views for one process.

    Args:
        source: A `MapSource` or a `StreamSource`.
        settings: (view 1, view 2), as returned by `two_views`, with equal image sizes.
        global_batch_size: Samples per step over all processes.
        process_index, num_processes: Rank of this process and the number of processes.
        num_workers: Worker processes that decode images; 0 decodes in this process.
        seed: Seed of order and views.
        steps_per_epoch: At most the number of full batches, which is the default. Required if the length of a stream
            is unknown.
        on_bad_image, max_bad_fraction, bad_images_file: See `BadImageLog`.
        pin_memory: Return tensors in pinned memory, so that copies to a GPU are asynchronous.
        cache_on_device: Keep all decoded images on this device and crop them there, without workers. See
            `DeviceCache`.
        prefetch_factor: Batches that each worker prepares in advance.
        multiprocessing_context: Start method of workers ("fork", "forkserver", "spawn"); None for Python's default.
        pixel_format: Of the images; 8-bit RGB without it.
        window, lanes: Of a stream, see `StreamOrder`. `lanes` defaults to the largest divisor of the batch up to 16.

    Attributes:
        num_filled_images: Images so far in which values without data were filled, counted whenever they are decoded.

    Raises:
        ValueError: Sizes do not fit together.
    """

    def __init__(
        self,
        source: MapSource | StreamSource,
        settings: tuple[ViewSettings, ViewSettings],
        *,
        global_batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        on_bad_image: str = "skip",
        max_bad_fraction: float = 0.01,
        bad_images_file=None,
        pin_memory: bool = False,
        cache_on_device: torch.device | str | None = None,
        prefetch_factor: int = 2,
        multiprocessing_context: str | None = None,
        pixel_format: PixelFormat = RGB8,
        window: int = 8,
        lanes: int | None = None,
    ):
        if settings[0].image_size != settings[1].image_size:
            raise ValueError(f"both views must have the same image size, got {[view.image_size for view in settings]}")
        self.source, self.settings, self.seed = source, settings, seed
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = _checked_steps(source.num_samples, global_batch_size, steps_per_epoch)
        self._rows = rows_of_process(global_batch_size, process_index, num_processes)
        self._is_stream = isinstance(source, StreamSource)
        num_samples = source.num_samples or self.steps_per_epoch * global_batch_size
        self._bad = BadImageLog(num_samples, on_bad_image, max_bad_fraction, bad_images_file)
        self._pin_memory = pin_memory
        self._parts = [self._rows]
        self.lost_worker: LostWorkerError | None = None
        self._is_alone = num_processes == 1
        self.num_filled_images = 0
        self._cache = None
        if cache_on_device is not None:
            self._cache = DeviceCache(source, cache_on_device, pixel_format=pixel_format)
            self._bad.add(self._cache.bad)
            self.num_filled_images = self._cache.num_filled
            return
        if self._is_stream:
            sizes = source.shard_sizes(self.steps_per_epoch * global_batch_size)
            lanes = lanes or default_lanes(global_batch_size)
            reader = StreamReader(source, sizes, seed, global_batch_size, window, lanes)
            # Each worker prepares its part of every batch, so that it reads only the shards of its own lanes.
            self._parts = split_rows(self._rows, num_workers)
            num_workers = min(num_workers, len(self._parts))
            batches = _StreamBatches(reader, settings, seed, pixel_format)
        else:
            batches = _MapBatches(source, settings, seed, pixel_format)
        self._requests = _Requests()
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=self._requests,
            collate_fn=_unchanged,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers > 0 else None,
            pin_memory=pin_memory and len(self._parts) == 1,
            multiprocessing_context=multiprocessing_context if num_workers > 0 else None,
        )

    @property
    def num_bad_images(self) -> int:
        """Bad images found so far, each counted once."""
        return len(self._bad)

    def close(self) -> None:
        """Report bad images that could not be listed."""
        self._bad.close()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[dict]:
        """Yield the batches of steps start_step .. steps_per_epoch - 1 of an epoch.

        A batch is {"pixels": uint8 (2, B, C, S, S), or uint16 for deep images, "parameters": float32 (2, B, K),
        "sample_ids": int64 (B,)} with B = global_batch_size / num_processes. Iterate over one epoch at a time.

        Raises:
            TooManyBadImagesError: See `BadImageLog`; or many images in a row are unusable.
            LostWorkerError: A worker died. One of several processes decodes the images itself from then on and keeps
                the error in `lost_worker`, so that all can finish the step and save.
        """
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}")
        if self._cache is not None:
            yield from self._cached_epoch(epoch, start_step)
            return
        parts = []
        for part in self._load(epoch, start_step):
            self._bad.add(part.pop("bad"))
            self.num_filled_images += part.pop("num_filled")
            parts.append(part)
            if len(parts) == len(self._parts):
                yield parts[0] if len(parts) == 1 else self._joined(parts)
                parts = []

    def _load(self, epoch: int, start_step: int) -> Iterator[dict]:
        """
        The parts of all batches from the workers. Once a worker is lost, from this process: the others have begun a
        step and wait for it.
        """
        num_loaded = 0
        if self.lost_worker is None:
            # The requests must not refer to the loader. In a reference cycle, the queues to the workers could be
            # collected before the workers are told to stop.
            self._requests.requests = self._requests_of(epoch, start_step)
            try:
                for part in iterate(self._loader):
                    num_loaded += 1
                    yield part
            except LostWorkerError as error:
                if self._is_alone or error.is_contagious:
                    raise
                self.lost_worker = error
        for request in islice(self._requests_of(epoch, start_step)(), num_loaded, None):
            yield self._loader.dataset[request]

    def _requests_of(self, epoch: int, start_step: int) -> Callable[[], Iterator[tuple]]:
        steps = range(start_step, self.steps_per_epoch)
        if self._is_stream:
            return partial(_stream_requests, epoch, steps, self._parts)
        order = sample_order(self.seed, epoch, self.source.num_samples)
        return partial(_map_requests, epoch, order, steps, self._rows, self.global_batch_size)

    def _cached_epoch(self, epoch: int, start_step: int) -> Iterator[dict]:
        order = sample_order(self.seed, epoch, self.source.num_samples)

        def draw(step: int) -> dict:
            sample_ids = samples_of_step(order, step, self._rows, self.global_batch_size)
            return self._cache.draw(sample_ids, self.settings, self.seed, epoch)

        steps = range(start_step, self.steps_per_epoch)
        for drawn in map(draw, steps) if self._cache.images.device.type == "cpu" else one_ahead(draw, steps):
            yield self._cache.crop(drawn, self.settings[0].image_size)

    def _joined(self, parts: list[dict]) -> dict:
        pixels = [part["pixels"].permute(0, 1, 3, 4, 2) for part in parts]
        shape = list(pixels[0].shape)
        shape[1] = sum(part.shape[1] for part in pixels)
        joined = torch.empty(shape, dtype=pixels[0].dtype, pin_memory=self._pin_memory)
        torch.cat(pixels, dim=1, out=joined)
        return {
            "pixels": joined.permute(0, 1, 4, 2, 3),
            "parameters": torch.cat([part["parameters"] for part in parts], dim=1),
            "sample_ids": torch.cat([part["sample_ids"] for part in parts]),
        }


def one_ahead(function: Callable, arguments: Iterable) -> Iterator:
    """Like `map`, but a thread computes the next result while the current one is in use."""
    arguments = iter(arguments)
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(function, argument) for argument in islice(arguments, 1)]
        while pending:
            result = pending.pop().result()
            pending = [pool.submit(function, argument) for argument in islice(arguments, 1)]
            yield result


def _checked_steps(num_samples: int | None, global_batch_size: int, steps_per_epoch: int | None) -> int:
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
    if num_samples is None:
        if steps_per_epoch is None:
            raise ValueError("the length of this streamed data set is unknown: pass --steps_per_epoch")
        return steps_per_epoch
    available = steps_in_epoch(num_samples, global_batch_size)
    if steps_per_epoch is not None and steps_per_epoch > available:
        raise ValueError(
            f"steps_per_epoch is {steps_per_epoch}, but {num_samples} images are only {available} batches of "
            f"{global_batch_size}: lower it, or train for more epochs"
        )
    return steps_per_epoch or available


def _map_requests(epoch: int, order: Permutation, steps: range, rows: range, global_batch_size: int):
    for step in steps:
        yield epoch, samples_of_step(order, step, rows, global_batch_size).tolist()


def _stream_requests(epoch: int, steps: range, parts: list[range]):
    for step in steps:
        for rows in parts:
            yield epoch, step, rows


class _MapBatches(Dataset):
    """Batches of a `MapSource` by (epoch, sample ids), in a worker."""

    def __init__(self, source: MapSource, settings, seed: int, pixel_format: PixelFormat):
        self.source, self.settings, self.seed, self.pixel_format = source, settings, seed, pixel_format

    def __getitem__(self, request: tuple) -> dict:
        epoch, sample_ids = request
        batch = self.source.open_batch(torch.tensor(sample_ids))
        return make_views(batch, self.settings, self.seed, epoch, self.pixel_format)


class _StreamBatches(Dataset):
    """Parts of batches of a `StreamSource` by (epoch, step, rows), in a worker."""

    def __init__(self, reader: StreamReader, settings, seed: int, pixel_format: PixelFormat):
        self.reader, self.settings, self.seed, self.pixel_format = reader, settings, seed, pixel_format

    def __getitem__(self, request: tuple) -> dict:
        epoch, step, rows = request
        batch = self.reader.open_batch(epoch, step, rows)
        return make_views(batch, self.settings, self.seed, epoch, self.pixel_format)


class _Requests:
    """
    The sampler. Its requests are replaced before each epoch, so that workers persist across epochs. Workers that are
    started again begin with the first request again.
    """

    def __init__(self):
        self.requests: Callable[[], Iterator[tuple]] = lambda: iter(())

    def __iter__(self) -> Iterator[tuple]:
        return self.requests()


def _unchanged(batch: dict) -> dict:
    return batch
