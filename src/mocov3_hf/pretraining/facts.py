"""What the automatic plan needs to know about data and hardware. No image is decoded for it."""

import os
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ..data.account import Account
from ..data.decode import BadImageError, encoded_bytes, opened
from ..data.pixel_statistics import sample_images
from ..data.pixels import Encoded, unusual_image
from ..data.workers import cores_of_process, default_workers
from ..precision import this_device
from ..reporting import UsageError
from .auto import Facts, MemoryModel, Values
from .build import build_config, build_source, check_buildable
from .estimate import estimate
from .gradient_cache import batch_norms_of
from .hardware import settle_precision
from .next_commands import LARGEST_LABELED, labeled_splits
from .recipe import Recipe, resolve


SAMPLED = 64  # images whose headers are read
SINGLE_CHANNEL_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def look(values: Mapping[str, Any]) -> tuple[Facts, Any]:
    """
    Facts about the data and the machine, and the images.

    Args:
        values: Options that are given, of which those about data and precision matter here.

    Raises:
        UsageError, ValueError: precision, data set or split that cannot be used.
    """
    recipe, reason = settle_precision(resolve({}, values), this_device())
    source = build_source(recipe)
    if source.num_samples is None:
        raise UsageError("the length of the stream is unknown, so that no plan can be made: pass a --recipe")
    side, has_one_size, channels, is_grayscale = sizes(source, recipe)
    num_classes, splits, num_labeled = labels(recipe, source.account, source.num_samples)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    facts = Facts(
        num_images=source.num_samples,
        side=side,
        has_one_size=has_one_size,
        num_channels=recipe.data.num_channels or channels,
        is_grayscale=is_grayscale,
        num_classes=num_classes,
        knn_splits=splits,
        num_labeled=num_labeled,
        device=this_device().type,
        memory_bytes=memory_of_device(this_device()),
        num_cores=cores_of_process(),
        num_processes=num_processes,
        precision=recipe.hardware.mixed_precision,
        precision_reason=reason.partition("(")[2].rstrip(")"),
        num_workers=default_workers(),
    )
    return facts, source


def sizes(source: Any, recipe: Recipe) -> tuple[int, bool, int, bool]:
    """Median shorter side, whether all sizes are equal, channels, and whether there is a single one, of a sample."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    last_error: Exception | None = None
    for data in sample_images(source, SAMPLED, skip_plain=False):
        try:
            shapes[shape_of(data, recipe.data.input_data_format)] += 1
        except Exception as error:  # PIL raises its own kinds for damaged headers; training reports such images
            last_error = error
    if not shapes:
        raise ValueError(f"no image of a sample can be used: the last one {last_error}")
    side = int(statistics.median_low([min(height, width) for _, height, width in shapes.elements()]))
    channels = Counter(shape[0] for shape in shapes.elements())
    most = channels.most_common(1)[0][0]
    one_size = len({shape[1:] for shape in shapes}) == 1
    return side, one_size, 3 if most == 1 else most, set(channels) == {1}


def shape_of(data: Encoded, input_data_format: str | None) -> tuple[int, int, int]:
    """Channels, height and width, from the header of a plain image."""
    image = unusual_image(data, input_data_format)
    if image is not None:
        return image.shape[0], image.shape[1], image.shape[2]
    if isinstance(data, np.ndarray):
        raise BadImageError(f"has the shape {data.shape}, which is not that of an image")
    with opened(encoded_bytes(data)) as picture:
        return 1 if picture.mode in SINGLE_CHANNEL_MODES else 3, picture.height, picture.width


def labels(recipe: Recipe, account: Account | None, num_images: int) -> tuple[int, tuple[str, str] | None, int]:
    """Number of classes, the splits for kNN, and their number of images; 0, None and 0 without labels."""
    data = recipe.data
    known = account.num_classes if account is not None else None
    if data.streaming or data.dataset_name is None or num_images > LARGEST_LABELED or known == 1:
        return known or 0, None, 0
    found = labeled_splits(data.dataset_name, data.dataset_config_name, data.train_split, None, data.image_column)
    return (known or 0, None, 0) if found is None else (found[2], found[:2], found[3])


def memory_of_device(device: torch.device) -> int:
    """Bytes for each process of this machine that shares the memory."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return torch.cuda.get_device_properties(index).total_memory
    total = psutil.virtual_memory().total
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdecimal():
        total = min(total, int(limit))
    return total // sharing


def memory_model(values: Values) -> MemoryModel:
    """
    Memory as a line in the batch: from the estimates for 16 and 32 images, and for 32 in chunks of 16.

    Raises:
        UsageError: options that are not valid.
    """
    recipe = resolve({}, values)
    config, hardware, size = build_config(recipe), recipe.hardware, recipe.views.image_size

    def of(batch: int, chunk: int | None = None) -> int:
        optimizer = recipe.optimization.optimizer
        return estimate(config, size, batch, optimizer, hardware.mixed_precision, chunk).memory_bytes

    small, large, chunked = of(16), of(32), of(32, 16)  # whether or not chunks are exact
    whole = (large - small) // 16
    in_backbone = min(max((large - chunked) // 16, 0), whole)
    return MemoryModel(
        small - 16 * whole, whole - in_backbone, in_backbone, not batch_norms_of(check_buildable(config))
    )
