"""
Data sets in memory: those of `datasets`, and sequences of images, arrays or pairs (image, label).

Options are text, so that recipes and results can be saved. While a call runs, its data have the name `IN_MEMORY`
there, and `open_source` and the functions beside it find them by this name.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps

from ..model.image_processing_mocov3 import is_deep_mode
from ..reporting import UsageError
from .references import reference_of


IN_MEMORY = "data in memory"
WHAT_LOADS = (
    "a path, a Hub id, a Dataset or DatasetDict of datasets, a list of PIL images, arrays or paths, a list of pairs"
    " (image, label), or a mapping of splits to these"
)
Splits = dict[str, datasets.Dataset] | datasets.IterableDataset
_current: ContextVar[Splits | None] = ContextVar("data", default=None)
# Bytes of images in a chunk of a column. Arrow has no more than 2 GiB in one.
_CHUNK = 1 << 28


@contextmanager
def named(data: Any) -> Iterator[tuple[str, str | None]]:
    """
    The name under which data are found inside the block: of data in memory `IN_MEMORY`, else the path or Hub id.

    Args:
        data: As in `WHAT_LOADS`, or an `IterableDataset`.

    Returns:
        The name, and the name of the split if the data are in memory and have only one.

    Raises:
        UsageError: Data of another kind; a sequence that is empty, holds items of several kinds, or anything but
            images.
    """
    if isinstance(data, str | os.PathLike):
        yield os.fspath(data), None
        return
    splits = as_splits(data)
    only = next(iter(splits)) if isinstance(splits, dict) and len(splits) == 1 else None
    token = _current.set(splits)
    try:
        yield IN_MEMORY, only
    finally:
        _current.reset(token)


def data_in_memory() -> Splits:
    """
    The data of the call that is running.

    Raises:
        UsageError: There is none, as for the recipe of an earlier run.
    """
    splits = _current.get()
    if splits is None:
        raise UsageError("the images of this recipe were in memory: pass the same data to the function, or a path")
    return splits


def as_splits(data: Any) -> Splits:
    """Data in memory as data sets of `datasets`, by split. UsageError as `named`."""
    if isinstance(data, datasets.IterableDataset):
        return data
    if isinstance(data, datasets.IterableDatasetDict):
        raise UsageError(
            f"an IterableDatasetDict has several splits: pass one of them, such as data[{next(iter(data))!r}]"
        )
    if isinstance(data, datasets.Dataset):
        name = str(data.split or "").partition("[")[0]
        return {name if name.isidentifier() else "train": _checked(data, "the data set")}
    if isinstance(data, Mapping):
        if not data or not all(isinstance(name, str) for name in data):
            raise UsageError(f"a mapping in memory takes names of splits to their images, got {list(data)[:5]}")
        return {name: _checked(_as_dataset(part, f"split {name!r}"), f"split {name!r}") for name, part in data.items()}
    return {"train": _as_dataset(data, "the sequence")}


def _checked(dataset: datasets.Dataset, what: str) -> datasets.Dataset:
    if len(dataset) == 0:
        raise UsageError(f"{what} in memory is empty: pass at least two images")
    return dataset.with_format(None)


def _as_dataset(data: Any, what: str) -> datasets.Dataset:
    """A `Dataset` with the columns `image` and, of pairs, `label`."""
    if isinstance(data, datasets.Dataset):
        return data
    if isinstance(data, torch.Tensor | np.ndarray):
        if data.ndim != 4:
            raise UsageError(
                f"{what} is one array of the shape {tuple(data.shape)}, expected images of one size (number, height,"
                " width, channels), or a list of images"
            )
    elif isinstance(data, bytes) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UsageError(f"data of the type {type(data).__name__} are not a data set: pass {WHAT_LOADS}")
    if len(data) == 0:
        raise UsageError(f"{what} is empty: pass at least two images")
    images, labels, first = [], [], data[0]
    has_labels = isinstance(first, tuple) and len(first) == 2
    for row in range(len(data)):
        item = data[row]
        if (isinstance(item, tuple) and len(item) == 2) != has_labels:
            raise UsageError(f"item {row} of {what} {'has no' if has_labels else 'has a'} label, unlike the first one")
        image, label = item if has_labels else (item, None)
        if _kind(image) != _kind(images[0] if images else image):
            raise UsageError(
                f"item {row} of {what} is a {_kind(image)}, the first one a {_kind(images[0])}: pass one kind"
            )
        images.append(image)
        labels.append(label)
    columns = {"image": _image_column(images, what)}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if has_labels:
        columns["label"], features["label"] = _label_column(labels, what, getattr(data, "classes", None))
    info = datasets.DatasetInfo(features=datasets.Features(features))
    table = pa.table(columns, schema=info.features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=info)


def _kind(image: Any) -> str:
    kinds = {"PIL image": Image.Image, "tensor": torch.Tensor, "NumPy array": np.ndarray, "path": (str, os.PathLike)}
    return next((name for name, types in kinds.items() if isinstance(image, types)), type(image).__name__)


def _image_column(images: Sequence[Any], what: str) -> pa.ChunkedArray:
    """Structs of bytes and path, as `datasets.Image` stores them."""
    chunks, waiting, size = [], [], 0
    kind = datasets.Image(decode=False).pa_type
    for row, image in enumerate(images):
        try:
            value = encoded(image)
        except ValueError as error:
            raise UsageError(f"item {row} of {what} {error}") from error
        waiting.append({"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": value})
        size += len(value)
        if size >= _CHUNK:
            chunks.append(pa.array(waiting, kind))
            waiting, size = [], 0
    return pa.chunked_array([*chunks, pa.array(waiting, kind)])


def _label_column(labels: Sequence[Any], what: str, classes: Any) -> tuple[pa.ChunkedArray, Any]:
    """Integers, with the names in `classes` as torchvision has them, text, numbers, or lists of these."""
    labels = [label.item() if getattr(label, "ndim", None) == 0 else label for label in labels]
    if isinstance(labels[0], list | tuple | np.ndarray | torch.Tensor):
        lists = [label.tolist() if hasattr(label, "tolist") else label for label in labels]
        wrong = next((row for row, label in enumerate(lists) if not isinstance(label, list | tuple)), None)
        if wrong is not None:
            raise UsageError(f"label {wrong} of {what} is {labels[wrong]!r}, expected a list as the first one")
        try:
            column = pa.array(lists)
            return pa.chunked_array([column]), datasets.List(datasets.Value(str(column.type.value_type)))
        except (pa.ArrowException, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"the labels of {what} are lists of several kinds: pass numbers or text") from error
    if any(isinstance(label, float | np.floating) for label in labels):
        for row, label in enumerate(labels):
            if not isinstance(label, int | float | np.number):
                raise UsageError(f"label {row} of {what} is {label!r}, expected a number")
        numbers = pa.chunked_array([pa.array([float(label) for label in labels], pa.float64())])
        return numbers, datasets.Value("float64")
    is_text = isinstance(labels[0], str)
    wanted = str if is_text else int | np.integer
    for row, label in enumerate(labels):
        if not isinstance(label, wanted) or isinstance(label, bool):
            raise UsageError(f"label {row} of {what} is {label!r}, expected {'text' if is_text else 'an integer'}")
    if is_text:
        return pa.chunked_array([pa.array(labels, pa.string())]), datasets.Value("string")
    numbers = pa.chunked_array([pa.array([int(label) for label in labels], pa.int64())])
    if (
        isinstance(classes, list | tuple)
        and all(isinstance(name, str) for name in classes)
        and len(classes) > max(labels)
    ):
        return numbers, datasets.ClassLabel(names=list(classes))
    return numbers, datasets.Value("int64")


def encoded(image: Any) -> bytes | str:
    """
    An image without loss: PNG where it can hold the values, else `.npy`; a path as it is.

    Args:
        image: PIL image, whose Exif orientation is applied; array or tensor (H, W), (H, W, C) or (C, H, W); path.

    Raises:
        ValueError: The predicate of a sentence: what it is, and what was expected.
    """
    if isinstance(image, str | os.PathLike):
        path = os.path.abspath(os.path.expanduser(os.fspath(image)))
        if not os.path.isfile(path):
            raise ValueError(f"is the path {os.fspath(image)!r}, which is not a file")
        return reference_of(os.fsencode(path))
    stream = io.BytesIO()
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if not is_deep_mode(image.mode):
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                image = image.convert("RGB")
            image.save(stream, "png", compress_level=1)
            return stream.getvalue()
        image = np.array(image)
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu().float() if image.dtype == torch.bfloat16 else image.detach().cpu()
        image = image.numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"is of the type {type(image).__name__}, expected a PIL image, an array, a tensor or a path")
    if image.dtype.kind not in "buif":
        raise ValueError(f"holds {image.dtype} values, expected integers or floating-point numbers")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(
            f"has the shape {image.shape}, expected (height, width), with an axis of channels if there is one"
        )
    if image.dtype == np.uint8 and (plain := _plain(image)) is not None:
        Image.fromarray(plain).save(stream, "png", compress_level=1)
    else:
        np.save(stream, image)
    return stream.getvalue()


def _plain(image: np.ndarray) -> np.ndarray | None:
    """An 8-bit gray or RGB image as (H, W) or (H, W, 3), None for any other."""
    if image.ndim == 2:
        return image
    axes = [axis for axis in (0, 2) if image.shape[axis] in (1, 3)]
    if len(axes) != 1:  # both or none: left to the options about channels
        return None
    image = np.moveaxis(image, axes[0], 2)
    return np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image)


def find_images(dataset: datasets.IterableDataset, image_column: str | None) -> str | None:
    """The image column of a stream without declared columns, by its first row; None if its columns are declared."""
    if dataset.features is not None or image_column is not None:
        return image_column
    row = next(iter(dataset), None)
    if row is None:
        raise UsageError("the stream in memory is empty")
    found = [name for name, value in row.items() if _kind(value) in ("PIL image", "NumPy array", "tensor")]
    if len(found) != 1:
        reason = f"several image columns ({', '.join(found)})" if found else "no image column found"
        raise UsageError(f"{reason}: name it with image_column; columns: {', '.join(row)}")
    return found[0]
