"""Features once, many answers: one pass of a model over a labelled split, on any number of processes, kept on disk."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.decode import BadImageError
from ..data.labelled import LabelledImages
from .encoder import base_encoder, layer_features, load_transform, pooled_features, weights_hash


# Legend of dimensions: n images of the split, B batch, D width of the features.

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Rows exchanged at a time: 65,536 features of width 2,048 are 512 MiB.
_GATHER_ROWS = 65536
# Images that are read in full for the fingerprint of a data set.
_SAMPLED_IMAGES = 256


@dataclass(frozen=True)
class Features:
    """Features of a labelled split, in its order.

    Attributes:
        features: (n, D) float32 on the CPU; memory-mapped when they come from the cache.
        labels: (n,) int64.
        class_names: by label, or None.
        num_classes: as the split says.
    """

    features: torch.Tensor
    labels: torch.Tensor
    class_names: list[str] | None
    num_classes: int

    def __len__(self) -> int:
        return len(self.features)


def labelled_features(
    model: nn.Module,
    images: LabelledImages,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    mixed_precision: str = "no",
    layers: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    description: str = "features",
) -> Features:
    """Features of a split, from the cache where it has them. With several processes, all must call it.

    Args:
        model, images, transform, batch_size, num_workers, mixed_precision, layers, progress, description: as
            `extract_features`.
        cache_dir: folder of cached features, made where missing; None for no cache. A file is used only where weights,
            architecture, data, labels, transform and precision are those it was made with.

    Returns:
        The same on every process.

    Raises:
        ValueError: as `extract_features`.
    """
    encoder = base_encoder(model)
    if transform is None:
        transform = load_transform(None, encoder)
    labels = torch.as_tensor(images.labels, dtype=torch.int64)
    path = identity = features = None
    if cache_dir is not None:
        identity = {
            "model": weights_hash(encoder),
            "data": data_fingerprint(images),
            "transform": repr(transform),
            "mixed_precision": mixed_precision,
            "features": "layers" if layers else "pooled",
        }
        path = cache_path(cache_dir, identity)
        features = read_cache(path, identity, len(images))
        process_state()
        # One process without the file, on another machine say, and all compute: they meet in the exchange of rows.
        if not all(gather_object([features is not None])):
            features = None
    if features is None:
        features = extract_features(
            encoder,
            images,
            transform,
            batch_size=batch_size,
            num_workers=num_workers,
            mixed_precision=mixed_precision,
            layers=layers,
            progress=progress,
            description=description,
        )
        if path is not None and process_state().is_main_process:
            write_cache(path, identity, features)
    return Features(features, labels, images.class_names, images.num_classes)


def process_state() -> PartialState:
    """The processes of this run, joined on the first call (`torchrun` and `accelerate launch` tell of each other).

    accelerate joins processes on CPUs only when asked to; without that each would take itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


@contextmanager
def joined_processes():
    """`process_state()`, and at the end the processes take leave of each other: one that just ended could tear others
    down while they still talk. A group that was there before stays."""
    found_joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    state = process_state()
    yield state
    if not found_joined:
        state.wait_for_everyone()
        state.destroy_process_group()


def extract_features(
    model: nn.Module,
    images: LabelledImages,
    transform: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    mixed_precision: str = "no",
    layers: bool = False,
    progress: bool = True,
    description: str = "features",
) -> torch.Tensor:
    """Features of a split, in one pass: `rows_of_split` of the pooled vector.

    Args:
        model: a vision model of transformers, bare or with heads or wrapped; its modes are restored afterwards.
        images, transform, batch_size, num_workers, mixed_precision, progress, description: as `rows_of_split`.
        layers: give `layer_features` (n, 5·D) instead of the pooled vector, for ViTs only.

    Returns:
        (n, D) float32 on the CPU.

    Raises:
        ValueError: as `rows_of_split`.
    """
    return rows_of_split(
        base_encoder(model),
        layer_features if layers else pooled_features,
        images,
        transform,
        batch_size=batch_size,
        num_workers=num_workers,
        mixed_precision=mixed_precision,
        progress=progress,
        description=description,
    )


def rows_of_split(
    model: PreTrainedModel,
    forward: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor],
    images: LabelledImages,
    transform: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    mixed_precision: str = "no",
    progress: bool = True,
    description: str = "images",
) -> torch.Tensor:
    """One pass over a split, in eval mode and without gradient, on the device where the model is.

    With several processes each takes a stretch of the split's batches, and all receive all rows in order. Batches
    are cut from the whole split, so their content, and with it every bit of the rows, does not depend on the number of
    processes.

    Args:
        model: a vision model of transformers, not wrapped; its modes are restored afterwards.
        forward: model and images (B, 3, H, W) to rows (B, D) float32.
        images: the labelled split.
        transform: uint8 (3, H, W) to float32 (3, size, size).
        batch_size: images per batch and process.
        num_workers: processes that decode, for each process; 0 decodes in the process itself.
        mixed_precision: "no", "bf16" or "fp16": of the forward pass. Rows are float32 in any case.
        progress: show a bar on the main process.
        description: its title.

    Returns:
        (n, D) float32 on the CPU.

    Raises:
        ValueError: an image that cannot be decoded, named by its row (nothing is skipped: a figure must cover every
            image); an unknown precision; a batch size below 1.
    """
    if mixed_precision not in PRECISIONS:
        raise ValueError(f"mixed_precision must be one of {', '.join(PRECISIONS)}, got {mixed_precision!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    state = process_state()
    num_batches = -(-len(images) // batch_size)
    edges = [
        min(num_batches * rank // state.num_processes * batch_size, len(images))
        for rank in range(state.num_processes + 1)
    ]
    begin, end = edges[state.process_index], edges[state.process_index + 1]
    loader = DataLoader(
        _Stretch(images, transform, begin, end),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=model.device.type == "cuda",
    )
    rows, error = [], None
    with (
        torch.no_grad(),
        _evaluating(model),
        tqdm(total=end - begin, unit="img", desc=description, disable=not (progress and state.is_main_process)) as bar,
    ):
        for pixel_values, error in loader:
            if error is not None:
                break
            rows.append(_forward(model, forward, pixel_values, PRECISIONS[mixed_precision]).cpu())
            bar.update(len(pixel_values))
    # All processes learn of an error of one, or they would wait for its rows for ever.
    errors = [found for found in gather_object([error]) if found is not None]
    if errors:
        raise ValueError(errors[0])
    own = torch.cat(rows) if rows else None
    return own if state.num_processes == 1 else _gather_rows(own, edges, model.device)


def _forward(
    model: PreTrainedModel, forward: Callable, pixel_values: torch.Tensor, precision: torch.dtype | None
) -> torch.Tensor:
    device = model.device
    pixel_values = pixel_values.to(device, non_blocking=True)
    with torch.autocast(device.type, precision, enabled=precision is not None):
        if precision is None:
            pixel_values = pixel_values.to(model.dtype)
        return forward(model, pixel_values)


def _gather_rows(own: torch.Tensor | None, edges: list[int], device: torch.device) -> torch.Tensor:
    """All rows on all processes, a bounded number of them on the device at a time."""
    state = process_state()
    counts = [end - begin for begin, end in pairwise(edges)]
    # A process without batches (more processes than batches) does not know the width.
    width = max(gather_object([0 if own is None else own.shape[1]]))
    features = torch.empty(edges[-1], width)
    step = max(1, _GATHER_ROWS // state.num_processes)
    for offset in range(0, max(counts), step):
        length = min(step, max(counts) - offset)
        piece = torch.zeros(length, width, device=device)
        if own is not None:
            mine = own[offset : offset + length]
            piece[: len(mine)] = mine.to(device)
        pieces = gather(piece).cpu().view(state.num_processes, length, width)
        for rank, count in enumerate(counts):
            kept = max(0, min(length, count - offset))
            features[edges[rank] + offset : edges[rank] + offset + kept] = pieces[rank, :kept]
    return features


class _Stretch(Dataset):
    """Rows `begin` to `end` of a split: (pixels, None), or (None, what is wrong with the image)."""

    def __init__(self, images: LabelledImages, transform, begin: int, end: int):
        self.images, self.transform, self.begin, self.end = images, transform, begin, end

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, str | None]:
        row = self.begin + index
        try:
            return self.transform(self.images.decode(row)), None
        except BadImageError as error:
            return None, f"image in row {row} {error}: repair it or take it out, evaluation covers every image"


def _collate(samples: list) -> tuple[torch.Tensor | None, str | None]:
    error = next((error for _, error in samples if error is not None), None)
    return (None, error) if error is not None else (torch.stack([pixels for pixels, _ in samples]), None)


@contextmanager
def _evaluating(model: nn.Module):
    """Eval mode, and afterwards the mode every module had: a frozen one inside a training one among them."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def data_fingerprint(images: LabelledImages) -> str:
    """32 hex digits of the data: of the data set's files as `datasets` tells them apart (for a folder names and times,
    for the Hub the commit), all labels, and the full content of some images spread over the split.

    Where the source is no `datasets.Dataset`, all images are read in full.
    """
    dataset = getattr(images.source, "_dataset", None)
    known = getattr(dataset, "_fingerprint", None)
    step = 1 if known is None else max(1, len(images) // _SAMPLED_IMAGES)
    digest = hashlib.sha256(f"{known} {len(images)} {images.class_names}".encode())
    digest.update(memoryview(torch.as_tensor(images.labels, dtype=torch.int64).numpy()).cast("B"))
    for row in range(0, len(images), step):
        data = images.read(row)
        if isinstance(data, (str, os.PathLike)):
            # A file that is gone is an error for the pass over the images, which names the row.
            data = Path(data).read_bytes() if os.path.isfile(data) else os.fspath(data).encode()
        digest.update(hashlib.sha256(data or b"").digest())
    return digest.hexdigest()[:32]


def cache_path(cache_dir: str | os.PathLike, identity: dict[str, str]) -> Path:
    """File for features with this identity."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return Path(cache_dir) / f"features-{name}.safetensors"


def read_cache(path: Path, identity: dict[str, str], rows: int) -> torch.Tensor | None:
    """Features (n, D) of a cache file, memory-mapped; None where it is missing, damaged (a warning) or another's."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get("identity", "null")) != identity:
                return None
            features = file.get_tensor("features")
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"cached features {str(path)!r} are damaged and computed again: {error}", stacklevel=2)
        return None
    return features if len(features) == rows and features.dtype == torch.float32 else None


def write_cache(path: Path, identity: dict[str, str], features: torch.Tensor) -> None:
    """Write a cache file aside and rename it: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({"features": features.contiguous()}, aside, metadata={"identity": json.dumps(identity)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
