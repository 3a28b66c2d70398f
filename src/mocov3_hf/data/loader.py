"""The loader of pre-training: pairs of uint8 views and their parameters, for one process of possibly many.

Every batch is a pure function of (seed, epoch, step): prefetching, the number of workers and the number of processes
change nothing in it. Do not `prepare` the loader with accelerate: it is already split by process.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from .bad_images import BadImage, BadImageLog, describe_exit
from .decode import BadImageError, decode_rgb
from .order import batch_slice, sample_order, steps_in_epoch
from .views import ViewSettings, crop_and_resize, crop_boxes, draw_view


# Unusable images in a row after which no neighbour is tried any more: the storage is gone, not an image.
_MAX_NEIGHBOURS = 64


def decode_or_neighbour(source, sample_id: int, bad: list[BadImage]) -> torch.Tensor:
    """Decode an image; where it is bad, note it in `bad` and take the nearest following one that is good."""
    for distance in range(_MAX_NEIGHBOURS):
        tried = sample_id if distance == 0 else source.neighbour(sample_id, distance)
        try:
            return decode_rgb(source.read(tried))
        except BadImageError as error:
            bad.append(BadImage(tried, str(error)))
    raise RuntimeError(
        f"{_MAX_NEIGHBOURS} images in a row are unusable, from image {sample_id} on; the last one "
        f"{bad[-1].reason}. Is the storage still there?"
    )


def make_views(source, sample_ids: torch.Tensor, settings, seed: int, epoch: int) -> dict:
    """The CPU stage for a batch: decode once, draw, crop and resize both views.

    Returns:
        pixels uint8 (2, B, 3, S, S), parameters float32 (2, B, K), sample_ids int64 (B,), bad: list of BadImage.
    """
    size, batch = settings[0].image_size, len(sample_ids)
    # Written as (H, W, 3): the layout the decoder gives and the resize is fastest in.
    pixels = torch.empty((2, batch, size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    draws = [draw_view(settings[view], seed, epoch, sample_ids, view) for view in range(2)]
    bad: list[BadImage] = []
    for row, sample_id in enumerate(sample_ids.tolist()):
        image = decode_or_neighbour(source, sample_id, bad)
        height, width = torch.tensor([image.shape[1]]), torch.tensor([image.shape[2]])
        for view in range(2):
            one = _row(draws[view], row)
            box = crop_boxes(one, height, width, settings[view])[0].tolist()
            pixels[view, row] = crop_and_resize(image, box, size)
    return {
        "pixels": pixels,
        "parameters": torch.stack([draw.parameters for draw in draws]),
        "sample_ids": sample_ids,
        "bad": bad,
    }


def _row(draws, row):
    return type(draws)(*(getattr(draws, name)[row : row + 1] for name in draws.__dataclass_fields__))


class _ViewBatches(Dataset):
    """Batches by (epoch, sample ids): what the workers run."""

    def __init__(self, source, settings, seed):
        self.source, self.settings, self.seed = source, settings, seed

    def __getitem__(self, request):
        epoch, sample_ids = request
        return make_views(self.source, sample_ids, self.settings, self.seed, epoch)


class _Requests:
    """The sampler: an iterable that the loader re-aims before each pass, so that workers live across epochs."""

    def __init__(self):
        self.requests = ()

    def __iter__(self):
        return iter(self.requests)


def _same(batch):
    return batch


def _start_worker(_index: int) -> None:
    torch.set_num_threads(1)


class TwoViewLoader:
    """Batches of two views for one process.

    Args:
        source: a `MapSource`.
        settings: (view 1, view 2), as `two_views` gives them; equal image sizes.
        global_batch_size: samples per step over all processes.
        process_index, num_processes: which part is this process's.
        num_workers: processes that decode; 0 decodes in this one.
        seed: of order and views.
        steps_per_epoch: fewer than the data set gives; None for all full batches.
        on_bad_image, max_bad_fraction, bad_images_file: see `BadImageLog`.
        pin_memory: hand over page-locked tensors, for copies to a GPU that overlap with work.
        prefetch_factor: batches each worker makes ahead.
        multiprocessing_context: how workers are started ("fork", "forkserver", "spawn"); None for Python's default.

    Raises:
        ValueError: sizes that do not fit together, with the repair.
    """

    def __init__(
        self,
        source,
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
        cache_on_device=None,
        prefetch_factor: int = 2,
        multiprocessing_context: str | None = None,
    ):
        if global_batch_size < 1 or global_batch_size % num_processes:
            raise ValueError(
                f"the global batch of {global_batch_size} is not a multiple of {num_processes} processes: "
                f"choose a multiple"
            )
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index must be in [0, {num_processes}), got {process_index}")
        if settings[0].image_size != settings[1].image_size:
            raise ValueError(f"both views need one image size, got {[view.image_size for view in settings]}")
        self.source, self.settings, self.seed = source, settings, seed
        self.global_batch_size = global_batch_size
        self.process_index, self.num_processes = process_index, num_processes
        available = steps_in_epoch(len(source), global_batch_size)
        if steps_per_epoch is not None and not 1 <= steps_per_epoch <= available:
            raise ValueError(
                f"steps_per_epoch must be in [1, {available}] ({len(source)} images in batches of "
                f"{global_batch_size}), got {steps_per_epoch}"
            )
        self.steps_per_epoch = steps_per_epoch or available
        self._bad = BadImageLog(len(source), on_bad_image, max_bad_fraction, bad_images_file)
        self._requests = _Requests()
        self._loader = DataLoader(
            _ViewBatches(source, settings, seed),
            batch_size=None,
            sampler=self._requests,
            collate_fn=_same,
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            persistent_workers=num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers > 0 else None,
            pin_memory=pin_memory,
            multiprocessing_context=multiprocessing_context if num_workers > 0 else None,
        )

    @property
    def num_bad_images(self) -> int:
        """Bad images met so far, each counted once."""
        return len(self._bad)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[dict]:
        """Yield steps start_step .. steps_per_epoch - 1 of an epoch.

        Each is {"pixels": uint8 (2, B, 3, S, S), "parameters": float32 (2, B, K), "sample_ids": int64 (B,)} with
        B = global_batch_size / num_processes.
        """
        order = sample_order(self.seed, epoch, len(self.source))
        slices = (
            batch_slice(step, self.global_batch_size, self.process_index, self.num_processes)
            for step in range(start_step, self.steps_per_epoch)
        )
        self._requests.requests = ((epoch, order[part].clone()) for part in slices)
        for batch in self._explained(iter(self._loader)):
            self._bad.add(batch.pop("bad"))
            yield batch

    def _explained(self, batches):
        """The batches; when a worker dies, an error that says of what."""
        workers = list(getattr(batches, "_workers", ()))
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
                if not dead:
                    raise
                causes = "; ".join(f"worker {worker.pid}: {describe_exit(worker.exitcode)}" for worker in dead)
                raise RuntimeError(f"a data loading worker died: {causes}") from error
            yield batch
