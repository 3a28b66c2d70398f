"""Open image sources: folders, archives, parquet files, Arrow tables, CSV files, the Hub.

Local folders are read by `scan.py`; what comes out is always a data set of `datasets`. Images are returned undecoded,
as bytes or paths. Labels are ignored; for labels see `labeled.py`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from ..storage import is_local
from .account import Account
from .bad_images import ImageReader
from .builders import load_builder, prepare
from .damaged_files import check_saved, one_line
from .decode import printable
from .local import LocalParquet, LocalTable, open_local, parquet_builder
from .memory import IN_MEMORY, data_in_memory, find_images
from .references import shown
from .shards import builder_shards, cell, stream_shards, table_shards, undecoded
from .splits import MissingSplitError, check_split, choose_parts, names_of_files


# Of a path, and of a name in it.
_LONGEST_NAME, _LONGEST_PART = 4096, 255
NO_RANDOM_ACCESS = "an IterableDataset has no random access, which all but pre-training needs: pass a Dataset"


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
            (`train/`, `test/`); parquet files; tars and zips; CSV files; or the output of `Dataset.save_to_disk` or
            `DatasetDict.save_to_disk`. A single parquet, tar, zip or CSV file is accepted as well.
        config_name: Configuration of a Hub data set.
        split: Name of a split, or names joined by "+", as in "train+validation".
        streaming: Return an `IterableDataset`. Nothing is downloaded or converted in advance.
        revision: Branch, tag or commit on the Hub.
        data_files: Files or URLs, as in `datasets.load_dataset`. `dataset_name` is then the name of a format
            ("parquet", "webdataset", "imagefolder").

    Raises:
        ValueError: The folder does not exist or holds no data, the split does not exist, or the data set is empty.
    """
    opened = _open(dataset_name, config_name, split, streaming, revision, data_files)
    if not streaming and not isinstance(opened.dataset, datasets.Dataset):
        raise ValueError(NO_RANDOM_ACCESS)
    if isinstance(opened.dataset, datasets.Dataset) and streaming:
        return undecoded(opened.dataset.to_iterable_dataset())
    return undecoded(opened.dataset)


@dataclass(frozen=True)
class _Opened:
    """
    Attributes:
        dataset: A `Dataset`, also of a local stream that has random access; else an `IterableDataset`.
        account: What was found.
        image_column: If the source knows it.
        edges: See `LocalTable`.
        builder, parts: Of `datasets`, for a stream.
        num_skipped: Files of a folder that are not used; None for another source.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    account: Account
    image_column: str | None = None
    edges: tuple[int, ...] = ()
    builder: datasets.DatasetBuilder | None = None
    parts: tuple[str, ...] = ()
    num_skipped: int | None = None


def _open(
    dataset_name, config_name, split, streaming, revision, data_files, image_column=None, labeled=False
) -> _Opened:
    name, kind, tally = os.path.expanduser(os.fspath(dataset_name)), "data set of the Hub", None
    if not name.strip():
        raise ValueError("the name of the data set is empty: pass a folder, a file or a Hub id as --dataset_name")
    if len(name) > _LONGEST_NAME or max(map(len, map(os.fsencode, name.split("/")))) > _LONGEST_PART:
        raise ValueError(f"{printable(name, 60)!r} with {len(name)} characters is too long for a path or a Hub id")
    builder = None
    if name == IN_MEMORY:
        return _open_memory(split, image_column, labeled)
    if data_files is None and is_local(name):
        kind = "data set of datasets"
        saved = _load_saved(name, split)
        if saved is not None:
            found = Account(name, split, "data set saved by datasets", len(saved), len(saved))
            return _Opened(saved, found, image_column)
        local = None
        if config_name is None and not _has_configurations(Path(name)):
            local = open_local(name, split, image_column, labeled=labeled)
        if isinstance(local, LocalTable):
            column = local.image_column or _column_of_archive(local, image_column)
            return _Opened(local.dataset, local.account, column, local.edges)
        if isinstance(local, LocalParquet):
            kind, tally, builder = "parquet files", local.tally, parquet_builder(local)
            split = names_of_files(split, list(local.files))
    builder = builder or load_builder(name, config_name, revision, data_files)
    parts = check_split(builder, split, name)
    skipped, examples = (tally.counts, tally.examples) if tally is not None else ({}, {})

    def account(num_images: int | None) -> Account:
        num_files = None if num_images is None or tally is None else num_images + tally.total
        return Account(name, split, kind, num_files, num_images, skipped, examples)

    if streaming:
        _check_no_slices(parts)
        streams = [builder.as_streaming_dataset(split=part) for part in parts]
        stream = streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams)
        return _Opened(
            stream, account(None), image_column, builder=builder, parts=tuple(parts), num_skipped=tally and tally.total
        )
    prepare(builder, name)
    if not any(builder.info.splits[part.split("[")[0]].num_examples for part in parts):
        raise ValueError(f"split {split!r} of {name!r} is empty")
    dataset = _checked_not_empty(builder.as_dataset(split=split), name, split)
    return _Opened(dataset, account(len(dataset)), image_column)


def _open_memory(split: str, image_column: str | None, labeled: bool) -> _Opened:
    """The data of the call that is running."""
    splits = data_in_memory()
    if isinstance(splits, datasets.IterableDataset):
        if labeled:
            raise ValueError(NO_RANDOM_ACCESS)
        account = Account(IN_MEMORY, split, "stream in memory", None, None)
        return _Opened(splits, account, find_images(splits, image_column))
    chosen = choose_parts(splits, split, IN_MEMORY)
    dataset = chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)
    sizes = {name: len(part) for name, part in splits.items()} if len(splits) > 1 else {}
    account = Account(IN_MEMORY, split, "in memory", None, len(dataset), splits=sizes)
    return _Opened(_checked_not_empty(dataset, IN_MEMORY, split), account)


def _has_configurations(path: Path) -> bool:
    """Whether a folder is a copy of a data set of the Hub whose README.md says which files are which split."""
    try:
        text = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    header = text.split("\n---", 1)[0] if text.startswith("---") else ""
    return "\nconfigs:" in header and "data_files" in header


def _column_of_archive(local: LocalTable, image_column: str | None) -> str | None:
    """Archives have one column of images; `--image_column` has chosen the members."""
    return None if local.account.kind in ("tar file", "zip file", "tar files", "zip files") else image_column


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
                f"column {image_column!r} must hold images, encoded bytes, paths or arrays, got "
                f"{features[image_column]}; columns: {columns}"
            )
        return image_column
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:  # parquet without the metadata of `datasets`
        found = [name for name, feature in features.items() if _is_encoded(feature)]
    if not found:
        found = [name for name, feature in features.items() if isinstance(feature, _ARRAYS)]
    if not found:
        raise ValueError(f"no image column found: name it with --image_column; columns: {columns}")
    if len(found) > 1:
        raise ValueError(f"several image columns ({', '.join(found)}): choose one with --image_column")
    return found[0]


_ARRAYS = (datasets.Array2D, datasets.Array3D)


def _is_encoded(feature) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _may_hold_images(feature) -> bool:
    is_path = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    is_array = isinstance(feature, (*_ARRAYS, datasets.List, datasets.LargeList))
    return isinstance(feature, datasets.Image) or _is_encoded(feature) or is_path or is_array


class MapSource:
    """Random access to the encoded images of a `Dataset`. The sample id is the row.

    Args:
        dataset: With images undecoded.
        image_column: None to detect the only image column.
        account: What was found where the data set was opened, None for one in memory.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str | None = None, account: Account | None = None):
        self.account = account
        self.image_column = find_image_column(dataset, image_column)
        # Copies rows that were selected from a larger table, so that reading needs no index lookup.
        chosen = undecoded(dataset).select_columns([self.image_column])
        self._dataset = chosen.flatten_indices() if chosen._indices is not None else chosen
        self._column = None
        self.num_samples = len(dataset)

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict:
        # Workers open the files again. Pickling the column would send all its data.
        return {**self.__dict__, "_column": None}

    def read(self, sample_id: int) -> bytes | str | np.ndarray | None:
        """Bytes or path of an image, or an array, or None if the row has none."""
        return cell(self.column()[int(sample_id)])

    def describe(self, sample_id: int) -> str | None:
        """The file or the member of an archive that an image is, or the name that its row gives it; else None."""
        value = self.column()[int(sample_id)].as_py()
        value = value.get("path") if isinstance(value, dict) else value
        return shown(value) if isinstance(value, str) else None

    def column(self) -> pa.ChunkedArray:
        """The images as they are in the table."""
        if self._column is None:
            self._column = self._dataset.data.column(self.image_column)
        return self._column

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

    def candidates(self, row: int) -> Iterator[tuple[int, ImageReader]]:
        """(sample id, what reads it) of a row, then of its replacements, the next rows of the data set."""
        sample_id, size = int(self.sample_ids[row]), len(self._source)
        for distance in range(size):
            tried = (sample_id + distance) % size
            yield tried, ImageReader(self._source.read, tried)


class StreamSource:
    """A data set as a list of shards, without random access.

    Attributes:
        shards: In the order of the data set, see `shards.py`.
        num_samples: Total number of rows, or None if unknown.
        account: What was found, None for a list of shards.
    """

    def __init__(self, shards: list, account: Account | None = None):
        self.account = account
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


def open_table(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    revision: str | None = None,
    labeled: bool = True,
) -> tuple[datasets.Dataset, str | None, Account]:
    """
    A data set with its labels: undecoded, the column of its images if the source knows it, and what was found.

    Arguments and errors are those of `open_source`; with `labeled`, CSV files in a folder are the data set even if
    their paths are wrong, so that the mistake is reported.
    """
    opened = _open(dataset_name, config_name, split, False, revision, None, image_column, labeled=labeled)
    return undecoded(opened.dataset), opened.image_column, opened.account


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
    opened = _open(dataset_name, config_name, split, streaming, revision, data_files, image_column)
    if isinstance(opened.dataset, datasets.Dataset):
        source = MapSource(opened.dataset, opened.image_column, opened.account)
        return StreamSource(table_shards(source, opened.edges), opened.account) if streaming else source
    image_column = opened.image_column
    if opened.dataset.features is not None or image_column is None:
        image_column = find_image_column(opened.dataset, image_column)
    if opened.builder is None:
        shards = stream_shards(opened.dataset, image_column)
    else:
        shards = builder_shards(opened.builder, list(opened.parts), image_column)
    sizes = [shard.num_rows for shard in shards]
    total = None if None in sizes else sum(sizes)
    num_files = None if None in (total, opened.num_skipped) else total + opened.num_skipped
    return StreamSource(shards, replace(opened.account, num_images=total, num_files=num_files))


def _check_no_slices(parts: list[str]) -> None:
    for part in parts:
        if "[" in part:
            raise ValueError(f"slice {part!r} of a split cannot be streamed: pass whole splits, or remove --streaming")


def _load_saved(name: str, split: str) -> datasets.Dataset | None:
    """Open a folder written by `save_to_disk`. None for other folders."""
    path = Path(name)
    # `Path.exists` raises for a name that is too long.
    if not any(os.path.exists(path / marker) for marker in ("dataset_dict.json", "state.json")):
        return None
    check_saved(path)
    try:
        saved = datasets.load_from_disk(name)
    except IndexError as error:  # raised by `datasets` for a table without rows
        raise ValueError(f"split {split!r} of {name!r} is empty") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise ValueError(
            f"{name!r} was saved by datasets, but cannot be opened: {type(error).__name__}: {one_line(error)}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        chosen = choose_parts(saved, split, name)
        saved = chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)
    elif saved.split is not None and str(saved.split) != split:
        raise MissingSplitError(split, name, [saved.split])
    return _checked_not_empty(saved, name, split)


def _checked_not_empty(dataset: datasets.Dataset, name: str, split: str) -> datasets.Dataset:
    if len(dataset) == 0:
        raise ValueError(f"split {split!r} of {name!r} is empty")
    return dataset
