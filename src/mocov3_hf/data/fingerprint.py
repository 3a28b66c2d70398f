"""A fingerprint of the images of a data set, for runs that resume: the same for the same images in the same order.

It depends on the number of images, on their names below the folder of the data set, on their sizes in bytes, and on
the content of some of them, spread over the data set. It does not depend on where the data set is, on times, or on how
it is cached. Of a stream of parquet files or tars without an index it depends on the shards.
"""

import hashlib
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .labeled import LabeledImages, SelectedRows
from .references import path_of
from .remote import is_remote
from .shards import ParquetShard, TableShard
from .sources import MapSource, StreamSource


# Images whose size is asked for, and whose content is read, this much at the beginning, in the middle and at the end.
SIZED_IMAGES, SAMPLED_IMAGES, SAMPLED_BYTES = 100_000, 256, 1 << 15


def fingerprint(source: MapSource | StreamSource) -> str:
    """32 hexadecimal digits."""
    digest = hashlib.sha256(f"1 {source.num_samples}\n".encode())
    if isinstance(source, StreamSource) and source.shards and isinstance(source.shards[0], TableShard):
        source = source.shards[0].source
    if isinstance(source, StreamSource):
        for shard in source.shards:
            digest.update(f"{_describe_shard(shard)}\n".encode(errors="backslashreplace"))
        files = list(dict.fromkeys(getattr(shard, "url", "") for shard in source.shards))
        for row in _spread(len(files), SAMPLED_IMAGES):
            if files[row] and not is_remote(files[row]):
                digest.update(_sample_of_file(files[row]))
        return digest.hexdigest()[:32]
    column = source.column()
    sizes = _sizes_in_table(column)
    if sizes is not None:
        digest.update(sizes.tobytes())
    else:
        _add_files(digest, column)
    for row in _spread(len(source), SAMPLED_IMAGES):
        digest.update(_sample(source, row))
    return digest.hexdigest()[:32]


def labeled_fingerprint(images: LabeledImages) -> str:
    """32 hexadecimal digits of the images and the labels of a split."""
    digest, source = hashlib.sha256(), images.source
    if isinstance(source, SelectedRows):
        digest.update(source.rows.tobytes())
        source = source.source
    if isinstance(source, MapSource):
        digest.update(fingerprint(source).encode())
    digest.update(f"{len(images)} {images.class_names}".encode(errors="backslashreplace"))
    digest.update(np.asarray(images.labels, dtype=np.int64 if images.labels.ndim == 1 else None).tobytes())
    return digest.hexdigest()[:32]


def _spread(number: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(np.int64)).tolist()


def _sizes_in_table(column: pa.ChunkedArray) -> np.ndarray | None:
    """Sizes in bytes of images that are in the table, from its offsets; None for a table of paths."""
    if pa.types.is_struct(column.type):
        names = [column.type.field(index).name for index in range(column.type.num_fields)]
        if "bytes" not in names:
            return None
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], column.type.field("bytes").type)
    is_binary = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    if not is_binary or column.null_count == len(column):
        return None
    return pc.fill_null(pc.cast(pc.binary_length(column), pa.int64()), -1).to_numpy()


def _references(column: pa.ChunkedArray) -> list[str | None]:
    """The references in a table of paths; none for pixels in the table, such as Array3D."""
    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        column = pa.chunked_array([chunk.field("path") for chunk in column.chunks], column.type.field("path").type)
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column.to_pylist() if is_text else []


def file_stamps(source: MapSource) -> bytes:
    """Digest of the sizes and times of all files of a table of paths; empty for another table."""
    digest, seen = hashlib.sha256(), {}
    references = _references(source.column()) if _sizes_in_table(source.column()) is None else []
    for reference in references:
        path = path_of(reference or "")
        if path not in seen:
            try:
                status = os.stat(path)
                seen[path] = f"{status.st_size} {status.st_mtime_ns}\n".encode()
            except OSError:
                seen[path] = b"-\n"
        digest.update(seen[path])
    return digest.digest() if references else b""


def _add_files(digest, column: pa.ChunkedArray) -> None:
    references = _references(column)
    known = [reference for reference in references if reference]
    # Of the first and the last in sorted order, which is that of all.
    first, last = min(known, default=""), max(known, default="")
    common = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    common = first[:common].rpartition("/")[0]
    sample = set(_spread(len(references), SIZED_IMAGES))
    for row, reference in enumerate(references):
        name = (reference or "").removeprefix(common)
        digest.update(f"{name}\n".encode())
        # The size of a member of an archive is in its reference.
        if row in sample and reference and "\0:" not in reference:
            try:
                digest.update(f"{os.stat(path_of(reference)).st_size}\n".encode())
            except OSError:
                digest.update(b"-\n")


def _sample(source: MapSource, row: int) -> bytes:
    try:
        data = source.read(row)
        if isinstance(data, str):
            return _sample_of_file(data)
    except (OSError, ValueError):  # a bad image is reported when it is decoded
        data = b""
    if isinstance(data, np.ndarray):
        data = data.tobytes()
    return hashlib.sha256(data if isinstance(data, bytes) else repr(data).encode()).digest()


def _sample_of_file(path: str) -> bytes:
    """Digest of the beginning, the middle and the end of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        for start in (0, (size - SAMPLED_BYTES) // 2, size - SAMPLED_BYTES):
            file.seek(max(start, 0))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.digest()


def _describe_shard(shard) -> str:
    if isinstance(shard, ParquetShard):
        return f"{os.path.basename(shard.url)} {shard.row_group} {shard.num_rows} {shard.num_bytes}"
    return f"{type(shard).__name__} {os.path.basename(getattr(shard, 'url', ''))} {shard.num_rows}"
