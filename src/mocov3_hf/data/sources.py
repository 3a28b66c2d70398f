"""Open image sources through `datasets`: folders, parquet files, Arrow tables, webdataset tars, the Hub.

Images are returned undecoded, as bytes or paths. Labels are ignored; for labels see `labeled.py`.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import torch
from datasets.exceptions import DatasetNotFoundError

from ..hints import describe_missing
from ..reporting import quiet_hub
from ..storage import is_local
from .shards import builder_shards, encoded_image, table_shards, undecoded


def open_dataset(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "train",
    *,
    streaming: bool = False,
    revision: str | None = None,
    data_files=None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Open one or several splits of a data set, with images undecoded.

    Args:
        dataset_name: A Hub id or a local folder: images at any depth, with or without class folders and split folders
            (`train/`, `test/`); parquet files; webdataset tars; or the output of `Dataset.save_to_disk` or
            `DatasetDict.save_to_disk`.
        config_name: Configuration of a Hub data set.
        split: Name of a split, or names joined by "+", as in "train+validation".
        streaming: Return an `IterableDataset`. Nothing is downloaded or converted in advance.
        revision: Branch, tag or commit on the Hub.
        data_files: Files or URLs, as in `datasets.load_dataset`. `dataset_name` is then the name of a format
            ("parquet", "webdataset", "imagefolder").

    Raises:
        ValueError: The folder does not exist or holds no data, the split does not exist, or the data set is empty.
    """
    name = os.path.expanduser(os.fspath(dataset_name))
    if is_local(name):
        _check_folder(name)
        saved = _load_saved(name, split)
        if saved is not None:
            return undecoded(saved.to_iterable_dataset() if streaming else saved)
    builder = load_builder(name, config_name, revision, data_files)
    parts = check_split(builder, split, name)
    if streaming:
        _check_no_slices(parts)
        streams = [builder.as_streaming_dataset(split=part) for part in parts]
        return undecoded(streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams))
    builder.download_and_prepare()
    if not any(builder.info.splits[part.split("[")[0]].num_examples for part in parts):
        raise ValueError(f"split {split!r} of {name!r} is empty")
    return undecoded(_checked_not_empty(builder.as_dataset(split=split), name, split))


def load_builder(dataset_name: str, config_name: str | None = None, revision: str | None = None, data_files=None):
    """Call `datasets.load_dataset_builder`, and raise its various errors as one-line ValueErrors."""
    try:
        with quiet_hub():
            return datasets.load_dataset_builder(dataset_name, config_name, revision=revision, data_files=data_files)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{describe_missing(dataset_name)}, and as a data set on the Hub it cannot be opened: check the name, "
            "your access if it is gated, and the network"
        ) from error
    except FileNotFoundError as error:  # EmptyDatasetError, DataFilesNotFoundError
        raise ValueError(
            f"no images, parquet files or tars found in {dataset_name!r}: {_first_line(error)}"
        ) from error
    except ValueError as error:  # unknown configuration, different formats of splits, ...
        raise ValueError(f"{dataset_name!r} cannot be opened: {_first_line(error)}") from error


def check_split(builder, split: str, dataset_name: str) -> list[str]:
    """The names in a split expression. Raises ValueError with the existing names if one does not exist."""
    known = list(builder.config.data_files or builder.info.splits or ())
    parts = [part.strip() for part in split.split("+")]
    for part in parts:
        if known and part.split("[")[0] not in known:
            raise ValueError(
                f"split {part!r} does not exist in {dataset_name!r}; it has: {', '.join(map(str, known))}. Pass "
                "one of them as --train_split or --test_split"
            )
    return parts


def find_image_column(dataset, image_column: str | None = None) -> str:
    """Name of the image column.

    Args:
        dataset: A `Dataset`, or an `IterableDataset` with known features.
        image_column: Name to check; None to detect the only image column.

    Raises:
        ValueError: The column does not exist or is ambiguous.
    """
    features = dataset.features or {}
    columns = ", ".join(features) or "unknown"
    if image_column is not None:
        if image_column not in features:
            raise ValueError(f"image column {image_column!r} does not exist; columns: {columns}")
        if not _may_hold_images(features[image_column]):
            raise ValueError(
                f"column {image_column!r} must hold images, encoded bytes or paths, got {features[image_column]}; "
                f"columns: {columns}"
            )
        return image_column
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:  # parquet without the metadata of `datasets`
        found = [name for name, feature in features.items() if _is_encoded(feature)]
    if not found:
        raise ValueError(f"no image column found: name it with --image_column; columns: {columns}")
    if len(found) > 1:
        raise ValueError(f"several image columns ({', '.join(found)}): choose one with --image_column")
    return found[0]


def _is_encoded(feature) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _may_hold_images(feature) -> bool:
    is_path = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    return isinstance(feature, datasets.Image) or _is_encoded(feature) or is_path


class MapSource:
    """Random access to the encoded images of a `Dataset`. The sample id is the row.

    Args:
        dataset: With images undecoded.
        image_column: None to detect the only image column.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str | None = None):
        self.image_column = find_image_column(dataset, image_column)
        # Copies rows that were selected from a larger table, so that reading needs no index lookup.
        self._dataset = undecoded(dataset).select_columns([self.image_column]).flatten_indices()
        self._column = None
        self.num_samples = len(dataset)

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict:
        # Workers open the files again. Pickling the column would send all its data.
        return {**self.__dict__, "_column": None}

    def read(self, sample_id: int) -> bytes | str | None:
        """Bytes or path of an image, or None if the row has neither."""
        if self._column is None:
            self._column = self._dataset.data.column(self.image_column)
        return encoded_image(self._column[int(sample_id)].as_py())

    def open_batch(self, sample_ids: torch.Tensor) -> "MapBatch":
        """A batch of rows, int64 (B,)."""
        return MapBatch(self, sample_ids)


class MapBatch:
    """Some rows of a `MapSource`.

    Attributes:
        sample_ids: int64 (B,).
    """

    def __init__(self, source: MapSource, sample_ids: torch.Tensor):
        self._source, self.sample_ids = source, sample_ids

    def candidates(self, row: int) -> Iterator[tuple[int, Callable]]:
        """(sample id, function that reads it) of a row, then of its replacements, the next rows of the data set."""
        sample_id, size = int(self.sample_ids[row]), len(self._source)
        for distance in range(size):
            tried = (sample_id + distance) % size
            yield tried, partial(self._source.read, tried)


class StreamSource:
    """A data set as a list of shards, without random access.

    Attributes:
        shards: In the order of the data set, see `shards.py`.
        num_samples: Total number of rows, or None if unknown.
    """

    def __init__(self, shards: list):
        self.shards = list(shards)
        sizes = [shard.num_rows for shard in self.shards]
        self.num_samples = None if None in sizes else sum(sizes)
        if not self.shards or self.num_samples == 0:
            raise ValueError("the streamed split is empty")

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError("the length of this streamed data set is unknown")
        return self.num_samples

    def shard_sizes(self, nominal_total: int | None = None) -> tuple[int, ...]:
        """Rows of each shard. If unknown, each shard contributes an equal part of `nominal_total` to an epoch."""
        if self.num_samples is not None:
            return tuple(shard.num_rows for shard in self.shards)
        return (-(-nominal_total // len(self.shards)),) * len(self.shards)


def open_source(
    dataset_name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    streaming: bool = False,
    revision: str | None = None,
    data_files=None,
) -> MapSource | StreamSource:
    """Open the images of a data set for pre-training.

    Arguments and errors are those of `open_dataset` and `find_image_column`. With `streaming`, parquet files, tars and
    image folders are read in place; this function reads only footers, headers and file names.
    """
    if not streaming:
        dataset = open_dataset(dataset_name, config_name, split, revision=revision, data_files=data_files)
        return MapSource(dataset, image_column)
    name = os.path.expanduser(os.fspath(dataset_name))
    if is_local(name):
        _check_folder(name)
        saved = _load_saved(name, split)
        if saved is not None:
            return StreamSource(table_shards(MapSource(saved, image_column)))
    builder = load_builder(name, config_name, revision, data_files)
    parts = check_split(builder, split, name)
    _check_no_slices(parts)
    stream = builder.as_streaming_dataset(split=parts[0])
    if stream.features is not None or image_column is None:
        image_column = find_image_column(stream, image_column)
    return StreamSource(builder_shards(builder, parts, image_column))


def _check_no_slices(parts: list[str]) -> None:
    for part in parts:
        if "[" in part:
            raise ValueError(f"slice {part!r} of a split cannot be streamed: pass whole splits, or remove --streaming")


def _check_folder(name: str) -> None:
    path = Path(name)
    if not path.exists():
        raise ValueError(describe_missing(name, fix="pass a folder that exists, or a Hub id"))
    if not path.is_dir():
        raise ValueError(f"{name!r} is a file: pass the folder that holds the data")


def _load_saved(name: str, split: str) -> datasets.Dataset | None:
    """Open a folder written by `save_to_disk`. None for other folders."""
    path = Path(name)
    if not (path / "dataset_dict.json").exists() and not (path / "state.json").exists():
        return None
    try:
        saved = datasets.load_from_disk(name)
    except IndexError as error:  # raised by `datasets` for a table without rows
        raise ValueError(f"split {split!r} of {name!r} is empty") from error
    if isinstance(saved, datasets.DatasetDict):
        parts = [part.strip() for part in split.split("+")]
        for part in parts:
            if part not in saved:
                raise ValueError(
                    f"split {part!r} does not exist in {name!r}; it has: {', '.join(saved)}. Pass one of "
                    "them as --train_split or --test_split"
                )
        chosen = [saved[part] for part in parts]
        saved = chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)
    elif saved.split is not None and str(saved.split) != split:
        raise ValueError(f"split {split!r} does not exist in {name!r}; it has: {saved.split}")
    return _checked_not_empty(saved, name, split)


def _checked_not_empty(dataset: datasets.Dataset, name: str, split: str) -> datasets.Dataset:
    if len(dataset) == 0:
        raise ValueError(f"split {split!r} of {name!r} is empty")
    return dataset


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
