"""The shards of a streamed data set: parquet row groups, and parts of tars, of file lists and of Arrow tables.

A shard is small and is sent to workers. `load()` returns its rows. `num_rows` is known from metadata (a parquet
footer, the index of a local tar, a list of files), or else None.
"""

import os
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from .decode import BadImageError
from .memory import encoded
from .references import read_reference
from .remote import RemoteFile, is_remote, read_file


# Rows per shard of a format with random access, which can be read in any order at no cost.
ROWS_PER_SHARD = 256
_HEADER_THREADS = 16


class ListedRows:
    """Rows in memory."""

    def __init__(self, images: list):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def read(self, row: int) -> bytes | str | None:
        return self._images[row]


class ArrowRows:
    """Rows of an Arrow column (bytes, path, struct of both, or array), converted one at a time."""

    def __init__(self, column):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def read(self, row: int) -> bytes | str | None:
        return cell(self._column[row])


class RemotePathRows:
    """Rows that are files of a remote file system."""

    def __init__(self, urls: list[str]):
        self._urls = urls

    def __len__(self) -> int:
        return len(self._urls)

    def read(self, row: int) -> bytes:
        try:
            return read_file(self._urls[row])
        except FileNotFoundError as error:
            raise BadImageError(f"cannot be read: it does not exist ({self._urls[row]})") from error


class TarRows:
    """Members of an uncompressed tar on disk, read in place."""

    def __init__(self, path: str, members: list[tuple[int, int]], temporary: bool = False):
        self._file, self._members = os.open(path, os.O_RDONLY), members
        if temporary:
            os.unlink(path)  # the data exists as long as the file is open

    def __len__(self) -> int:
        return len(self._members)

    def read(self, row: int) -> bytes:
        offset, size = self._members[row]
        return os.pread(self._file, size, offset)

    def __del__(self):
        os.close(self._file)


def cell(scalar: pa.Scalar) -> bytes | str | np.ndarray | None:
    """The image in a cell of an Arrow column: its bytes, or else its path, an array, or else None."""
    storage = scalar.value if isinstance(scalar, pa.ExtensionScalar) else scalar
    if not isinstance(storage, pa.ListScalar):
        return encoded_image(scalar.as_py())
    values = storage.values
    if values is None:
        return None
    shape = [len(values)]
    while isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise BadImageError("is a nested list with rows of different lengths, expected an array")
        shape.append(lengths[0])
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def encoded_image(value) -> bytes | str | np.ndarray | None:
    """The image in a cell of an undecoded column: its bytes, or else its path, an array, or else None."""
    if isinstance(value, list):
        return np.asarray(value)
    if isinstance(value, Image.Image | torch.Tensor):  # of a stream in memory
        return encoded(value)
    if isinstance(value, dict):
        data = value.get("bytes")
        value = data if data is not None else value.get("path")
    return read_reference(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class ParquetShard:
    """One row group of a parquet file. Only the image column is read."""

    url: str
    row_group: int
    num_rows: int
    image_column: str
    num_bytes: int = 0  # of the row group

    def describe(self, row: int) -> str:
        return f"{self.url}, row {row} of row group {self.row_group}"

    def load(self) -> ArrowRows:
        with _open_parquet(self.url) as file:
            table = file.read_row_group(self.row_group, columns=[self.image_column])
        return ArrowRows(table.column(self.image_column))


@dataclass(frozen=True)
class PathShard:
    """A part of a list of files."""

    paths: tuple[str, ...] = field(repr=False)

    @property
    def num_rows(self) -> int:
        return len(self.paths)

    def describe(self, row: int) -> str:
        return self.paths[row]

    def load(self):
        return RemotePathRows(self.paths) if is_remote(self.paths[0]) else ListedRows(self.paths)


@dataclass(frozen=True)
class TarShard:
    """A part of a local, indexed webdataset tar."""

    path: str
    members: tuple[tuple[int, int], ...] = field(repr=False)

    @property
    def num_rows(self) -> int:
        return len(self.members)

    def describe(self, row: int) -> str:
        return f"{self.path}, at byte {self.members[row][0]}"

    def load(self) -> TarRows:
        return TarRows(self.path, self.members)


@dataclass(frozen=True)
class RemoteTarShard:
    """A remote tar, copied to a temporary file and indexed when it is loaded."""

    url: str
    image_column: str
    num_rows: None = None

    def describe(self, row: int) -> str:
        return f"{self.url}, image {row}"

    def load(self) -> TarRows:
        handle, path = tempfile.mkstemp(suffix=".tar")
        with os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(RemoteFile(self.url), file, length=8 << 20)
        return TarRows(path, index_tar(path, self.image_column), temporary=True)


@dataclass(frozen=True)
class TableShard:
    """Rows start..stop of a memory-mapped Arrow table."""

    source: object = field(repr=False)  # MapSource
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def describe(self, row: int) -> str | None:
        return self.source.describe(self.start + row)

    def load(self):
        return _TableRows(self)


class _TableRows:
    def __init__(self, shard: TableShard):
        self._shard = shard

    def __len__(self) -> int:
        return self._shard.num_rows

    def read(self, row: int):
        return self._shard.source.read(self._shard.start + row)


@dataclass(frozen=True)
class IterableShard:
    """One shard of an `IterableDataset`, for any other format. It is read to its end."""

    dataset: datasets.IterableDataset = field(repr=False)
    image_column: str
    num_rows: None = None

    def describe(self, row: int) -> None:
        """The format does not say."""

    def load(self) -> ListedRows:
        # In batches: a worker would split plain iteration among all workers a second time.
        batches = self.dataset.iter(batch_size=ROWS_PER_SHARD)
        return ListedRows([encoded_image(value) for batch in batches for value in batch[self.image_column]])


def index_tar(path: str, image_column: str) -> tuple[tuple[int, int], ...]:
    """(offset, size) of every image in a local webdataset tar. Reads only the headers.

    Args:
        path: Uncompressed tar.
        image_column: Extension of the images, by webdataset's convention: everything after the first dot of the name.
    """
    found, length = [], os.path.getsize(path)
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.size < 0 or member.offset_data + member.size > length:
                raise tarfile.ReadError(
                    f"{member.name!r} has {member.size} bytes, more than the file or less than none"
                )
            name = os.path.basename(member.name)
            if member.isfile() and "." in name[1:] and name.split(".", 1)[1] == image_column:
                found.append((member.offset_data, member.size))
            archive.members = []  # otherwise tarfile keeps every member in memory
    return tuple(found)


def parquet_shards(url: str, image_column: str) -> list[ParquetShard]:
    """The row groups of a parquet file, from its footer."""
    with _open_parquet(url) as file:
        if image_column not in file.schema_arrow.names:
            raise ValueError(f"{url!r} has no column {image_column!r}; columns: {', '.join(file.schema_arrow.names)}")
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    return [
        ParquetShard(url, index, group.num_rows, image_column, group.total_byte_size)
        for index, group in enumerate(groups)
        if group.num_rows
    ]


def _open_parquet(url: str) -> pq.ParquetFile:
    # `pre_buffer` merges the reads of a column's chunks.
    return pq.ParquetFile(RemoteFile(url) if is_remote(url) else url, pre_buffer=True)


def builder_shards(builder: datasets.DatasetBuilder, parts: list[str], image_column: str) -> list:
    """The shards of some splits of a data set, in order.

    Parquet files, webdataset tars and image folders are read directly from the files that `datasets` found. All other
    formats are read through `IterableDataset`.
    """
    urls = [url for part in parts for url in (builder.config.data_files or {}).get(part, ())]
    if builder.name == "parquet":
        # Footers are small and latency dominates: read many at once.
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            return [
                shard for shards in pool.map(lambda url: parquet_shards(url, image_column), urls) for shard in shards
            ]
    if builder.name == "webdataset" and all(url.endswith(".tar") for url in urls):
        return [shard for url in urls for shard in _tar_shards(url, image_column)]
    if builder.name == "imagefolder":
        images = tuple(url for url in urls if os.path.splitext(url)[1].lower() in builder.EXTENSIONS)
        if images:
            return [PathShard(images[start : start + ROWS_PER_SHARD]) for start in _shard_starts(len(images))]
    streams = [builder.as_streaming_dataset(split=part) for part in parts]
    return [shard for stream in streams for shard in stream_shards(stream, image_column)]


def stream_shards(stream: datasets.IterableDataset, image_column: str) -> list[IterableShard]:
    """The shards of an `IterableDataset`, in its order."""
    number = stream.num_shards
    return [
        IterableShard(undecoded(stream.shard(number, index, contiguous=True)), image_column) for index in range(number)
    ]


def _tar_shards(url: str, image_column: str) -> list:
    if is_remote(url):
        return [RemoteTarShard(url, image_column)]
    try:
        members = index_tar(url, image_column)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{url!r} cannot be read as a tar: {error}") from error
    return [TarShard(url, members[start : start + ROWS_PER_SHARD]) for start in _shard_starts(len(members))]


def table_shards(source, edges: tuple[int, ...] = ()) -> list[TableShard]:
    """The shards of a `MapSource`. None contains both rows before and after an edge."""
    bounds = [*zip((0, *edges), (*edges, len(source)), strict=True)]
    return [
        TableShard(source, start, min(start + ROWS_PER_SHARD, stop))
        for first, stop in bounds
        for start in range(first, stop, ROWS_PER_SHARD)
    ]


def _shard_starts(length: int) -> range:
    return range(0, length, ROWS_PER_SHARD)


def undecoded(dataset):
    """The data set with every image column cast to `Image(decode=False)`."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image) and feature.decode:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset
