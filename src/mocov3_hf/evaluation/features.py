"""Features of a labeled split: one pass of a model, on any number of processes, cached on disk."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from accelerate.utils import gather, gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.decode import BadImageError
from ..data.labeled import LabeledImages
from ..data.pixels import RGB8
from ..data.workers import LostWorkerError, iterate
from ..loading import base_encoder, load_processor, pooled_features, size_options
from ..process_group import process_state
from ..processing import ProcessorTransform
from ..reporting import RunError
from ..weights import weights_hash
from .feature_cache import cache_path, data_fingerprint, read_cache, write_cache


# Legend of dimensions: n images of the split, B batch, C H W image, D width of the features.

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Rows exchanged at a time: 65,536 features of width 2,048 are 512 MiB.
_GATHER_ROWS = 65536
CLS_LAYERS = 4


@dataclass(frozen=True)
class Features:
    """
    Features of a labeled split, in its order.

    Attributes:
        features: (n, D) float32 on the CPU; memory-mapped if they come from the cache.
        labels: (n,) int64; of several classes per image uint8 (n, C), of regression float64 (n, T).
        class_names: By label, or None.
        num_classes: Of the split.
    """

    features: torch.Tensor
    labels: torch.Tensor
    class_names: list[str] | None
    num_classes: int

    def __len__(self) -> int:
        return len(self.features)


def labeled_features(
    model: nn.Module,
    images: LabeledImages,
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
    """
    Features of a split, from the cache if it has them. With several processes, all must call it.

    Args:
        model, images, batch_size, num_workers, mixed_precision, layers, progress, description: As `extract_features`.
        transform: As `extract_features`; None for the default image processor at the model's image size.
        cache_dir: Folder of cached features, created if missing; None disables the cache. A file is used only for the
            weights, architecture, data, labels, transform and precision it was computed with.

    Returns:
        The same on every process.

    Raises:
        ValueError: As `extract_features`.
    """
    encoder = base_encoder(model)
    if transform is None:
        transform = ProcessorTransform(load_processor(None, encoder.config))
    labels = torch.as_tensor(images.labels)
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
        # If one process lacks the file, on another machine for example, all compute: they exchange rows.
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


def extract_features(
    model: nn.Module,
    images: LabeledImages,
    transform: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    mixed_precision: str = "no",
    layers: bool = False,
    progress: bool = True,
    description: str = "features",
) -> torch.Tensor:
    """
    Features of a split, in one pass: `rows_of_split` with `pooled_features`.

    Args:
        model: A vision model of transformers, possibly with heads or wrapped; its modes are restored afterwards.
        images, transform, batch_size, num_workers, mixed_precision, progress, description: As `rows_of_split`.
        layers: Whether to return `layer_features` (n, 5·D) instead, for ViTs only.

    Returns:
        (n, D) float32 on the CPU.

    Raises:
        ValueError: As `rows_of_split`.
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


def layer_features(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Features (B, 5·D) float32 of images (B, C, H, W): the CLS tokens of the last four layers, each after the final
    norm, the earliest first, and the mean of the last layer's patch tokens. `select_features` takes parts of it.

    Raises:
        ValueError: The model is not a ViT with a CLS token and at least four layers.
    """
    inner = getattr(encoder, "backbone", encoder)
    norm = getattr(inner, "layernorm", None)
    outputs = encoder(pixel_values=pixel_values, output_hidden_states=True, **size_options(encoder, pixel_values))
    hidden_states = outputs.hidden_states[-CLS_LAYERS:]
    if norm is None or hasattr(inner.config, "depths") or hidden_states[-1].dim() != 3:
        raise ValueError(f"{type(inner).__name__} has no CLS token in every layer: pass --features pooled")
    if len(outputs.hidden_states) <= CLS_LAYERS:
        found = len(outputs.hidden_states) - 1
        raise ValueError(
            f"{type(inner).__name__} has {found} layers, expected at least {CLS_LAYERS}: pass --features pooled"
        )
    tokens = outputs.last_hidden_state
    parts = [norm(states[:, 0]) for states in hidden_states[:-1]]
    parts += [tokens[:, 0], tokens[:, 1 + getattr(inner.config, "num_register_tokens", 0) :].mean(dim=1)]
    return torch.cat(parts, dim=1).float()


def select_features(features: torch.Tensor, choice: str) -> torch.Tensor:
    """
    A view of `layer_features` (n, 5·D): "pooled" is the CLS token of the last layer, (n, D); "pooled_mean" also has
    the mean of the patch tokens, (n, 2·D); "last4" has the CLS tokens of the last four layers, (n, 4·D).
    """
    width = features.shape[1] // (CLS_LAYERS + 1)
    begin, end = {"pooled": (3, 4), "pooled_mean": (3, 5), "last4": (0, 4)}[choice]
    return features[:, begin * width : end * width]


def rows_of_split(
    model: PreTrainedModel,
    forward: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor],
    images: LabeledImages,
    transform: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    mixed_precision: str = "no",
    progress: bool = True,
    description: str = "images",
) -> torch.Tensor:
    """
    One pass over a split, in evaluation mode and without gradients, on the device of the model.

    With several processes, each takes a contiguous part of the batches, and all receive all rows in order. Batches
    are cut from the whole split: the rows are bit-identical for any number of processes.

    Args:
        model: A vision model of transformers, not wrapped; its modes are restored afterwards.
        forward: From model and images (B, C, H, W) to rows (B, D) float32.
        images: The labeled split.
        transform: From images of its `pixel_format` (C, H, W), 8-bit RGB without one, to float32
            (C, size, size).
        batch_size: Images per batch and process.
        num_workers: Processes that decode images, per process; 0 decodes in the process itself.
        mixed_precision: "no", "bf16" or "fp16": of the forward pass. Rows are always float32.
        progress: Whether to show a progress bar on the main process.
        description: Title of the progress bar.

    Returns:
        (n, D) float32 on the CPU.

    Raises:
        ValueError: An image that cannot be decoded, named by its row (none is skipped: a metric must cover every
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
        num_workers=min(num_workers, -(-(end - begin) // batch_size)),
        collate_fn=_collate,
        pin_memory=model.device.type == "cuda",
    )
    rows, error, lost_worker = [], None, None
    with (
        torch.no_grad(),
        _evaluating(model),
        tqdm(total=end - begin, unit="img", desc=description, disable=not (progress and state.is_main_process)) as bar,
    ):
        try:
            for pixel_values, error in iterate(loader):
                if error is not None:
                    break
                rows.append(_forward(model, forward, pixel_values, PRECISIONS[mixed_precision]).cpu())
                bar.update(len(pixel_values))
        except LostWorkerError as lost:
            lost_worker = str(lost)
    # Every process learns of an error in one of them, or it would wait for its rows forever.
    answers = gather_object([(error, lost_worker)])
    for error, lost_worker in answers:
        if error is not None:
            raise ValueError(error)
        if lost_worker is not None:
            raise RunError(lost_worker)
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
    """All rows on all processes, with a bounded number of them on the device at a time."""
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
    """Images `begin` to `end` of a split: (pixels, None), or (None, error message)."""

    def __init__(self, images: LabeledImages, transform, begin: int, end: int):
        self.images, self.transform, self.begin, self.end = images, transform, begin, end
        self.pixel_format = getattr(transform, "pixel_format", RGB8)

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, str | None]:
        row = self.begin + index
        try:
            return self.transform(self.images.decode(row, self.pixel_format)), None
        except BadImageError as error:
            return None, f"image in row {row} {error}: repair or remove it, or pass --on_bad_image skip"


def _collate(samples: list) -> tuple[torch.Tensor | None, str | None]:
    error = next((error for _, error in samples if error is not None), None)
    return (None, error) if error is not None else (torch.stack([pixels for pixels, _ in samples]), None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its earlier mode, also a frozen one inside a training one."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
